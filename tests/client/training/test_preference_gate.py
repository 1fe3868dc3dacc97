"""Preferences and the wire: a device's verdicts train, are measured and kept, and are not told."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord

from privet.client.app import app
from privet.client.consent.offer_description import describe
from privet.client.consent.run_offers import receive
from privet.client.device import Device
from privet.client.enrolled.participant import EnrolledContext
from privet.client.personal.kept_head import keep
from privet.client.personal.text_head import TextHead
from privet.client.simulated import SimulatedContext
from privet.client.store import key_file as unlock_module
from privet.client.store import verdicts as feedback
from privet.client.store.device_store import ME, DeviceStore
from privet.client.store.key_file import Passphrase
from privet.client.store.verdicts import Verdict
from privet.client.training.local_training import Trainer
from privet.client.training.records import Record, Tokenised
from privet.common.model.adapter import shared
from privet.common.settings.config import Config, to_toml
from privet.experiments.simulate import prepare

from ...common.model.test_dpo import pairs_of
from ...experiments.data.test_preference_people import people_who_love_words
from ...tiny import WORDS, tiny_config
from ..test_gate_of_a_device import asked, walk

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

DATA_SETS: dict[str, list[Tokenised]] = {
    "none": [],
    "one": pairs_of(1, seed=1),
    "fifty": pairs_of(50, seed=2),
    "fifty others": pairs_of(50, seed=3),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceStore]:
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)
    with DeviceStore.create(tmp_path / "home", Passphrase("own")) as made:
        made.vault.put("records/own", b'{"user": "me", "text": "a text of mine"}\n')
        yield made


def settings(base: Path, **changes: Any) -> Config:
    data = {"source": "devices", "task": "preference", "max_tokens": 24, "records_per_client": 40}
    return tiny_config(base, data={**data, "holdout": 0.3}, preference={"beta": 0.5}, **changes)


def verdicts(count: int) -> list[Verdict]:
    """The first of two words of each answer is loved."""
    rng = np.random.default_rng(0)
    found = []
    for time in range(count):
        one, other = (" ".join(map(str, rng.choice(WORDS[40:], 4))) for _ in range(2))
        found.append(Verdict("accept", WORDS[3], f"{WORDS[0]} {one}", over=other, time=time))
    return found


# --- what leaves --------------------------------------------------------------------------------


def fields_of_replies(folder: Path, tmp_path: Path, patch: Any, client: Any) -> list[Any]:
    seen, vectors = [], []
    for name, private in DATA_SETS.items():
        copy = Path(shutil.copytree(folder, tmp_path / name))
        with patch.context() as patched:
            patched.setattr(Device, "records", lambda _, private=private: private)
            reply = asked(copy, client)
        seen.append(dict(walk(reply)))
        vectors.append(bytes(reply.content["reply"]["vector"]))
    assert len(set(vectors)) >= 3
    return seen


def test_replies_on_different_pairs_differ_in_nothing_but_the_vector(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    privacy = {"client": {"noise_at": "device"}}
    people = people_who_love_words(tmp_path / "people")
    config = tiny_config(llama_folder, people, privacy=privacy)
    prepare(config, tmp_path / "run", resume=False)
    assert SimulatedContext.open(tmp_path / "run").trainer.pairs is not None
    seen = fields_of_replies(tmp_path / "run", tmp_path / "good", monkeypatch, app)
    assert all(fields == seen[0] for fields in seen)

    def telling(message: Any, context: Any) -> Any:
        reply = app(message, context)
        folder = Path(str(context.run_config["run"]))
        count = len(SimulatedContext.open(folder).device(0).records())
        reply.content["accuracy"] = MetricRecord({"pairs": count})
        return reply

    with pytest.raises(AssertionError, match="no part of the protocol"):
        fields_of_replies(tmp_path / "run", tmp_path / "bad", monkeypatch, telling)


# --- a person's own device ----------------------------------------------------------------------


def test_a_run_on_preferences_reads_verdicts_and_any_other_run_reads_none(
    home: DeviceStore, llama_folder: Path
):
    feedback.add(home, verdicts(3))
    asks: Any = None
    pairs = EnrolledContext(home, "run", settings(llama_folder), asks, 0).records(ME)
    assert [record.rejected is not None for record in pairs] == [True] * 3
    other = settings(llama_folder).model_copy(update={"data": tiny_config(llama_folder).data})
    texts = EnrolledContext(home, "run", other, asks, 0).records(ME)
    assert texts == [Record("a text of mine")]


def test_at_the_end_of_a_run_the_personal_part_of_the_verdicts_is_kept_in_the_vault(
    home: DeviceStore, llama_folder: Path
):
    feedback.add(home, verdicts(60))
    config = settings(llama_folder, evaluation={"fit_records": 50, "records": 20})
    trainer = Trainer.of(shared(config), 0, config.pairs)
    keep(EnrolledContext(home, "run", config, trainer, 0), home, "run", trainer.adapter.start)
    head = home.vault.get("heads/run")
    assert head is not None
    fitted = TextHead.from_bytes(head, "heads/run")
    bias = dict(zip(fitted.tokens.tolist(), fitted.bias.tolist(), strict=True))
    assert max(bias, key=bias.__getitem__) == 6  # the loved word
    assert home.vault.get("measured/run") is not None


def test_the_owner_is_told_that_a_run_learns_from_verdicts(home: DeviceStore, llama_folder: Path):
    offer = receive("run", "server:1", to_toml(settings(llama_folder)), 1.0)
    said = " ".join(text for _, text in describe(offer, home.policy))
    assert "from your verdicts (privet client feedback)" in said
    plain = tiny_config(llama_folder, data={"source": "devices", "task": "generation"})
    offer = receive("run", "server:1", to_toml(plain), 1.0)
    assert "verdicts" not in " ".join(t for _, t in describe(offer, home.policy))
