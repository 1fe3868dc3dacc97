"""What a person sees while a run goes on: one live line, and one line a round."""

import contextlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..common.files import explain_os_errors
from ..common.settings.config import Config
from ..server.round_record import RoundRecord, read_records
from ..server.void_rounds import round_line, trained

__all__ = ["counting", "rounds", "say", "tensorboard", "warn"]

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Live:
    """Callbacks of a run: one client done, one round done."""

    advance: Callable[[], None]
    show: Callable[[RoundRecord], None]


def say(text: str, *, markup: bool = False) -> None:
    """One line for the person at the keyboard."""
    console.print(text, markup=markup, soft_wrap=True)


def warn(text: str) -> None:
    """A sentence that should not be missed."""
    say(f"[yellow]warning:[/] {escape(text)}", markup=True)


@contextlib.contextmanager
def counting(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Show a bar with rate and time left.

    The yielded function counts one.
    """
    with _bar() as bar:
        task = bar.add_task(what, total=total, unit=unit, rate="")
        began = time.monotonic()

        def one() -> None:
            done = bar.tasks[0].completed + 1
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(task, advance=1, rate=f"{rate:.2f} {unit}/s")

        yield one


@contextlib.contextmanager
def rounds(config: Config, folder: Path) -> Iterator[Live]:
    """Show a bar over all clients of all rounds, and a line above it for each round."""
    done = trained(read_records(folder))
    if done:
        say(f"going on after round {done} of {config.rounds.count}")
    left = (config.rounds.count - done) * config.rounds.cohort
    with counting("training", left, "clients") as one:
        yield Live(one, lambda record: say(line(record, config.rounds.count), markup=True))


def tensorboard(folder: Path) -> None:
    """Write TensorBoard's events of a finished run, all anew.

    Where it is not installed, nothing is written.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with (
        explain_os_errors(folder / "tensorboard", "write"),
        SummaryWriter(str(folder / "tensorboard")) as events,
    ):
        names = {"mean_norm": "noised_mean_norm", "update_norm": "update_norm"}
        names |= {name: name for name in ("answered", "declined")}
        for record in read_records(folder):
            for name, value in _scalars(record.get("statistics", {})):
                events.add_scalar(f"statistics/{name}", value, record["round"])
            for key, number in record.items():
                if key in names and isinstance(number, int | float):
                    events.add_scalar(f"rounds/{names[key]}", number, record["round"])
        for spent in json.loads((folder / "privacy.json").read_text())["lines"]:
            tag = f"epsilon/{spent['unit']}_against_{spent['against']}"
            events.add_scalar(tag, spent["epsilon"], len(read_records(folder)))


def line(record: RoundRecord, count: int) -> str:
    """A round's line, with what it came to; in yellow where somebody could not take part."""
    results = ""
    if not record["void"]:
        results = _statistics(record.get("statistics", {}))
        results += f"noised mean {record['mean_norm']:.3g}  moved {record['update_norm']:.3g}"
    text = escape(round_line(record, count, results=results))
    return f"[yellow]{text}[/]" if record["void"] or record.get("refused") else text


def _scalars(statistics: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Yield the numbers in a round's statistics, by name."""
    for name, value in statistics.items():
        if isinstance(value, int | float):
            yield name, value


def _statistics(found: Mapping[str, Any]) -> str:
    """Show statistics as `noised loss 3.21 +- 0.41  `, where the noise leaves one to be read.

    Gains are shown likewise.
    """
    text = ""
    for key, name in (("train_loss", "loss"), ("gain_shared", "gain"), ("gain_personal", "head")):
        if key in found and found[key] is None:
            text += f"{name} lost in the noise  "
        elif key in found:
            sign = "" if name == "loss" else "+"
            text += f"noised {name} {found[key]:{sign}.3g} +- {found[f'{key}_std']:.2g}  "
    return text


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
    )
