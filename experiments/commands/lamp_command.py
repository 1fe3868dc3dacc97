"""`privet lamp`: what it prints. Heavy imports wait inside the functions."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["lamp"]


def lamp(
    folder: Annotated[Path, typer.Argument(help="A task's published files, or a copy of all.")],
    task: Annotated[str, typer.Option(help="LaMP-1 to LaMP-7.")],
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "dev",
    retrieval: Annotated[
        str, typer.Option(help="Some of none, random, recency, bm25, dense, with commas.")
    ] = "none,random,recency,bm25",
    k: Annotated[int, typer.Option(min=1, help="Items of the profile in a prompt.")] = 4,
    tokens: Annotated[int, typer.Option(min=32, help="Of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 24,
    answer: Annotated[str, typer.Option(help="auto, choose (a label) or generate.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions.")] = None,
    model: Annotated[str, typer.Option(help="A decoder.")] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option(min=0, help="Of random retrieval.")] = 0,
    predictions: Annotated[
        Path | None, typer.Option(help="Score these answers, made elsewhere, and stop.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for each way's answers, as published outputs are.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """LaMP's tasks from their published files: retrieval baselines side by side."""
    from ...common.files import explain_os_errors, write_json_atomic
    from ..lamp.answering import Settings, compare, scored
    from ..lamp.tasks import task_of

    asked = task_of(task)
    if predictions is not None:
        found = scored(folder, asked, split, predictions)
        print(json.dumps(found, indent=2) if as_json else _metrics(found))
        return
    ways = tuple(way.strip() for way in retrieval.split(","))
    settings = Settings(ways, k, tokens, new_tokens, answer, seed, model)  # type: ignore[arg-type]
    facts = compare(folder, asked, split, limit, settings)
    if out is not None:
        with explain_os_errors(out, "make the folder"):
            out.mkdir(parents=True, exist_ok=True)
        for way, one in facts["ways"].items():
            write_json_atomic(out / f"{asked.official}_{split}_{way}.json", one["predictions"])
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        _show(facts)


def _metrics(found: dict[str, Any]) -> str:
    shown = [f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
    return f"{found['task']} {found['split']}, {found['questions']} questions: " + ", ".join(shown)


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [name for name, one in next(iter(facts["ways"].values())).items()
             if isinstance(one, float)]  # fmt: skip
    table = Table(
        title=f"{facts['task']} ({facts['about']}), {facts['split']}, {facts['questions']} "
        f"questions; answers by '{facts['answered_by']}' with {facts['settings']['base']}"
    )
    for column in ("profile", *names, f"{names[0]}, 95 %", f"{names[0]} against the first"):
        table.add_column(column, justify="left" if column == "profile" else "right")
    for way, one in facts["ways"].items():
        against = one["against_first"]
        table.add_row(
            way,
            *(f"{one[name]:.3f}" for name in names),
            _span(one["ci95"]),
            "" if against is None else f"{against['mean']:+.3f} ({_span(against['ci95'])})",
        )
    Console().print(table)


def _span(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
