"""`privet ab`: what it prints. Heavy imports wait inside the functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["ab"]


def ab(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of one: ab.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where it goes: runs/NAME.")
    ] = None,
    check: Annotated[
        int, typer.Option("--check", metavar="N", min=0, help="Repeat N times: power, coverage.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Compare templates or models on simulated devices: noised sums, keyed arms, paid looks."""
    import json

    from ...common.ab_test import read
    from ..ab_test import coverage_check
    from ..ab_test import simulated_ab_test as experiment
    from ..named import toml_file

    settings = read(toml_file(config, Path(experiment.__file__).parent, "experiment"))
    folder = out or Path("runs") / settings.name
    facts = (
        coverage_check.check(settings, check, folder) if check else experiment.run(settings, folder)
    )
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    for text in _checked(facts) if check else _estimates(facts):
        print(text)
    for text in _spent(facts["privacy"]):
        print(text)
    if not check:
        print(f"{folder}/ab.svg is the picture, {folder}/ab.json has every number")


def _estimates(facts: Mapping[str, Any]) -> list[str]:
    from ...server.ab_estimates import lines

    heading = f"Arms of {facts['settings']['name']}; masks {facts['masks']}"
    return [heading, *(line for look in facts["looks"] for line in lines(look))]


def _checked(facts: Mapping[str, Any]) -> list[str]:
    times = facts["repetitions"]
    return [
        f"true difference found       {facts['found']} of {times}",
        f"null called a difference    {facts['null_called']} of {times}   (every look at the whole "
        f"alpha: {facts['null_called_uncorrected']})",
        f"last interval holds truth   {facts['covered_last']} of {times}; at every look at once "
        f"{facts['covered_at_every_look']}; under the null {facts['null_covered_last']}",
    ]


def _spent(lines: list[Mapping[str, Any]]) -> list[str]:
    """One sentence for each line of the ledgers."""
    return [
        f"spent, from the devices' ledgers: epsilon {line['epsilon']:.4f} at delta "
        f"{line['delta']:g}, {line['unit']}-level, {line['adjacency']} "
        f"({line['adjacency_means']}), noise {line['noise_at']}, against the {line['against']}"
        f"{_if(line)}, "
        f"in at most {line['participations_max']} release(s) a device"
        for line in lines
    ]


def _if(line: Mapping[str, Any]) -> str:
    """Say what a figure against the server rests on.

    Of one without a bound it says that it has none.
    """
    basis = line["conditions"] if line["bound"] else ["reckoned as Gaussian noise, no bound"]
    if line["conditions"]:
        return f" (if: {'; '.join(basis)})"
    return f" ({basis[0]})" if basis else ""
