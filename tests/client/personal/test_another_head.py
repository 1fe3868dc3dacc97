"""A worked example: another kind of personal head, through everything that uses one.

It takes three files: the head, its evaluator (both here), and a line of `evaluator_of` in
`client/personal/person_losses.py` (here a patch). This one guesses how long a person's texts are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.client.enrolled.participant import EnrolledContext
from privet.client.personal.evaluator import Evaluator
from privet.client.personal.head import PersonalHead, head_of_kind, number_of, pack, unpack
from privet.client.personal.kept_head import keep
from privet.client.personal.person_losses import Losses, evaluate_person, gains_block
from privet.client.personal.text_head import no_text_head
from privet.client.store import key_file
from privet.client.store.device_store import DeviceStore
from privet.client.store.key_file import Passphrase
from privet.client.training.local_training import Trainer
from privet.client.training.records import Tokenised
from privet.common.errors import StateError
from privet.common.model.adapter import shared

from ...tiny import WORDS, tiny_config

# --- the first file: the head --------------------------------------------------------------------


@dataclass(frozen=True)
class LengthHead:
    """By how many tokens a person's texts are longer than the shared model guesses."""

    longer: float = field(repr=False)

    @property
    def is_shared(self) -> bool:
        return self.longer == 0

    def to_bytes(self) -> bytes:
        return pack("length", {}, {"longer": repr(self.longer)})

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "LengthHead":
        _, facts = unpack("length", (), content, name)
        return cls(number_of(facts, "longer", name))


# --- the second file: its evaluator --------------------------------------------------------------

BASE, SHARED = 0.0, 5.0
"""What the two models guess of every text."""


@dataclass(frozen=True)
class LengthPerson:
    base: float
    head: LengthHead | None
    lengths: tuple[int, ...]

    def loss(self, head: PersonalHead | None) -> float:
        used = head_of_kind(LengthHead, head)
        return missed(self.lengths, SHARED + (0.0 if used is None else used.longer))


class LengthEvaluator:
    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> LengthPerson | None:
        if not held_out:
            return None
        lengths = tuple(len(record.ids) for record in held_out)
        head = None
        if own and fit:
            head = LengthHead(float(np.mean([len(record.ids) for record in own])) - SHARED)
        return LengthPerson(missed(lengths, BASE), head, lengths)


def missed(lengths: Sequence[int], guess: float) -> float:
    return float(np.mean(np.abs(np.array(lengths) - guess)))


# --- the third file: `evaluator_of` --------------------------------------------------------------


def length_evaluator_of(*_: Any, **__: Any) -> Evaluator:
    return LengthEvaluator()


# --- what uses it, and knows nothing of it -------------------------------------------------------


def texts(*lengths: int) -> list[Tokenised]:
    return [Tokenised(tuple(range(length))) for length in lengths]


def test_a_person_is_evaluated_with_it_and_another_persons_head_does_worse():
    losses = evaluate_person(LengthEvaluator, texts(9, 11), texts(10, 10), True)
    assert losses == Losses(10.0, 5.0, 0.0)
    assert gains_block(losses, 10.0).tolist() == [0.5, 0.5, 1.0]
    person = LengthEvaluator().person(texts(9, 11), texts(10, 10), True)
    other = LengthEvaluator().person(texts(3), texts(3), True)
    assert person is not None
    assert other is not None
    assert person.loss(other.head) > person.loss(None)


def test_at_the_end_of_a_run_it_is_kept_in_the_vault_and_opens_again(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(key_file, "_ARGON2ID", {"iterations": 1, "lanes": 1, "memory_kib": 1024})
    monkeypatch.setattr("privet.client.personal.kept_head.evaluator_of", length_evaluator_of)
    config = tiny_config(llama_folder, data={"source": "devices", "task": "generation"})
    trainer = Trainer.of(shared(config), 0, None)
    line = json.dumps({"user": "me", "text": " ".join(WORDS[:9])}) + "\n"
    with DeviceStore.create(tmp_path / "home", Passphrase("own")) as home:
        home.vault.put("records/own", 6 * line.encode())
        keep(EnrolledContext(home, "run", config, trainer, 0), home, "run", trainer.adapter.start)
        content, figures = home.vault.get("heads/run"), home.vault.get("measured/run")
    assert content is not None
    assert figures is not None
    head = LengthHead.from_bytes(content, "heads/run")
    assert head.longer > 0
    assert json.loads(figures)["personal"] < json.loads(figures)["shared"]


def test_other_heads_and_damage_are_refused_with_a_sentence():
    person = LengthEvaluator().person((), texts(4), True)
    assert person is not None
    with pytest.raises(TypeError, match="expected a LengthHead or None, got a TextHead"):
        person.loss(no_text_head(4))
    with pytest.raises(StateError, match="not a length head"):
        LengthHead.from_bytes(no_text_head(4).to_bytes(), "heads/run")
    with pytest.raises(StateError, match="heads/run is not a usable personal head"):
        LengthHead.from_bytes(LengthHead(1.5).to_bytes()[:-4], "heads/run")
