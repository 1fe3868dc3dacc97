"""Who takes part and what they wrote: sources -> a population -> a population folder.

`load` finds the people of a source and draws who trains and who is only tested; `write` lays
their records down as the blocks that `client/training/records.py` reads, one person in memory at a
time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from ...client.training.records import INDEX_FILE, RECORDS_FILE, SCHEMA, Record, Task
from ...common.errors import ConfigError, DataError
from ...common.files import explain_os_errors, write_atomic
from ...common.model.assets import fetch
from .record_sources import DataSource, SourceUser, folder_source, jsonl_source, source_of_texts

__all__ = ["Population", "choose", "load", "open_source", "write"]

Item = TypeVar("Item")
BUILT_IN = ("shakespeare", "ratings", "changelogs", "dialects", "preferences", "tastes")


@dataclass(frozen=True)
class Population:
    """The people of one experiment, drawn from a source.

    Attributes:
        train_users, test_users: disjoint, and of disjoint groups where the source has groups;
            in the source's order. Nobody in `test_users` is ever trained on.
        groups: user -> group, for those who have one.
        task: "generation" without labels, "regression" for numbers, "classification" for names,
            "preference" for pairs of answers.
        classes: the names of all labels, sorted; None unless classification.
    """

    name: str
    train_users: tuple[str, ...] = field(repr=False)
    test_users: tuple[str, ...] = field(repr=False)
    groups: dict[str, str] = field(repr=False)
    task: Task
    classes: tuple[str, ...] | None
    read: Callable[[str], tuple[Record, ...]] = field(repr=False)

    @property
    def users(self) -> tuple[str, ...]:
        """All users, sorted by name."""
        return tuple(sorted(self.train_users + self.test_users))


def load(
    source: str | Path,
    *,
    clients: int | None,
    test_clients: int,
    min_records: int,
    seed: int,
) -> Population:
    """Find a source's people and draw who trains and who is only tested.

    Args:
        source: a name of `BUILT_IN`, a .jsonl file, or a folder with a file or a sub-folder
            per user (.txt and .md split at blank lines, .jsonl).
        clients: how many train; None for all who are left.
        test_clients: how many are only tested.
        min_records: people with fewer are left out.
        seed: public; the same seed draws the same people.

    Raises:
        DataError: see `open_source`; or fewer people than asked for (names the numbers).
        ConfigError: a number out of range.
        AssetError: a built-in source that cannot be fetched.
    """
    found = open_source(source, seed)
    return choose(
        found, clients=clients, test_clients=test_clients, min_records=min_records, seed=seed
    )


def open_source(source: str | Path, seed: int) -> DataSource:
    """Open a source by its name, to know everybody it has.

    See `load` for what a source can be.

    Raises:
        DataError: missing or unreadable; nobody in it; a line that is not a record (names file
            and line); labels or times of two kinds; one user under two names of a folder.
    """
    if source in BUILT_IN:
        return _built_in(str(source), seed)
    path = Path(source)
    if path.is_dir():
        return folder_source(path)
    if path.suffix == ".jsonl" or path.exists():
        return jsonl_source(path)
    raise DataError(
        f"No data at {str(source)!r}: expected {', '.join(BUILT_IN)}, a .jsonl file, or a "
        f"folder with a file or a sub-folder per user."
    )


def _built_in(name: str, seed: int) -> DataSource:
    """Open one of the sources that come with privet; the others are not even loaded."""
    if name == "shakespeare":
        from .shakespeare import read_plays

        return source_of_texts(name, read_plays(fetch("shakespeare")))
    if name == "changelogs":
        from .changelogs import read_changelogs

        return source_of_texts(name, read_changelogs())
    if name == "ratings":
        from .ratings import ratings_source

        return ratings_source(fetch("ratings"), seed)
    if name == "dialects":
        from .dialects import dialects_source

        return dialects_source(seed)
    from .preference_people import pairs_of_ratings, tastes

    return tastes(seed) if name == "tastes" else pairs_of_ratings(fetch("ratings"), seed)


def choose(
    source: DataSource, *, clients: int | None, test_clients: int, min_records: int, seed: int
) -> Population:
    """Draw test users, then train users from the groups that are left.

    Both draws are spread over the source's own order (one at random from each of equal runs of
    it), so both see the same mix: of plays, or of the ratings' polarity-sorted batches. Where
    people have groups, whole groups go to the test side.

    Raises:
        DataError: fewer people than asked for, with the numbers.
        ConfigError: clients < 1, test_clients < 0 or min_records < 1.
    """
    _check_numbers(clients, test_clients, min_records)
    rng = np.random.default_rng(seed)
    able = [person for person in source.people if person.records >= min_records]
    aside = _test_side(able, test_clients, rng)
    tested = [person for person in able if _group(person) in aside]
    left = [person for person in able if _group(person) not in aside]
    wanted = len(left) if clients is None else clients
    if len(tested) < test_clients or len(left) < max(wanted, 1):
        raise DataError(
            f"{source.name} has {len(able)} of {len(source.people)} users with at least "
            f"{min_records} records: {len(tested)} on the test side where {test_clients} were "
            f"asked for, {len(left)} left to train where {max(wanted, 1)} were asked for. Ask "
            f"for fewer, or lower min_records."
        )
    train, test = _spread(left, wanted, rng), _spread(tested, test_clients, rng)
    return Population(
        name=source.name,
        train_users=tuple(person.user for person in train),
        test_users=tuple(person.user for person in test),
        groups={p.user: p.group for p in (*train, *test) if p.group is not None},
        task=source.task,
        classes=source.classes,
        read=source.read,
    )


def write(population: Population, folder: str | Path) -> None:
    """Write `population.jsonl` and `population.json` into a folder.

    `client/training/records.py` has the format.

    Blocks are in the order of the users' names, records earliest first, one user in memory at a
    time. Each file is whole or not there; the index goes first and comes last, so a crash leaves
    no index that describes other bytes.

    Raises:
        StateError: the folder cannot be written (full, read-only).
        DataError: a user's records cannot be read any more, or hold none.
    """
    folder = Path(folder)
    with explain_os_errors(folder, "write the population to"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
    blocks: dict[str, tuple[int, int, str | None]] = {}
    digest = hashlib.sha256()
    write_atomic(folder / RECORDS_FILE, _blocks(population, blocks, digest.update))
    index = {
        "schema": SCHEMA,
        "name": population.name,
        "task": population.task,
        "classes": population.classes,
        "train_users": population.train_users,
        "test_users": population.test_users,
        "sha256": digest.hexdigest(),
        "bytes": sum(length for _, length, _ in blocks.values()),
        "users": blocks,
    }
    write_atomic(folder / INDEX_FILE, json.dumps(index, ensure_ascii=False, indent=1).encode())


def _blocks(
    population: Population,
    places: dict[str, tuple[int, int, str | None]],
    count: Callable[[bytes], None],
) -> Iterator[bytes]:
    """Yield every user's records, and note where they lie: offset, length and group."""
    offset = 0
    for user in population.users:
        group = population.groups.get(user)
        block = b"".join(_line(user, group, record) for record in population.read(user))
        if not block:
            raise DataError(f"User {user!r} of {population.name} has no records any more.")
        places[user] = (offset, len(block), group)
        offset += len(block)
        count(block)
        yield block


def _line(user: str, group: str | None, record: Record) -> bytes:
    fields: dict[str, object] = {"user": user, "text": record.text}
    extra = {"label": record.label, "time": record.time, "group": group}
    if record.rejected is not None:
        extra |= {"prompt": record.prompt, "rejected": record.rejected}
    fields |= {key: value for key, value in extra.items() if value is not None}
    return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


# --- drawing -----------------------------------------------------------------------------------


def _check_numbers(clients: int | None, test_clients: int, min_records: int) -> None:
    for name, value, least in (
        ("clients", clients, 1),
        ("test_clients", test_clients, 0),
        ("min_records", min_records, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}; it is {value}.")


def _group(person: SourceUser) -> tuple[bool, str]:
    """Return a person's group, or the person alone.

    The flag keeps a group from being taken for a user.
    """
    return (False, person.user) if person.group is None else (True, person.group)


def _spread(items: Sequence[Item], count: int, rng: np.random.Generator) -> list[Item]:
    """Draw one item at random from each of `count` equal consecutive runs.

    All are different.
    """
    edges = [len(items) * run // max(count, 1) for run in range(count + 1)]
    return [items[int(rng.integers(low, high))] for low, high in pairwise(edges)]


def _test_side(
    able: Sequence[SourceUser], test_clients: int, rng: np.random.Generator
) -> set[tuple[bool, str]]:
    """Groups, spread over the source's order, that hold at least `test_clients` people.

    As few as that takes: a group on the test side is lost to training.
    """
    sizes: dict[tuple[bool, str], int] = {}
    for person in able:
        sizes[_group(person)] = sizes.get(_group(person), 0) + 1
    names, largest = list(sizes), max(sizes.values(), default=1)
    drawn: list[tuple[bool, str]] = []
    missing = test_clients
    while missing > 0 and len(drawn) < len(names):
        count = min(len(names), len(drawn) + -(-missing // largest))
        drawn = _spread(names, count, rng)
        missing = test_clients - sum(sizes[name] for name in drawn)
    return set(drawn)
