"""The commands of an experiment: simulate, evaluate, report, generate.

Heavy imports wait inside the functions, so that `privet --help` answers at once.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...common.errors import PrivetError
from ..named import CONFIGS, RUNS, configuration, run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from ...common.settings.config import Config

__all__ = [
    "clusters",
    "demo_devices",
    "evaluate",
    "generate",
    "report",
    "reported",
    "simulate",
]


_Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def simulate(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A TOML file, or a name: demo, ratings, tastes; with --resume a run, too.",
        ),
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local (this process) or ray.")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run there is.")] = False,
    start_from: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Start from its adapter, as adapter.start does."),
    ] = None,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Make the run folder, for `flwr run`, and stop.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Run a federated experiment and report what it cost and what people got."""
    from .. import simulate as stages
    from ..reports import report, terminal

    overrides = list(set_ or []) + ([f"adapter.start={start_from}"] if start_from else [])
    again = _run_to_resume(config) if resume else None
    if again is not None:
        settings, folder = _read_run(again, overrides), again
    else:
        settings = configuration(config, overrides)
        folder = RUNS / settings.name
    if prepare_only:
        stages.prepare(settings, folder, resume=resume)
        print(folder.resolve())
        return
    summary = stages.simulate(settings, folder, engine_name=engine, resume=resume)
    if as_json:
        _print_json(summary)
    else:
        terminal.show(report.report_facts(folder), _console())
        print(f"\n{folder}/report.html has the pictures")


def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|SCENARIO", help="A run, or a scenario: a name, or a TOML file."
        ),
    ],
    as_json: _Json = False,
) -> None:
    """Measure models side by side on people's later records: a run's four, or a scenario's all."""
    from .. import api
    from ..comparison import scenario
    from ..reports import terminal

    if _is_scenario(what, scenario.known()):
        _compare(what, as_json)
        return
    _, facts = api.evaluated(run_folder(what))
    if as_json:
        _print_json(facts["summary"])
    else:
        terminal.show(facts, _console())


def clusters(
    run: _Run,
    against: Annotated[str, typer.Option(help="A run of the same people with one adapter.")],
    as_json: _Json = False,
) -> None:
    """A run with clusters: who chose which, and what it is worth against one adapter."""
    from ..evaluation import cluster_evaluation

    found = cluster_evaluation.compared(run_folder(run), run_folder(against))
    if as_json:
        _print_json(found)
        return
    print(
        "the experimenter's reading of the simulated devices: none of it passes the server, and "
        "no epsilon covers it"
    )
    print(
        f"adjusted Rand index of the private choices: {found['ari']:.3f}, {found['people']} people"
    )
    for name, counts in found["choices"].items():
        print(f"  {name:<10}" + "".join(f"{count:>6}" for count in counts))
    for name, own in (("seen", found["seen"]), ("unseen", found["unseen"])):
        losses = ", ".join(f"{model} {loss:.4f}" for model, loss in own["losses"].items())
        print(f"{name} people ({own['people']}), {found['unit']}, later records: {losses}")
        for pair, gain in (
            ("base_minus_global", own["base_minus_global"]),
            ("base_minus_group", own["base_minus_group"]),
            ("global_minus_group", own["global_minus_group"]),
        ):
            low, high = gain["ci95"] or (-math.inf, math.inf)
            print(f"  {pair:<20} {gain['mean']:+.4f}  [{low:+.4f}, {high:+.4f}]")
        print(f"  better with the own cluster: {own['share_better']:.0%}")


def _is_scenario(what: str, known: list[str]) -> bool:
    """A TOML file, or a name of a scenario where no folder at that path is a run.

    A run below `runs` of the same name is reached by its path.
    """
    is_run = (Path(what) / "config.toml").is_file()
    return Path(what).suffix == ".toml" or (what in known and not is_run)


def _compare(what: str, as_json: bool) -> None:
    from ..comparison import comparison_page, scenario, scenario_run

    found = scenario_run.compare(scenario.read(what), RUNS)
    if as_json:
        _print_json(found)
    else:
        comparison_page.show(found, _console())
        place = found["folder"]
        print(f"\n{place}/report.html has the pictures, {place}/users.jsonl a line for each person")


def report(
    run: _Run,
    html: Annotated[bool, typer.Option("--html", help="Write report.html again.")] = False,
    as_json: _Json = False,
) -> None:
    """What was promised, what was spent, against whom it holds, what people got for it."""
    from ..reports import report, terminal

    folder = run_folder(run)
    facts = report.report_facts(folder)
    if html:
        report.write(folder)
    if as_json:
        _print_json(facts)
    elif html:
        print(folder / "report.html")
    else:
        terminal.show(facts, _console())


def reported(run_folder: Path) -> None:
    """Write a finished run's report, and print where it is.

    The run is what counts, so no fault here ends it.
    """
    import sys

    from ..reports import report

    try:
        report.write(run_folder)
    except PrivetError as error:
        print(f"warning: there is no report yet: {error}", file=sys.stderr)
    else:
        print(
            f"{run_folder}/report.html is the report; in the terminal: privet report {run_folder}"
        )


def generate(
    run: _Run,
    user: Annotated[str, typer.Option(help="Whose personal head, for example hamlet/HAMLET.")],
    prompt: Annotated[str, typer.Option(help="How the text begins.")],
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="How many to add.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.8,
    as_json: _Json = False,
) -> None:
    """Continue a prompt with the base, the shared and the personal model, side by side."""
    from ..evaluation import generation

    folder = run_folder(run)
    texts = generation.side_by_side(
        folder, user, prompt, tokens=tokens, seed=seed, temperature=temperature
    )
    if as_json:
        _print_json({"user": user, "prompt": prompt, **texts})
        return
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    panels = [Panel(Text(text), title=name, width=38) for name, text in texts.items()]
    _console().print(Columns(panels))


def demo_devices() -> None:
    """A server and six people's devices on this machine, two of which die: `make demo-devices`."""
    from ..demo import demo_devices as devices

    devices.demo(RUNS / "demo-devices", _console())


def _run_to_resume(named: str) -> Path | None:
    """Return the run folder at this path, or below `runs` where no configuration has the name."""
    if (Path(named) / "config.toml").is_file():
        return Path(named)
    is_config = Path(named).is_file() or (CONFIGS / f"{named}.toml").exists()
    place = RUNS / named
    return place if not is_config and (place / "config.toml").is_file() else None


def _read_run(folder: Path, overrides: list[str]) -> "Config":
    """A run's own settings, some of them changed."""
    from ...common.settings.config import read

    return read(folder / "config.toml", overrides)


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
