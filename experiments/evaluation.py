"""What people got: everybody's loss under four models, from the simulated devices' own files.

The experimenter reads this off the simulated devices; nothing of it passes the server, and no
epsilon covers it. On a real device the same functions run and the figures stay there.

    base          the base model, no adapter (labels: every prediction 0)
    global        the shared adapter of the run
    personal      the shared adapter and the head fitted on the person's own earlier records
    swapped_head  the shared adapter and somebody else's head: the gain must be lost

*seen* people took part in training and are measured on later records; *unseen* people were never
trained on. Both fit their head on their own earlier records. Where people come in groups (raters
of one batch), the other head is that of somebody of the same group, fitted on the same items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..client import data
from ..client.device import Bench
from ..client.label_head import LabelHead, fit_label_head, label_losses
from ..client.text_head import TokenStates, fit_text_head, shared_scores, token_losses
from ..common.adapter import Adapter, Vector
from ..common.config import Config
from ..common.errors import StateError
from ..common.models import final_states, pad, prefix_states, resumed_at
from ..common.objective import pooled
from ..server import checkpoint
from . import progress

__all__ = ["evaluate", "global_adapter"]

Losses = dict[str, list[Any]]

MODELS = ("base", "global", "personal", "swapped_head")


def evaluate(folder: Path, config: Config) -> dict[str, Any]:
    """Losses per person: `{"name", "unit", "metrics_of", "seen": {...}, "unseen": {...}}`.

    Each group has the lists `users`, `base`, `global`, `personal` and `swapped_head`, aligned;
    lower is better. Everybody's loss is the mean over their own held-out tokens or records.
    """
    bench = Bench.open(folder.resolve())
    final = global_adapter(folder)
    took_part = [u for u in bench.index.train_users if bench.ledger.participations(u)]
    groups = {
        "seen": _some(took_part, bench.index, config),
        "unseen": _some(bench.index.test_users, bench.index, config),
    }
    measure = _Texts if config.outputs == 0 else _Labels
    with progress.counting("measuring", sum(map(len, groups.values())), "people") as one:
        model = measure(bench, final)
        found = {
            name: _measure(model, bench.index, users, _heads_for(config, name), one)
            for name, users in groups.items()
        }
    unit = "nats per token" if config.outputs == 0 else "squared error"
    if config.data.task == "classification":
        unit = "nats per record"
    described = {"name": unit, "unit": "a loss: lower is better"}
    return {**described, "metrics_of": config.evaluation.metrics_of, **found}


def global_adapter(folder: Path) -> Vector:
    """The shared adapter after the last finished round of the run in `folder`.

    Raises:
        StateError: no round was finished.
    """
    bench = Bench.open(folder.resolve())
    layout = bench.trainer.adapter.layout.digest
    kept = checkpoint.load(folder, run=bench.run, config_hash=bench.config.digest, layout=layout)
    if kept is None:
        raise StateError(f"{folder} has no finished round yet; go on with privet simulate --resume")
    if kept.note:
        progress.warn(kept.note)
    return kept.adapter


class _Measure(Protocol):
    def person(self, user: str, fit: bool) -> "_Person | None":
        """Prepare one person, and fit the head; None for somebody with nothing held out."""

    def loss(self, person: "_Person", head: Any) -> float:
        """Mean loss on the person's held-out records; head None: the shared model."""


@dataclass(frozen=True, eq=False)
class _Person:
    """One person's held-out material under the shared model, and the head they fitted."""

    base: float
    held_out: Any
    head: Any


def _heads_for(config: Config, group: str) -> bool:
    """Heads for texts cost as much as all the rest, so only the group that is asked about."""
    return config.head.enabled and (config.outputs > 0 or group == config.evaluation.metrics_of)


def _measure(
    measure: _Measure, index: data.Index, users: Sequence[str], heads: bool, one: Any
) -> Losses:
    models = MODELS if heads else MODELS[:2]
    losses: Losses = {name: [] for name in ("users", *models)}
    people = {}
    for user in users:
        if (person := measure.person(user, heads)) is not None:
            people[user] = person
        one()
    names = list(people)
    for number, (user, person) in enumerate(people.items()):
        losses["users"].append(user)
        losses["base"].append(person.base)
        losses["global"].append(measure.loss(person, None))
        if not heads:
            continue
        other = people[_partner(index, names, number)]
        losses["personal"].append(measure.loss(person, person.head))
        losses["swapped_head"].append(measure.loss(person, other.head))
    return losses


def _partner(index: data.Index, users: Sequence[str], number: int) -> str:
    """The next person, of the same group where there are groups."""
    group = index.blocks[users[number]].group
    following = [users[(number + step) % len(users)] for step in range(1, len(users) + 1)]
    same = [user for user in following if index.blocks[user].group == group]
    return (same or following)[0]


class _Texts:
    """Generation: nats per token; the frozen prefix is computed once for base and global."""

    def __init__(self, bench: Bench, final: Vector) -> None:
        self.bench, self.final = bench, final
        self.adapter: Adapter = bench.trainer.adapter
        self.output = self.adapter.base.output.detach()

    def person(self, user: str, fit: bool) -> _Person | None:
        own, held_out = _records(self.bench, user)
        if not held_out:
            return None
        base, shared = self._states(held_out, (self.adapter.start, self.final))
        base_scores = shared_scores(base, self.output)
        base_loss = token_losses(None, base, self.output, base_scores).mean()
        head = None
        if own and fit:
            (mine,) = self._states(own, (self.final,))
            head = fit_text_head(mine, self.output)
        scores = shared_scores(shared, self.output)
        return _Person(float(base_loss), (shared, scores), head)

    def loss(self, person: _Person, head: Any) -> float:
        states, scores = person.held_out
        return float(token_losses(head, states, self.output, scores).mean())

    @torch.no_grad()
    def _states(
        self, records: Sequence[data.Tokenised], vectors: Sequence[Vector]
    ) -> list[TokenStates]:
        """Final states of the records under each adapter."""
        base, first = self.adapter.base, self.adapter.first_block
        ids, mask = pad([record.ids for record in records])
        wanted = mask[:, 1:].bool()
        targets, record = ids[:, 1:][wanted], torch.nonzero(wanted)[:, 0]
        prefix = prefix_states(base, first, ids, mask)
        found = []
        for vector in vectors:
            self.adapter.write(vector)
            with resumed_at(base, first, prefix):
                states = final_states(base, ids, mask)[:, :-1][wanted]
            found.append(TokenStates(states, targets, record))
        return found


class _Labels:
    """Labels: squared error or nats; features of the same text are computed once."""

    def __init__(self, bench: Bench, final: Vector) -> None:
        self.bench, self.adapter = bench, bench.trainer.adapter
        self.adapter.write(final)
        head = self.adapter.head
        if head is None:
            raise ValueError("a labelled task without a head")
        task = "regression" if self.bench.config.outputs == 1 else "classification"
        weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
        self.shared = LabelHead(weight, bias, task)  # type: ignore[arg-type]
        self.nothing = LabelHead(torch.zeros_like(weight), torch.zeros_like(bias), task)  # type: ignore[arg-type]
        self.known: dict[tuple[int, ...], Tensor] = {}

    def person(self, user: str, fit: bool) -> _Person | None:
        own, held_out = _records(self.bench, user)
        if not held_out:
            return None
        features, labels = self._features(held_out)
        base = float(label_losses(self.nothing, features, labels).mean())
        head = None
        if own and fit:
            head = fit_label_head(*self._features(own), self.shared)
        return _Person(base, (features, labels), head)

    def loss(self, person: _Person, head: Any) -> float:
        return float(label_losses(head or self.shared, *person.held_out).mean())

    @torch.no_grad()
    def _features(self, records: Sequence[data.Tokenised]) -> tuple[Tensor, Tensor]:
        base = self.adapter.base
        new = [r.ids for r in records if r.ids not in self.known]
        if new:
            ids, mask = pad(new)
            found = pooled(base, final_states(base, ids, mask), mask)
            self.known.update(zip(new, found, strict=True))
        labels = torch.tensor([float(r.label or 0.0) for r in records])
        return torch.stack([self.known[r.ids] for r in records]), labels


def _records(bench: Bench, user: str) -> tuple[Sequence[data.Tokenised], Sequence[data.Tokenised]]:
    """The person's latest own records for the head, and the first ones held out."""
    limits = bench.config.evaluation
    own, held_out = data.split(
        data.read_user(bench.folder, user, bench.index), bench.config.data.holdout
    )
    return bench.tokenised(own[-limits.fit_records :]), bench.tokenised(held_out[: limits.records])


def _some(users: Sequence[str], index: data.Index, config: Config) -> list[str]:
    """`evaluation.users` of them, drawn by public seed; whole groups where there are groups."""
    rng = np.random.default_rng(config.data.seed)
    groups = [index.blocks[user].group or user for user in users]
    place = {group: i for i, group in enumerate(rng.permutation(sorted(set(groups))))}
    order = sorted(range(len(users)), key=lambda i: (place[groups[i]], i))
    return [users[i] for i in order[: config.evaluation.users]]
