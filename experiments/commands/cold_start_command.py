"""`privet coldstart`: what it prints. Heavy imports wait inside the functions."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["coldstart"]


def coldstart(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where it goes: the run's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """How many own labels a newcomer needs: personal, shared and somebody else's head."""
    from ...common.files import explain_os_errors, write_atomic, write_json_atomic
    from ...common.settings.config import of_run
    from ..evaluation import cold_start
    from ..named import run_folder

    folder = run_folder(run)
    found = cold_start.cold_start(folder, of_run(folder))
    place = out or folder
    with explain_os_errors(place, "make the folder"):
        place.mkdir(parents=True, exist_ok=True)
    write_json_atomic(place / "cold-start.json", found)
    write_atomic(place / "cold-start.svg", cold_start.picture(found).encode())
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        _show(found)
        print(f"{place}/cold-start.svg is the picture, {place}/cold-start.json has every number")


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found['people']} people of {found['groups']} groups never trained on; "
        f"{found['unit']}, 95 % over people"
    )
    for column in ("own labels", "global", "personal", "other", "personal - global",
                   "personal - other", "hurt"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in found["rows"]:
        table.add_row(
            str(row["records"]),
            *(f"{row[name]['mean']:.3f}" for name in ("global", "personal", "other")),
            *(_span(row[name]) for name in ("personal_minus_global", "personal_minus_other")),
            f"{100 * row['hurt']:.0f} %",
        )
    Console().print(table)
    start = found["beats_from"]
    print(
        "personal beats global and the other's head "
        + (f"from {start} own labels on" if start is not None else "at no number of labels")
        + f"; the curve is {'' if found['monotone'] else 'not '}monotone within its intervals"
    )
    print("Read by the experimenter off simulated devices: no epsilon covers these figures.")


def _span(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{one['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
