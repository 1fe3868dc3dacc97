"""`privet client feedback`, which records what the owner thought of answers, on the device alone.

No command here loads torch. Texts are printed only where the owner asks for them (`list --texts`),
and are better given in a file than on the command line, which other programs can read.
"""

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...common.errors import ConfigError, DataError
from . import printing
from .options import AsJson, HomeFolder, PassphraseFile, opened

if TYPE_CHECKING:
    from ..store.verdicts import Verdict

__all__ = ["app"]

app = typer.Typer(
    help="Accept, reject, edit: your preferences, on this device.", no_args_is_help=True
)


MAX_FILE_BYTES = 64 * 2**20
"""Bytes of a file of verdicts."""


@app.command("add")
def add(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="JSON Lines, a verdict a line; - is standard input."),
    ] = None,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What was asked.")] = "",
    accept: Annotated[
        str | None, typer.Option(metavar="ANSWER", help="You took this answer.")
    ] = None,
    over: Annotated[
        str | None, typer.Option(metavar="ANSWER", help="With --accept: the other one shown.")
    ] = None,
    reject: Annotated[
        str | None, typer.Option(metavar="ANSWER", help="You refused this answer.")
    ] = None,
    edit: Annotated[
        str | None, typer.Option(metavar="ANSWER", help="You changed this answer.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --edit: what it became.")
    ] = None,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Record a verdict on an answer, or all verdicts of a file (all of them, or none)."""
    from ..store import verdicts as feedback

    answers = {"accept": accept, "reject": reject, "edit": edit}
    verdicts = _given(file, answers, {"prompt": prompt or None, "over": over, "edited": to})
    with opened(home, passphrase) as store:
        numbers = feedback.add(store, verdicts)
        counts = _counts(feedback.kept(store))
    sentence = f"{_verdicts(len(numbers))} recorded; {_spoken(counts)}."
    printing.say(as_json, {"kept": numbers, **counts}, sentence)


@app.command("list")
def list_(
    texts: Annotated[bool, typer.Option("--texts", help="Print the texts too.")] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="The pairs they give instead.")] = False,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """List the verdicts kept with number, day and kind, and with --texts also what was said."""
    from ..store import verdicts as feedback

    with opened(home, passphrase) as store:
        every = feedback.kept(store)
    counts = _counts(every)
    rows = _pair_rows(every, texts) if pairs else _rows(every, texts)
    if as_json:
        printing.dump({**counts, "pairs" if pairs else "verdicts": rows})
        return
    if rows:
        printing.table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    print(f"{_spoken(counts)}.")


@app.command("forget")
def forget(
    numbers: Annotated[
        list[int] | None, typer.Argument(metavar="NUMBER...", help="As `list` numbers them.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Erase verdicts from this device, which does not undo what was trained on them."""
    from ..store import verdicts as feedback

    if bool(numbers) == every:
        raise ConfigError("name the verdicts to forget by their numbers, or say --all")
    with opened(home, passphrase) as store:
        gone = feedback.forget(store, None if every else numbers)
        counts = _counts(feedback.kept(store))
    sentence = f"{_verdicts(gone)} erased; {_spoken(counts)}."
    printing.say(as_json, {"forgotten": gone, **counts}, sentence)


def _given(
    file: Path | None, answers: Mapping[str, str | None], others: Mapping[str, str | None]
) -> "list[Verdict]":
    """Return the verdicts of a file, or the one verdict that the options say."""
    from ..store.verdicts import check

    kinds = [kind for kind, answer in answers.items() if answer is not None]
    if file is not None:
        if kinds or any(text is not None for text in others.values()):
            raise ConfigError("a file and a verdict were given: choose one of them")
        return _read(file, time.time())
    if len(kinds) != 1:
        raise ConfigError(
            f"{len(kinds)} verdicts were given: say one of --accept, --reject, --edit, or name a "
            "file of verdicts"
        )
    fields = {"kind": kinds[0], "answer": answers[kinds[0]], **others}
    return [check(fields, "the verdict", time.time())]


def _read(file: Path, now: float) -> "list[Verdict]":
    """Read a file with a verdict a line, naming the line in every error.

    Raises:
        DataError: unreadable, too large, or a line that is no verdict.
    """
    from ...common.files import explain_os_errors
    from ..store.verdicts import check
    from ..training.records import decode_line

    if str(file) == "-":
        content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    else:
        with explain_os_errors(file, "read verdicts from"), open(file, "rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{file}: more than {MAX_FILE_BYTES:,} bytes; split it into several files.")
    lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file}: expected a verdict a line, found none.")
    return [check(decode_line(line, f"{file}, line {n}"), f"{file}, line {n}", now)
            for n, line in lines]  # fmt: skip


def _counts(every: "dict[int, Verdict]") -> dict[str, int]:
    from ..store.verdicts import pairs

    return {"verdicts_kept": len(every), "pairs_formed": len(pairs(every.values()))}


def _verdicts(count: int) -> str:
    return f"{count:,} verdict{'' if count == 1 else 's'}"


def _spoken(counts: dict[str, int]) -> str:
    kept, pairs = counts["verdicts_kept"], counts["pairs_formed"]
    return f"{kept:,} kept in all, pairs they give: {pairs:,}"


def _rows(every: "dict[int, Verdict]", texts: bool) -> list[dict[str, object]]:
    rows = []
    for number, v in every.items():
        row: dict[str, object] = {"number": number, "day": _day(v.time), "kind": v.kind}
        if texts:
            row |= {"prompt": v.prompt, "answer": v.answer, "other": v.edited or v.over}
        rows.append(row)
    return rows


def _pair_rows(every: "dict[int, Verdict]", texts: bool) -> list[dict[str, object]]:
    from ..store.verdicts import pairs

    return [
        {"day": _day(p.time), "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
        if texts
        else {
            "day": _day(p.time),
            "chosen characters": len(p.chosen),
            "rejected characters": len(p.rejected),
        }
        for p in pairs(every.values())
    ]


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).date().isoformat()
