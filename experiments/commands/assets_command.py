"""`privet assets`: list, fetch, verify and remove the catalogue's artefacts."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import typer

from ...common.errors import AssetError
from ...common.model import assets

__all__ = ["app"]

app = typer.Typer(help="Base models and data: list, fetch, verify, remove.", no_args_is_help=True)

_Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_COLOURS = {"ready": "green", "missing": "yellow", "damaged": "red"}


@app.command("list")
def list_(as_json: _Json = False) -> None:
    """What the catalogue has, and what of it is in the cache."""
    if as_json:
        lines = [vars(line) for line in assets.status()]
        print(json.dumps({"cache": str(assets.cache_folder()), "assets": lines}, indent=2))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "state", "MB on disk", "licence", "what", box=SIMPLE)
    table.columns[0].no_wrap = True
    table.columns[2].justify = "right"
    for line in assets.status():
        state = f"[{_COLOURS[line.state]}]{line.state}[/]"
        table.add_row(line.name, state, f"{line.size_on_disk / 1e6:.0f}", line.licence, line.about)
    Console().print(table)
    print(f"cache: {assets.cache_folder()}")


@app.command()
def fetch(
    names: _Names = None,
    every: Annotated[bool, typer.Option("--all", help="The whole catalogue.")] = False,
    as_json: _Json = False,
) -> None:
    """Download, check and unpack artefacts, unless they are in the cache already."""
    if bool(names) == every:
        known = ", ".join(assets.CATALOGUE)
        raise AssetError(f"Expected either names (of {known}) or --all; give one of the two.")
    chosen = names or list(assets.CATALOGUE)
    paths = {}
    with _progress(len(chosen)) as (say, advance):
        for name in chosen:
            paths[name] = str(assets.fetch(name, say))
            advance()
    _print(paths, as_json)


@app.command()
def verify(names: _Names = None, as_json: _Json = False) -> None:
    """Hash every file of the named artefacts, or without a name of all that are in the cache."""
    here = [line.name for line in assets.status() if line.state != "missing"]
    found = {name: _verdict(name) for name in names or here}
    _print(found, as_json)
    bad = [name for name, verdict in found.items() if verdict != "good"]
    if bad:
        raise AssetError(f"{len(bad)} of {len(found)} failed: {', '.join(bad)}; fetch them again.")


@app.command()
def remove(name: str, as_json: _Json = False) -> None:
    """Delete an artefact from the cache."""
    freed = assets.remove(name)
    _print({name: freed if as_json else f"{freed / 1e6:.0f} MB freed"}, as_json)


def _verdict(name: str) -> str:
    try:
        assets.verify(name)
    except AssetError as error:
        return str(error)
    return "good"


def _print(lines: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(lines, indent=2))
        return
    for name, value in lines.items():
        print(f"{name}: {value}")


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], object]]]:
    """Show progress on stderr, as a bar on a terminal and as plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda sentence: print(sentence, file=sys.stderr, flush=True), lambda: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("looking into the cache", total=total)
        yield lambda sentence: bar.update(task, description=sentence), lambda: bar.advance(task)
