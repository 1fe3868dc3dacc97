"""run_offers.py: what a run asks for is said before its first round; a yes is bound to it."""

import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.consent.offer_description import (
    DeviceState,
    describe,
    limiting_budget,
    refuse_partial_run,
    release_cost,
)
from privet.client.consent.policy_settings import Policy
from privet.client.consent.run_offers import (
    Consent,
    Offer,
    agree,
    changes,
    receive,
    refuse_without_consent,
    restore,
    store,
)
from privet.client.privacy.gate import charges
from privet.common.errors import PrivacyError, ProtocolError, StateError
from privet.common.privacy.accounting import Charge
from privet.common.privacy.plan_maker import make_plan
from privet.common.settings.config import Config, parse, to_toml

SERVER = "fl.example.org:9092"
NOW = 1_700_000_000.0


def run(**sections: Any) -> Config:
    table: dict[str, Any] = {"data": {"clients": 16}, "rounds": {"cohort": 16}}
    table["privacy"] = {"client": {"noise_at": "distributed"}}
    return parse({**table, **sections})


def offered(config: Config | None = None, run_id: str = "run-1", server: str = SERVER) -> Offer:
    return receive(run_id, server, to_toml(config or run()), NOW)


def said(
    offer: Offer, policy: Policy | None = None, dimension: int | None = None, **device: Any
) -> dict[str, str]:
    rows = describe(offer, policy or Policy(), DeviceState(**device), dimension=dimension)
    found: dict[str, str] = {}
    for label, text in rows:
        found[label] = "\n".join(filter(None, [found.get(label), text]))
    return found


def client_level(**client: Any) -> Config:
    """Client level only: its accounting takes no time."""
    settings = {"noise_at": "distributed", **client}
    return run(privacy={"client": settings, "example": {"enabled": False}})


# --- the digest and the consent -----------------------------------------------------------------


def test_a_consent_is_bound_to_run_server_and_every_setting():
    offer = offered()
    consent = agree(offer, Policy(), "owner", NOW)
    refuse_without_consent(offer, consent)
    refuse_without_consent(receive("run-1", SERVER, "# again\n" + offer.text, NOW + 9), consent)
    others = [
        offered(run_id="run-2"),
        offered(server="other:1"),
        offered(run(name="other")),
        offered(run(speed={"threads": 1})),
        offered(run(rounds={"cohort": 16, "count": 5})),
        offered(run(training={"learning_rate": 0.9})),
    ]
    assert len({offer.digest, *(other.digest for other in others)}) == 7
    for other in others:
        with pytest.raises(PrivacyError, match="is not what you agreed to"):
            refuse_without_consent(other, consent)
    with pytest.raises(PrivacyError, match="waits for your yes"):
        refuse_without_consent(offer, None)


def test_an_offer_with_keys_of_before_is_understood_without_a_word_to_its_owner():
    offer = Offer("run-1", SERVER, 0.0, "[masking]\nsmallest_cohort = 12\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert offer.config.secure_aggregation.min_cohort == 12


def test_a_digest_of_the_run_id_alone_would_have_let_the_server_change_the_noise():
    def faulty(offer: Offer) -> str:
        return offer.run

    before, after = offered(), offered(client_level(noise_multiplier=0.1))
    assert faulty(before) == faulty(after)
    with pytest.raises(PrivacyError, match="changed since"):
        refuse_without_consent(after, agree(before, Policy(), "owner", NOW))
    assert changes(before, after) == [
        "privacy.client.noise_multiplier: 1.0 -> 0.1",
        "privacy.example.enabled: True -> False",
    ]
    assert changes(before, before) == []


def test_nobodys_yes_goes_past_the_policy():
    lax = offered(run(training={"steps": 99}))
    for how in ("owner", "policy"):
        with pytest.raises(PrivacyError, match=r"limits\.max_steps"):
            agree(lax, Policy(), how, NOW)
    with pytest.raises(PrivacyError, match="waits for your yes"):
        agree(offered(), Policy(), "policy", NOW)
    silent = Policy.model_validate({"consent": {"ask": False}})
    assert agree(offered(), silent, "policy", NOW).how == "policy"


# --- what is shown ------------------------------------------------------------------------------


def test_a_run_is_told_in_plain_words():
    found = said(offered(run(rounds={"cohort": 16, "count": 1})))
    assert found["run"] == "run-1"
    assert found["received"] == "2023-11-14 22:13 UTC"
    assert found["adapter"] == "lora_xs, rank 4, in the last 12 blocks"
    assert "3 at most, should rounds come to nothing" in found["rounds"]
    assert "opened from 10 devices on, and holds if at most 2" in found["rounds"]
    assert "1 training steps of about 8 records" in found["work"]
    assert "noise of 1 times that; each device adds a share" in found["noise"]
    client, example = found["epsilon, client-level"], found["epsilon, example-level"]
    assert "all your records together, against the server: about 4.38 after 1 release" in client
    assert "at delta = 1e-05 (add_remove: hidden is whether it was there at all)" in client
    assert "your budget over all runs 10; that is if the masks hold: closed directory, at" in client
    assert "should they fail, about 15.46 after 1 release" in client
    assert "should the masks fail: about 7.96 after 1 release" in example
    assert found["statistics"] == "none"
    assert found["policy"] == "inside the limits of policy.toml"


def test_the_most_releases_the_budget_allows_are_said_from_the_ledger_on():
    free = Policy.model_validate({"limits": {"min_example_noise": 0.0}})
    config = client_level().model_copy(
        update={"rounds": run().rounds.model_copy(update={"count": 9})}
    )
    label = "epsilon, client-level"
    text = said(offered(config), free)[label]
    assert "about 4.38 after 1 release, no bound after 9, no bound after 11, at delta" in text
    assert "budget over all runs 10; your budget ends it after about 4" in text
    spent = [Charge("client", who, "add_remove", 1.0) for who in ("analyst", "server")] * 3
    text = said(offered(config), free, spent=spent)[label]
    assert "of which about 8.39 is spent; your budget ends it after about 1" in text
    text = said(offered(config), free, spent=spent * 2)[label]
    assert "your budget does not allow a single one" in text
    poor = free.model_copy(update={"budget": free.budget.model_copy(update={"client": 1.0})})
    assert (
        "budget over all runs 1; your budget does not allow" in said(offered(config), poor)[label]
    )


def test_a_runs_own_cap_is_named_as_the_runs_and_counts_this_run_alone():
    generous = Policy.model_validate(
        {"limits": {"min_example_noise": 0.0}, "budget": {"client": 60.0}}
    )
    config = run(
        rounds={"cohort": 16, "count": 4},
        privacy={
            "client": {"noise_at": "distributed"},
            "example": {"enabled": False},
            "budget": {"client": 9.0},
        },
    )
    offer, label = offered(config), "epsilon, client-level"
    other = [Charge("client", who, "add_remove", 1.0) for who in ("analyst", "server")]
    text = said(offer, generous, spent=other)[label]
    assert "over all runs 60, of which about 4.38 is spent; the run's own cap 9; " in text
    assert "the run's own cap ends it after about 3" in text
    text = said(offer, generous, spent=other * 4, in_run=[other, other])[label]
    assert "the run's own cap 9, of which about 6.58 is spent; the run's own cap ends it" in text
    found = limiting_budget(offer, generous, DeviceState(spent=other))
    assert found is not None
    assert (found.rounds, found.of, found.limit.of_run) == (3, 4, True)
    with pytest.raises(PrivacyError, match=r"cap privacy.budget.client = 9 allows 3 of 4 rounds"):
        refuse_partial_run(offer.run, found, partly=False)
    refuse_partial_run(offer.run, found, partly=True)
    device = DeviceState(spent=other * 4)
    assert limiting_budget(offered(client_level()), generous, device) is None


def test_a_refused_run_says_every_reason():
    config = client_level(noise_at="server", noise_multiplier=0.5)
    found = said(offered(config))
    assert len(found["refused"].splitlines()) == 3
    assert "policy" not in found
    assert "reads your clipped contribution before that" in found["noise"]
    assert "and the server:" not in found["epsilon, client-level"]


def test_a_run_without_noise_has_no_number_and_is_declined():
    off = {"enabled": False}
    text = said(offered(run(privacy={"client": off, "example": off})))["epsilon, client-level"]
    assert "no bound at all" in text
    assert "declines every round" in text


def test_a_test_seed_is_said_first():
    rows = describe(offered(client_level().model_copy(update={"insecure_test_seed": 1})), Policy())
    assert rows[0][0] == "NOT PRIVATE"


def test_a_server_cannot_draw_on_the_terminal():
    evil = "model\x1b[2J\u202e\npolicy: inside the limits"
    config = client_level().model_copy(update={"model": parse({"model": {"base": evil}}).model})
    for label, text in describe(offered(config), Policy(), dimension=12):
        assert all(one.isprintable() for one in text), label
    assert said(offered(config), dimension=1234)["adapter"].endswith("1,234 numbers")


# --- the expected cost ---------------------------------------------------------------------------


@pytest.mark.parametrize("noise_at", ["device", "distributed", "server"])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("dimension", [10, 3072, 50_000])
def test_the_expected_cost_is_that_of_the_servers_own_plan(noise_at, statistics, dimension):
    example = {"enabled": not (statistics and noise_at == "server")}
    config = run(
        privacy={"client": {"noise_at": noise_at, "clip": 0.09}, "example": example},
        statistics={"enabled": statistics},
    )
    plan = make_plan(config, "r", 1, "", np.zeros(dimension, np.float32))
    assert release_cost(config, dimension) == charges(plan, dimension, config.privacy)
    by_usual_size = release_cost(config)
    for one, other in zip(by_usual_size, release_cost(config, dimension), strict=True):
        assert one.noise_multiplier == pytest.approx(other.noise_multiplier, rel=0.05)


def test_a_modulus_with_room_for_a_small_adapter_only_is_reckoned_with_a_small_one():
    config = client_level(bits=14)
    with pytest.raises(PrivacyError, match="modulus of 14 bits is too small"):
        release_cost(config, 4096)
    assert release_cost(config) == release_cost(config, 512)


def test_a_run_that_no_server_could_plan_is_refused_in_a_sentence_and_gets_no_yes():
    crowd = {"data": {"clients": 1000}, "rounds": {"cohort": 1000}}
    offer = offered(run(**crowd, privacy={"client": {"noise_at": "distributed", "bits": 12}}))
    assert "no round of this run can be planned" in said(offer)["refused"]
    with pytest.raises(PrivacyError, match="modulus of 12 bits is too small"):
        limiting_budget(offer, Policy())


# --- what comes in and what is stored -----------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"run": "../x"}, "run = ../x"),
        ({"run": ""}, "run = "),
        ({"run": "a\x1b[2J"}, "run = a<1b>"),
        ({"text": "rounds = "}, "is not TOML"),
        ({"text": "a = " + "[" * 9000}, "is not TOML"),
        ({"text": "rounds.count = 0"}, "rounds.count = 0"),
        ({"text": "colour = 1"}, "colour: unknown key"),
        ({"text": "#" * 70_000}, "more than 65536 characters"),
    ],
)
def test_an_offer_that_cannot_be_read_is_refused_by_sender(given, sentence):
    table = {"run": "run-1", "server": SERVER, "text": "", "time": NOW, **given}
    with pytest.raises(ProtocolError) as caught:
        receive(**table)
    assert sentence in str(caught.value)
    assert SERVER in str(caught.value)


@given(st.floats(0, 3.9e9), st.booleans(), st.integers(1, 99))
def test_what_is_stored_is_restored(time, agreed, count):
    config = run(rounds={"cohort": 16, "count": count})
    offer = receive("run-1", SERVER, to_toml(config), time)
    consent = agree(offer, Policy(), "owner", time) if agreed else None
    again = restore(store(offer, consent))
    assert again == (offer, consent)
    assert again[0].digest == offer.digest


def stored(**changes: Any) -> bytes:
    offer = offered()
    found = json.loads(store(offer, agree(offer, Policy(), "owner", NOW)))
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            found[section][key] = value
        else:
            found[section] = value
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        stored(format=2),
        stored(format="1"),
        stored(more=1),
        stored(offer=3),
        stored(offer__run=3),
        stored(offer__run="../x"),
        stored(offer__received=True),
        stored(offer__received=-1.0),
        stored(offer__received=float("nan")),
        stored(offer__text="rounds.count = 0"),
        stored(offer__more=1),
        stored(consent=[]),
        stored(consent__how="server"),
        stored(consent__digest="0"),
        stored(consent__time=1),
        stored(consent__time=1e300),
        stored().replace(b'"run":', b'"run": "x", "run":'),
    ],
)
def test_a_stored_run_that_was_changed_is_refused(data):
    with pytest.raises(StateError, match="a stored run cannot be read"):
        restore(data)


def test_a_consent_of_another_run_is_no_consent():
    offer = offered()
    with pytest.raises(PrivacyError, match="not what you agreed to"):
        refuse_without_consent(offer, Consent("run-2", offer.digest, NOW, "owner"))


def test_neither_policy_nor_offers_load_torch_or_an_accountant():
    code = (
        "import sys, privet.client.consent.run_offers, privet.client.consent.device_conditions\n"
        "print({'torch', 'scipy', 'dp_accounting', 'transformers', 'flwr'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
