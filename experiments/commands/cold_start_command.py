"""`privet coldstart`: what it prints. Heavy imports wait inside the functions."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..evaluation.cold_start import LabelCurve
    from ..evaluation.user_statistics import Mean

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
    curve = cold_start.cold_start(folder, of_run(folder))
    target = out or folder
    with explain_os_errors(target, "make the folder"):
        target.mkdir(parents=True, exist_ok=True)
    write_json_atomic(target / "cold-start.json", curve)
    write_atomic(target / "cold-start.svg", cold_start.picture(curve).encode())
    if as_json:
        print(json.dumps(curve, indent=2, allow_nan=False))
    else:
        _show(curve)
        print(f"{target}/cold-start.svg is the picture, {target}/cold-start.json has every number")


def _show(curve: "LabelCurve") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{curve['people']} people of {curve['groups']} groups never trained on; "
        f"{curve['unit']}, 95 % over people"
    )
    for column in ("own labels", "global", "personal", "other", "personal - global",
                   "personal - other", "hurt"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in curve["rows"]:
        table.add_row(
            str(row["records"]),
            *(f"{row[name]['mean']:.3f}" for name in ("global", "personal", "other")),
            *(_span(row[name]) for name in ("personal_minus_global", "personal_minus_other")),
            f"{100 * row['hurt']:.0f} %",
        )
    Console().print(table)
    start = curve["beats_from"]
    print(
        "personal beats global and the other's head "
        + (f"from {start} own labels on" if start is not None else "at no number of labels")
        + f"; the curve is {'' if curve['monotone'] else 'not '}monotone within its intervals"
    )
    print("Read by the experimenter off simulated devices: no epsilon covers these figures.")


def _span(difference: "Mean") -> str:
    low, high = difference["ci95"] or (-math.inf, math.inf)
    return f"{difference['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
