"""A void round: who is missing and what the server knows of why, who is asked next, and when.

A round is void where too few answered; it does not count towards `rounds.count`, and is asked
again. Where nobody can have released under masks it keeps its number: a device that answered
without masks sends the same bytes again at no cost (`client/device.py`). Otherwise its number is
used up, because no device masks the same contribution twice; those who had released may answer the
next number afresh, and pay again, as often as their owner allows (`Config.max_releases`).

**Guarantee**: what is written down here is what the server saw of the wire: who was asked, who
declined, who was silent, whose bytes it could not use. Why a device declines stays on it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..common.settings.config import Config
from ..common.settings.sections import DEVICES
from .round_record import Missing, RoundRecord

__all__ = ["Seen", "cohort_of", "needed", "round_line", "sentence", "trained", "wait_s"]

FIRST_WAIT_S = 1.0
MAX_NAMED = 6


@dataclass(frozen=True, eq=False)
class Seen:
    """What the server sees of one attempt, phase by phase."""

    asked: dict[str, set[int]] = field(default_factory=dict)
    answered: dict[str, set[int]] = field(default_factory=dict)
    declined: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def watch(self, ask: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        """Wrap `ask` so that everything that passes is written down."""

        def watched(phase: str, messages: Mapping[int, bytes], *more: Any) -> Iterator[Any]:
            self.asked[phase] = set(messages)
            here = self.answered.setdefault(phase, set())
            for reply in ask(phase, messages, *more):
                if reply.payload is None:
                    self.declined[reply.client] = phase
                else:
                    here.add(reply.client)
                yield reply

        return watched

    @property
    def released(self) -> bool:
        """Whether somebody may have released: asked for a masked vector, or answered without."""
        return bool(self.asked.get("vector") or self.answered.get("round"))

    def facts(self, masked: bool, unsure: bool) -> RoundRecord:
        """What the record of a void attempt says of who came, what it cost, and what is next.

        `unsure`: whether somebody may have released without this process knowing.
        """
        spent = self.released or unsure
        return {"missing": self.missing, "spent": spent, "again": not (masked and spent)}

    @property
    def missing(self) -> Missing:
        """Clients whose answers are missing: `declined`, `silent` and `refused`.

        The first two have by phase whose numbers, the last has by number why.
        """
        declined: dict[str, list[int]] = {}
        for client, phase in sorted(self.declined.items()):
            declined.setdefault(phase, []).append(client)
        silent = {
            phase: sorted(asked - self.answered[phase] - set(self.declined))
            for phase, asked in self.asked.items()
        }
        return {
            "declined": declined,
            "silent": {phase: clients for phase, clients in silent.items() if clients},
            "refused": {str(client): why for client, why in sorted(self.refused.items())},
        }


def needed(config: Config, asked: int, survivors: int) -> int:
    """Return how many answers a round needs, of so many asked, not to be void.

    `survivors` is that of the plan.
    """
    quorum = int(np.ceil(config.rounds.quorum * asked - 1e-9))
    return max(quorum, survivors, 1)


def trained(records: Sequence[RoundRecord]) -> int:
    """Rounds, or looks, that were opened: what counts towards `rounds.count`."""
    return sum(not record["void"] for record in records)


def repeats(records: Sequence[RoundRecord], number: int) -> list[RoundRecord]:
    """The void attempts of a round that is still to be asked under this number."""
    return [record for record in records if record["round"] == number and record.get("again")]


def cohort_of(
    there: Sequence[int],
    drawn: Sequence[int],
    records: Sequence[RoundRecord],
    number: int,
    seed: int,
) -> list[int]:
    """Choose who is asked, ascending: those drawn, and in a repeat first those who had come along.

    Args:
        there: who is present.
        drawn: by the public draw; used where the round is asked for the first time.
        records: of the run so far.
        number, seed: of the public draw.

    Those who declined, were silent or did not fit are asked last: somebody else may take part,
    and first who has come in the fewest rounds, and so has paid least.
    """
    before = repeats(records, number)
    if not before:
        return list(drawn)
    asked = {client for record in before for client in record["who"]["asked"]}
    absent = set[int]()
    for record in before:
        missing = record["missing"]
        phases = (*missing["declined"].values(), *missing["silent"].values())
        absent |= {client for clients in phases for client in clients}
        absent |= {int(client) for client in missing["refused"]}
    # a round that was asked again under its number is paid once
    came = {
        (record["round"], n) for record in records if "who" in record for n in record["who"]["came"]
    }
    paid = Counter(n for other, n in came if other != number)
    order = np.random.default_rng([seed, number, len(before)]).permutation(len(there))
    mixed = [there[int(index)] for index in order]
    ranked = sorted(mixed, key=lambda n: (2 if n in absent else int(n not in asked), paid[n]))
    return sorted(ranked[: len(drawn)])


def wait_s(config: Config, voids: int) -> float:
    """Return the wait before a round is asked again after so many void attempts in a row.

    It is 1, 2, 4 ... s, capped.

    None in a simulation: nobody comes by waiting.
    """
    if config.data.source != DEVICES:
        return 0.0
    return min(FIRST_WAIT_S * 2.0 ** min(voids - 1, 60), config.rounds.wait_s)


def round_line(
    record: RoundRecord, count: int, names: Mapping[int, str] | None = None, results: str = ""
) -> str:
    """Show a round's record as `round 3/8  6 asked  5 answered  1 declined  3.2 s`.

    Of a void attempt the line also says who is missing and why.

    Args:
        record: of the round.
        count: rounds there are to be.
        names: of devices, where somebody knows them.
        results: what else is to be said of a round that is not void.
    """
    of = f"/{count}" if record["round"] <= count else ""  # a void round may use up its number
    parts = [f"round {record['round']}{of}"]
    parts += [f"{record['asked']} asked", f"{record['answered']} answered"]
    parts += [f"{record['declined']} declined"]
    if record.get("refused"):
        parts.append(f"{record['refused']} did not fit")
    if record["void"]:
        parts.append(record.get("why") or sentence(record, names))
    elif results:
        parts.append(results)
    if "seconds" in record:
        parts.append(f"{record['seconds']:.1f} s")
    return "  ".join(parts)


def sentence(record: RoundRecord, names: Mapping[int, str] | None = None) -> str:
    """Who is missing from a void round, what is known of why, what it cost, what comes next."""
    missing, names = record.get("missing"), names or {}
    if missing is None:  # of a run that an older privet began
        return "void: too few, nothing was revealed"
    parts = []
    kinds = {"declined (why stays on them)": missing["declined"], "no answer": missing["silent"]}
    for label, phases in kinds.items():
        for phase, clients in phases.items():
            where = "" if phase == "round" else f" [{phase}]"
            parts.append(f"{len(clients)} {label}{where}: {_named(clients, names)}")
    if missing["refused"]:
        parts.append(
            f"{len(missing['refused'])} did not fit: {_reasons(missing['refused'], names)}"
        )
    if not record["asked"]:
        parts.append("nobody was there to be asked")
    cost = "nothing was spent"
    if record["spent"]:
        cost = "what was released stays spent"
        if record["again"]:
            cost += ", and is sent again at no cost"
    wait = record.get("wait_s")
    after = "" if wait is None else f"; asked again in {wait:g} s" if wait else "; asked again"
    return (
        f"void, {record['attempt']} in a row: {record['answered']} came of {record['needed']} "
        f"needed; {'; '.join(parts) or 'too few were asked'}; {cost}{after}"
    )


def _named(clients: Sequence[int], names: Mapping[int, str]) -> str:
    shown = [f"{n} ({names[n]})" if names.get(n) else str(n) for n in clients[:MAX_NAMED]]
    more = len(clients) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _reasons(refused: Mapping[str, str], names: Mapping[int, str]) -> str:
    shown = [f"{_named([int(client)], names)} ({why})" for client, why in list(refused.items())[:2]]
    more = len(refused) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
