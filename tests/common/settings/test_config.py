"""config.py: a wrong setting is answered with its name, its value and what is allowed."""

import hashlib
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from privet.common.errors import ConfigError
from privet.common.settings.config import Config, parse, read, to_toml
from privet.common.settings.sections import AdapterSettings, SecureAggregationSettings


def refused(**table):
    with pytest.raises(ConfigError) as caught:
        parse(table)
    return str(caught.value)


def overridden(tmp_path, *overrides, text=""):
    path = tmp_path / "config.toml"
    path.write_text(text, "utf-8")
    return read(path, overrides)


# --- wrong values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank = 0: expected greater than or equal to 1"),
        ({"adapter": {"rank": 2.5}}, "adapter.rank = 2.5: expected a valid integer"),
        (
            {"adapter": {"family": "fedsvg"}},
            "'fedsvg': expected 'lora_xs', 'ffa', 'fedsvd', 'rolora', 'fedsa' or 'lora'",
        ),
        (
            {"privacy": {"client": {"noise_multiplier": -1.0}}},
            "privacy.client.noise_multiplier = -1.0: expected greater than or equal to 0",
        ),
        (
            {"privacy": {"example": {"noise_multiplier": -0.1}}},
            "privacy.example.noise_multiplier = -0.1: expected greater than or equal to 0",
        ),
        ({"privacy": {"client": {"clip": 0}}}, "client.clip = 0: expected greater than 0"),
        ({"privacy": {"example": {"clip": 0}}}, "example.clip = 0: expected greater than 0"),
        ({"privacy": {"client": {"clip": float("nan")}}}, "expected a finite number"),
        ({"privacy": {"client": {"clip": float("inf")}}}, "expected a finite number"),
        ({"privacy": {"delta": 0}}, "privacy.delta = 0: expected greater than 0"),
        ({"privacy": {"delta": 1}}, "privacy.delta = 1: expected less than 1"),
        ({"privacy": {"budget": {"client": -3}}}, "privacy.budget.client = -3: expected greater"),
        (
            {"privacy": {"client": {"noise_at": "cloud"}}},
            "privacy.client.noise_at = 'cloud': expected 'device', 'distributed' or 'server'",
        ),
        (
            {"privacy": {"example": {"adjacency": "add_remove"}}},
            "privacy.example.adjacency = 'add_remove': a record put in moves others",
        ),
        (
            {"privacy": {"example": {"adjacency": "add"}}},
            "expected 'add_remove', 'zero_out' or 'replace_one'",
        ),
        ({"privacy": {"client": {"bits": 64}}}, "privacy.client.bits = 64: expected less than"),
        ({"privacy": 3}, "privacy = 3: expected a section, as in [privacy]"),
        ({"data": {"clients": 0}}, "data.clients = 0: expected greater than or equal to 1"),
        ({"data": {"min_records": 0}}, "data.min_records = 0: expected greater than or equal to 1"),
        ({"data": {"holdout": 1.0}}, "data.holdout = 1.0: expected less than 1"),
        ({"data": {"source": ""}}, "data.source = '': expected a text of at least 1 character"),
        ({"data": {"task": "chess"}}, "'regression', 'classification' or"),
        ({"rounds": {"count": 0}}, "rounds.count = 0: expected greater than or equal to 1"),
        ({"rounds": {"quorum": 1.1}}, "rounds.quorum = 1.1: expected less than or equal to 1"),
        ({"rounds": {"optimizer": "adam"}}, "expected 'fedavg', 'fedavgm' or 'fedadam'"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate = 'fast': expected"),
        ({"speed": {"threads": 0}}, "speed.threads = 0: expected greater than or equal to 1"),
        ({"name": "a/b"}, "name = 'a/b': expected a text that fits"),
        ({"name": "../x"}, "name = '../x': expected a text that fits"),
        ({"insecure_test_seed": -1}, "insecure_test_seed = -1: expected greater"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(table, sentence):
    said = refused(**table)
    assert sentence in said
    assert len(said.splitlines()) == 2


def test_all_faults_are_said_at_once():
    said = refused(adapter={"rank": 0}, rounds={"count": 0}, privacy={"delta": 2})
    assert len(said.splitlines()) == 4


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"rounds": {"cohort": 300}}, "rounds.cohort = 300 is larger than data.clients = 256"),
        (
            {"training": {"batch_size": 33}},
            "training.batch_size = 33 is larger than data.records_per_client = 32",
        ),
        (
            {"privacy": {"client": {"noise_multiplier": 0}}},
            "privacy.client.noise_multiplier = 0 gives no client-level guarantee",
        ),
    ],
)
def test_a_contradiction_is_said_with_both_values(table, sentence):
    assert sentence in refused(**table)


def test_noise_of_zero_is_allowed_where_no_claim_is_made():
    quiet = {"noise_multiplier": 0}
    assert parse({"privacy": {"client": {**quiet, "enabled": False}}})
    assert parse({"privacy": {"client": quiet}, "insecure_test_seed": 1})


# --- unknown keys -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"rounds": {"cohrt": 3}}, "rounds.cohrt: unknown key; did you mean cohort?"),
        ({"round": {"cohort": 3}}, "round: unknown key; did you mean rounds?"),
        (
            {"privacy": {"client": {"noise_multiplyer": 1}}},
            "privacy.client.noise_multiplyer: unknown key; did you mean noise_multiplier?",
        ),
        ({"privacy": {"epsilon": 3}}, "privacy.epsilon: unknown key"),
        ({"zzz": 1}, "zzz: unknown key; known: name, data, model, compute"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(table, sentence):
    assert sentence in refused(**table)


# --- files and overrides ------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.toml: No such file"):
        read(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path)
    for number, content in enumerate((b"rounds = ", b"\xff\xfe", b"[rounds]\n[rounds]")):
        path = tmp_path / f"{number}.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"is not valid TOML"):
            read(path)


def test_a_file_with_a_wrong_value_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config.toml does not fit:\n  rounds.count = 0"):
        overridden(tmp_path, text="[rounds]\ncount = 0\n")


def test_overrides_go_on_top_of_the_file(tmp_path):
    config = overridden(
        tmp_path,
        "rounds.count=8",
        "privacy.client.noise_at=device",
        "privacy.example.enabled=false",
        "training.learning_rate=2.5e-1",
        'data.classes=["a", "b"]',
        "data.source=my file.jsonl",
        "name='2024'",
        " rounds.cohort = 3",
        text="[rounds]\ncount = 2\nquorum = 0.25\n",
    )
    assert (config.rounds.count, config.rounds.cohort, config.rounds.quorum) == (8, 3, 0.25)
    assert config.privacy.client.noise_at == "device"
    assert config.privacy.example.enabled is False
    assert config.training.learning_rate == 0.25
    assert config.data.classes == ("a", "b")
    assert (config.data.source, config.name) == ("my file.jsonl", "2024")


def test_the_last_override_of_a_key_holds(tmp_path):
    assert overridden(tmp_path, "rounds.count=8", "rounds.count=9").rounds.count == 9


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rounds.count", "expected KEY=VALUE, such as rounds.count=8"),
        ("=3", "expected KEY=VALUE"),
        ("", "expected KEY=VALUE"),
        ("name.x=3", "name is a value, not a section"),
        ("rounds.count=", "rounds.count = '': expected a valid integer"),
        ("rounds.count=many", "rounds.count = 'many': expected a valid integer"),
        ("rounds..count=3", "rounds.: unknown key"),
        ("rounds.cuont=3", "did you mean count?"),
        ("adapter.modules=q_proj", "adapter.modules = 'q_proj': expected a list"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(tmp_path, override, sentence):
    with pytest.raises(ConfigError) as caught:
        overridden(tmp_path, override, text="name = 'one'\n")
    assert sentence in str(caught.value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
            "data": st.fixed_dictionaries(
                {},
                optional={
                    "source": st.text(st.characters(codec="utf-8"), min_size=1),
                    "classes": st.lists(st.text(st.characters(codec="utf-8")), max_size=3),
                    "holdout": st.floats(0.01, 0.99),
                },
            ),
            "privacy": st.fixed_dictionaries({"delta": st.floats(1e-300, 0.5)}),
            "insecure_test_seed": st.integers(0, 2**62),
        },
    )
)
def test_what_is_written_is_read_back_the_same(table):
    config = parse(table)
    again = parse(tomllib.loads(to_toml(config)))
    assert again == config
    assert again.digest == config.digest


# --- what settings decide -----------------------------------------------------------------------


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        Config().rounds.count = 7  # type: ignore[misc]
    assert hash(AdapterSettings()) == hash(AdapterSettings())


def test_a_run_without_a_cap_of_its_own_writes_none():
    assert Config().privacy.budget.client is None
    assert "client" not in to_toml(Config()).split("[privacy.budget]")[1].splitlines()[1:2]


def test_speed_and_name_are_not_in_the_digest_and_everything_else_is():
    plain = Config().digest
    assert parse({"speed": {"threads": 7}, "name": "other"}).digest == plain
    others: list[dict[str, Any]] = [
        {"data": {"seed": 8}},
        {"model": {"base": "minilm"}},
        {"adapter": {"seed": 8}},
        {"training": {"steps": 2}},
        {"training": {"ends": False}},
        {"training": {"opening": 8}},
        {"training": {"packed": 96}, "privacy": {"example": {"enabled": False}}},
        {"privacy": {"example": {"enabled": False}}},
        {"privacy": {"delta": 1e-6}},
        {"privacy": {"client": {"noise_at": "device"}}},
        {"privacy": {"budget": {"client": 9}}},
        {"rounds": {"count": 5}},
        {"insecure_test_seed": 0},
    ]
    assert len({plain, *(parse(table).digest for table in others)}) == len(others) + 1


def test_the_digest_has_what_differs_from_the_defaults_so_that_a_new_setting_changes_none():
    assert parse({"training": {"ends": True, "opening": 0, "packed": 0}}).digest == Config().digest
    assert Config().digest == parse(tomllib.loads(to_toml(Config()))).digest
    assert Config().digest == hashlib.sha256(b"{}").hexdigest()


def test_packed_records_have_no_example_level_claim_and_fit_their_rows():
    with pytest.raises(ConfigError, match="no example-level claim"):
        parse({"training": {"packed": 96}})
    client: dict[str, Any] = {"privacy": {"example": {"enabled": False}}}
    with pytest.raises(ConfigError, match=r"training.packed = 40 is smaller than data.max_tokens"):
        parse({"training": {"packed": 40}, **client})
    assert parse({"training": {"packed": 48}, **client}).training.packed == 48


def test_the_rate_is_made_of_public_constants():
    config = parse({"training": {"batch_size": 8}, "data": {"records_per_client": 32}})
    assert config.sampling_rate == 0.25


def test_the_task_decides_the_size_of_the_shared_head():
    classes = {"task": "classification", "classes": ["a", "b", "c"]}
    assert [parse({"data": data}).outputs for data in ({}, {"task": "regression"}, classes)] == [
        0,
        1,
        3,
    ]


def test_colluders_and_the_smallest_sum_are_rounded_up():
    """Rounded down, noise and threshold would be sized for one device fewer than collude."""
    secure_aggregation = SecureAggregationSettings(colluding=0.1, survivors=0.6)
    assert [secure_aggregation.colluders(cohort) for cohort in (10, 11, 64, 70)] == [1, 2, 7, 7]
    assert [secure_aggregation.min_sum(cohort) for cohort in (10, 11, 64, 70)] == [6, 7, 39, 42]


def test_one_class_is_no_classification():
    assert "at least two" in refused(data={"task": "classification", "classes": ["a"]})


def test_what_is_allowed_and_unwise_gets_a_sentence():
    assert Config().warnings() == []
    (said,) = parse({"privacy": {"delta": 1 / 256}}).warnings()
    assert said.startswith("privacy.delta = 0.00390625 is not below 1/clients = 0.00390625")
    assert parse({"privacy": {"delta": 0.0039}}).warnings() == []
    (said,) = parse({"privacy": {"client": {"enabled": False}}}).warnings()
    assert "no client-level claim" in said
    (said,) = parse({"privacy": {"example": {"enabled": False}}}).warnings()
    assert "no DP-SGD noise" in said
    (said,) = parse({"privacy": {"example": {"noise_multiplier": 0}}}).warnings()
    assert "devices decline" in said
    (said,) = parse({"insecure_test_seed": 0}).warnings()
    assert "NOT PRIVATE" in said
