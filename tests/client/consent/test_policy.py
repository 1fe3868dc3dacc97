"""client/consent/policy.py: a server can be stricter than the owner, never laxer."""

import math
import os
import stat
import tomllib
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ConfigDict

from privet.client.consent import policy as policies
from privet.client.consent.policy import (
    DEFAULT,
    own_config,
    read,
    reasons,
    refuse_run,
    text,
    write_default,
)
from privet.client.consent.policy_settings import (
    Allowed,
    Budget,
    Policy,
    Resources,
    RunLimits,
)
from privet.client.privacy.gate import budgets, caps, charges
from privet.common.errors import ConfigError, PrivacyError, ProtocolError, StateError
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import PLACES
from privet.common.settings.config import Config, parse, to_toml
from privet.common.settings.sections import ComputeSettings

SERVER = "fl.example.org:9092"


def written(tmp_path, content):
    path = tmp_path / "policy.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(tmp_path, content):
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path, content))
    return str(caught.value)


def run(**sections: Any) -> Config:
    table: dict[str, Any] = {"data": {"clients": 16}, "rounds": {"cohort": 16}}
    table["privacy"] = {"client": {"noise_at": "distributed"}}
    return parse({**table, **sections})


# --- the file -----------------------------------------------------------------------------------


def test_the_default_file_is_the_default_policy_and_every_key_has_a_comment(tmp_path):
    assert read(written(tmp_path, DEFAULT)) == Policy()
    lines = DEFAULT.splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
    assert max(map(len, lines)) <= 100
    keys = {key for section in tomllib.loads(DEFAULT).values() for key in section}
    assert len(keys) == sum(
        len(type(getattr(Policy(), s)).model_fields) for s in Policy.model_fields
    )


@given(st.builds(Policy, limits=st.builds(RunLimits, min_noise=st.floats(0, 9)),
                 budget=st.builds(Budget, delta=st.floats(1e-300, 0.5))))  # fmt: skip
def test_what_is_written_is_read_back_the_same(policy):
    assert Policy.model_validate(tomllib.loads(text(policy))) == policy


def test_the_default_is_written_once_and_for_the_owner_alone(tmp_path):
    path = tmp_path / "policy.toml"
    write_default(path)
    assert read(path) == Policy()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("[limits]\ncolluding = 0.2\n")
    with pytest.raises(StateError, match="already"):
        write_default(path)
    assert read(path).limits.colluding == 0.2
    with pytest.raises(StateError, match="Cannot write"):
        write_default(tmp_path / "nowhere" / "policy.toml")


def test_a_missing_file_says_which_command_writes_one(tmp_path):
    with pytest.raises(ConfigError, match="privet client init"):
        read(tmp_path / "policy.toml")


def test_what_is_no_policy_file_is_said(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="cannot read"):
        read(written(tmp_path, "") / "below")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "loop")


def test_a_file_of_100_mb_is_refused_unread(tmp_path):
    path = tmp_path / "policy.toml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(ConfigError, match="more than 1000000 bytes"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"a = ", b"[limits]\n[limits]", b"a = " + b"[" * 9000, b"a = " + b"9" * 9000],
)  # fmt: skip
def test_what_is_not_toml_is_said(tmp_path, content):
    assert "is not valid TOML" in refused(tmp_path, content)


def test_an_editors_byte_order_mark_is_no_fault(tmp_path):
    assert read(written(tmp_path, b"\xef\xbb\xbf" + DEFAULT.encode())) == Policy()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("limit.colluding = 0.1", "limit: unknown key; did you mean limits?"),
        (
            "limits.min_cohrt = 9",
            "limits.min_cohrt: unknown key; did you mean min_coh",
        ),
        ("budget.zzz = 1", "budget.zzz: unknown key; known: client, example, delta"),
        ("limits = 3", "limits = 3: expected a section, as in [limits]"),
        (
            "limits.min_cohort = 2",
            "limits.min_cohort = 2: expected greater than or equal",
        ),
        ("limits.min_cohort = 10.0", "min_cohort = 10.0: expected a valid integer"),
        ('limits.min_cohort = "10"', "min_cohort = '10': expected a valid integer"),
        ("limits.max_clip = true", "limits.max_clip = True: expected a valid number"),
        ("limits.max_clip = nan", "expected a finite number"),
        ("budget.client = inf", "budget.client = inf: expected a finite number"),
        ("budget.client = 0", "budget.client = 0: expected greater than 0"),
        ("budget.delta = 1", "budget.delta = 1: expected less than 1"),
        ('budget.example_adjacency = "add_remove"', "expected 'zero_out' or 'replace_one'"),
        ('limits.noise_at = "cloud"', "expected 'device', 'distributed' or 'server'"),
        ("when.on_battery = 1", "when.on_battery = 1: expected true or false"),
        ('consent.ask = "no"', "consent.ask = 'no': expected true or false"),
        ("when.min_battery = 101", "when.min_battery = 101: expected less than or equal"),
        ("resources.cpu_share = 0", "resources.cpu_share = 0: expected greater than 0"),
        ("resources.memory_mb = 100", "resources.memory_mb = 100: expected greater than"),
        ("allowed.models = []", "allowed.models: no run could use a model; name one"),
        ('allowed.models = "minilm"', "allowed.models = 'minilm': expected a list"),
        ("allowed.models = [1]", "allowed.models = 1: expected a valid string"),
        ('allowed.servers = ["https://a:1"]', "allowed.servers: 'https://a:1' is not HOST:PORT"),
        ('allowed.servers = ["a"]', "'a' is not HOST:PORT"),
        ('when.hours = "22-7"', "when.hours: '22-7' is not FROM-UNTIL, such as"),
        ('when.hours = "24:00-25:00"', "'24:00-25:00' has no such time of day"),
        ('when.hours = "08:60-09:00"', "'08:60-09:00' has no such time of day"),
        ('when.hours = "22:00-22:00"', "'22:00-22:00' never comes"),
        ('when.hours = " , "', "has no hours"),
        ("limits.colluding = 9", "colluding = 9 leaves 1 honest survivors of min_cohort = 10"),
        ("limits.colluding = 0.99", "colluding = 0.99 leaves 0 honest"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path, content, sentence):
    said = refused(tmp_path, content)
    assert sentence in said
    assert len(said.splitlines()) == 2


def test_all_faults_are_said_at_once(tmp_path):
    content = """
    limits.colluding = 10
    budget.client = 0
    allowed.colour = "red"
    when.hours = "1:00-1:00"
    """
    assert len(refused(tmp_path, content).splitlines()) == 5


def test_what_is_allowed_and_unwise_gets_a_sentence():
    assert Policy().warnings() == []
    table = {"limits": {"noise_at": "server"}, "consent": {"ask": False}}
    table["allowed"] = {"insecure_test_seed": True, "models": ["*"]}
    assert len(Policy.model_validate(table).warnings()) == 4


# --- a run against the policy -------------------------------------------------------------------


def test_a_usual_run_is_accepted_by_the_default_policy():
    refuse_run(Policy(), run(), SERVER)
    device = {"client": {"noise_at": "device"}}
    refuse_run(Policy(), run(privacy=device), SERVER)


@pytest.mark.parametrize(
    ("sections", "field", "key"),
    [
        ({"privacy": {"delta": 1e-4}}, "privacy.delta = 0.0001:", "budget.delta"),
        ({"privacy": {"client": {"enabled": False}}}, "privacy.client.enabled = False:",
         "limits.min_noise"),
        ({"privacy": {"example": {"enabled": False}}}, "privacy.example.enabled = False:",
         "limits.min_example_noise"),
        ({"privacy": {"client": {"noise_at": "server"}}}, "privacy.client.noise_at = 'server':",
         "limits.noise_at"),
        ({"privacy": {"client": {"noise_multiplier": 0.9}}}, "noise_multiplier = 0.9:",
         "limits.min_noise"),
        ({"privacy": {"client": {"clip": 1.5}}}, "privacy.client.clip = 1.5:",
         "limits.max_clip"),
        ({"privacy": {"client": {"adjacency": "zero_out"}}}, "adjacency = 'zero_out':",
         "budget.client_adjacency"),
        ({"privacy": {"example": {"adjacency": "replace_one"}}}, "adjacency = 'replace_one':",
         "budget.example_adjacency"),
        ({"privacy": {"example": {"noise_multiplier": 0.1}}}, "noise_multiplier = 0.1:",
         "limits.min_example_noise"),
        ({"rounds": {"cohort": 9}, "secure_aggregation": {"min_cohort": 5, "colluding": 2}},
         "rounds.cohort = 9:", "limits.min_cohort"),
        ({"secure_aggregation": {"survivors": 0.5}},
         "secure_aggregation.survivors = 0.5:", "limits.min_survivors"),
        ({"secure_aggregation": {"colluding": 0.0}},
         "secure_aggregation.colluding = 0.0:", "limits.colluding"),
        ({"training": {"steps": 21}}, "training.steps = 21:", "limits.max_steps"),
        ({"training": {"batch_size": 33}, "data": {"clients": 16, "records_per_client": 99}},
         "training.batch_size = 33:", "limits.max_batch"),
        ({"data": {"clients": 16, "records_per_client": 1001}}, "data.records_per_client = 1001:",
         "limits.max_records"),
        ({"data": {"clients": 16, "max_tokens": 513}}, "data.max_tokens = 513:",
         "limits.max_tokens"),
        ({"model": {"base": "evil/model"}}, "model.base = 'evil/model':", "allowed.models"),
        ({"insecure_test_seed": 7}, "insecure_test_seed = 7:", "allowed.insecure_test_seed"),
        ({"statistics": {"enabled": True, "noise_multiplier": 0.5}},
         "statistics.noise_multiplier = 0.5:", "limits.min_noise"),
    ],
)  # fmt: skip
def test_a_laxer_run_is_refused_with_field_value_limit_and_key(sections, field, key):
    privacy = sections.get("privacy", {})
    client = {"noise_at": "distributed", **privacy.get("client", {})}
    config = run(**{**sections, "privacy": {**privacy, "client": client}})
    (said,) = reasons(Policy(), config, SERVER)
    assert field in said
    assert f"({key} in policy.toml)" in said


def test_all_reasons_are_said_at_once():
    config = run(model={"base": "x" * 5000}, insecure_test_seed=0, training={"steps": 99})
    with pytest.raises(PrivacyError) as caught:
        refuse_run(Policy(), config, SERVER)
    assert len(str(caught.value).splitlines()) == 4
    assert len(str(caught.value)) < 1000


def test_a_run_that_claims_nothing_is_refused_by_every_policy():
    limits = {"min_noise": 0.0, "min_example_noise": 0.0, "noise_at": "server"}
    generous = Policy.model_validate({"limits": limits})
    off = {"enabled": False}
    refuse_run(generous, run(privacy={"client": off}), SERVER)
    refuse_run(generous, run(privacy={"example": off}), SERVER)
    nothing = run(privacy={"client": off, "example": off})
    with pytest.raises(PrivacyError, match="asks for a claim"):
        refuse_run(generous, nothing, SERVER)
    # the gate knows no budget where nothing is claimed; the device's own settings always claim
    assert budgets(nothing.privacy)["client"] == np.inf
    assert budgets(own_config(generous, nothing).privacy)["client"] == 10.0


@pytest.mark.parametrize(
    ("servers", "server", "kept"),
    [
        ((), "anything:1", True),
        (("fl.example.org:9092",), "FL.example.org:9092", True),
        (("fl.example.org:9092",), "fl.example.org:9093", False),
        (("*.example.org:*",), "a.b.example.org:443", True),
        (("*.example.org:*",), "example.org:443", False),
        (("fl.example.org:*",), "flXexample.org:1", False),
        (("*:9092",), "evil:1:9092", False),
        (("[::1]:9092",), "[::1]:9092", True),
        (("[::1]:9092",), "::9092", False),
    ],
)
def test_a_pattern_for_servers_matches_what_it_says(servers, server, kept):
    policy = Policy.model_validate({"allowed": {"servers": servers}})
    assert (reasons(policy, run(), server) == ()) == kept


def test_a_smaller_budget_of_the_owner_is_no_reason_to_refuse_and_holds():
    frugal = Policy.model_validate({"budget": {"client": 1.0, "example": 2.0}})
    refuse_run(frugal, run(), SERVER)
    found = budgets(own_config(frugal, run()).privacy)
    assert found == {"client": 1.0, "example": 2.0, "client/unmasked server": np.inf}


def test_each_limit_says_whose_it_is():
    rich = Policy.model_validate({"budget": {"client": 60.0}})
    free, capped = (
        run(),
        run(privacy={"client": {"noise_at": "distributed"}, "budget": {"client": 10.0}}),
    )
    assert caps(own_config(rich, free).privacy) == {}
    own = own_config(rich, capped).privacy
    free_of_limit = {
        "client/unmasked server": math.inf
    }  # one share by itself is shown, and never limited
    assert (budgets(own)["client"], caps(own)) == (60.0, {"client": 10.0, **free_of_limit})
    assert "owner allows 60 over all runs (budget.client in policy" in budgets(own)["client"].whose
    assert "own cap is 10 (privacy.budget.client in its conf" in caps(own)["client"].whose
    assert "the operator starts a run with a larger" in caps(own)["client"].mend
    # a simulated client has no owner: the run's cap, or what a new device has
    assert budgets(capped.privacy) == {"client": 10.0, "example": 15.0, **free_of_limit}
    assert (
        "simulated client has what a new device allows, 15"
        in budgets(capped.privacy)["example"].whose
    )
    assert caps(capped.privacy) == {}


def test_two_runs_cannot_open_two_budgets_by_counting_in_two_adjacencies():
    seen = set()
    for adjacency in ("add_remove", "zero_out", "replace_one"):
        client = {"noise_at": "distributed", "adjacency": adjacency}
        config = run(privacy={"client": client})
        own = own_config(Policy(), config)
        plan = make_plan(config, "r", 1, "", np.zeros(20, np.float32))
        seen |= {c.adjacency for c in charges(plan, 20, own.privacy) if c.unit == "client"}
        assert (reasons(Policy(), config, SERVER) == ()) == (adjacency == "add_remove")
    assert seen == {"add_remove"}


# --- the device's own settings ------------------------------------------------------------------

share, above = st.floats(0.01, 0.99), st.floats(0.01, 5)
# the square of a much smaller one is no float: its plan has no noise, and every device declines
multiplier = st.just(0.0) | st.floats(1e-3, 5)
units = st.fixed_dictionaries(
    {},
    optional={
        "enabled": st.booleans(),
        "noise_multiplier": multiplier,
        "clip": above,
    },
)
tables = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {"clients": st.just(64)}, optional={"records_per_client": st.integers(16, 2000)}
        ),
        "rounds": st.fixed_dictionaries({"cohort": st.integers(1, 64)}),
        "training": st.fixed_dictionaries(
            {}, optional={"steps": st.integers(1, 30), "batch_size": st.integers(1, 50)}
        ),
        "privacy": st.fixed_dictionaries(
            {
                "delta": st.floats(1e-9, 0.1),
                "budget": st.fixed_dictionaries({"client": above, "example": above}),
                "example": units,
                "client": st.tuples(
                    units,
                    st.fixed_dictionaries(
                        {
                            "noise_at": st.sampled_from(PLACES),
                            "adjacency": st.sampled_from(["add_remove", "replace_one"]),
                            "bits": st.sampled_from([0, 12, 20, 32]),
                        }
                    ),
                ).map(lambda two: two[0] | two[1]),
            }
        ),
        "secure_aggregation": st.fixed_dictionaries(
            {},
            optional={"survivors": share, "colluding": share, "min_cohort": st.integers(3, 9)},
        ),
        "statistics": st.fixed_dictionaries({"enabled": st.booleans(), "noise_multiplier": above}),
    },
    optional={"insecure_test_seed": st.integers(0, 9)},
)  # fmt: skip
owners = st.fixed_dictionaries(
    {
        "budget": st.fixed_dictionaries({"client": above, "delta": st.floats(1e-9, 0.1)}),
        "limits": st.fixed_dictionaries(
            {},
            optional={
                "noise_at": st.sampled_from(PLACES),
                "min_noise": multiplier,
                "min_example_noise": multiplier,
                "max_clip": above,
                "min_cohort": st.integers(3, 40),
                "min_survivors": share,
                "colluding": share,
                "min_bits": st.integers(12, 16),
                "max_steps": st.integers(1, 40),
            },
        ),
        "allowed": st.fixed_dictionaries(
            {"statistics": st.booleans(), "insecure_test_seed": st.booleans()}
        ),
    }
)


def made(kind, table):
    try:
        return parse(table) if kind is Config else Policy.model_validate(table)
    except (ConfigError, ValueError):
        return None


configs = tables.map(lambda table: made(Config, table)).filter(bool)
policies_of_owners = owners.map(lambda table: made(Policy, table)).filter(bool)


def laxer(own: Config, config: Config, policy: Policy) -> list[str]:
    """Fields in which a device's own settings are laxer than the run's or the owner's."""
    limits, budget, allowed = policy.limits, policy.budget, policy.allowed
    mine, given = own.privacy, config.privacy
    place = PLACES.index
    checks = {
        "delta": mine.delta <= min(given.delta, budget.delta),
        "budget.client": budgets(mine)["client"] <= budget.client,
        "budget.example": budgets(mine)["example"] <= budget.example,
        "cap.client": caps(mine).get("client", np.inf) <= (given.budget.client or np.inf),
        "cap.example": caps(mine).get("example", np.inf) <= (given.budget.example or np.inf),
        "client": mine.client.enabled >= max(given.client.enabled, limits.min_noise > 0),
        "noise_at": place(mine.client.noise_at)
        <= min(place(given.client.noise_at), place(limits.noise_at)),
        "noise": mine.client.noise_multiplier
        >= max(given.client.noise_multiplier, limits.min_noise),
        "clip": mine.client.clip <= min(given.client.clip, limits.max_clip),
        "bits": mine.client.bits >= max(given.client.bits, limits.min_bits),
        "adjacency": (mine.client.adjacency, mine.example.adjacency)
        == (budget.client_adjacency, budget.example_adjacency),
        "example": mine.example.enabled
        >= max(given.example.enabled, limits.min_example_noise > 0),
        "record noise": mine.example.noise_multiplier
        >= max(given.example.noise_multiplier, limits.min_example_noise),
        "record clip": mine.example.clip <= given.example.clip,
        "some claim": mine.client.enabled or mine.example.enabled,
        "survivors": own.secure_aggregation.survivors
        >= max(config.secure_aggregation.survivors, limits.min_survivors),
        "colluding": own.secure_aggregation.colluding
        >= max(config.secure_aggregation.colluding, limits.colluding),
        "cohort": own.secure_aggregation.min_cohort
        >= max(config.secure_aggregation.min_cohort, limits.min_cohort),
        "statistics": own.statistics.enabled
        <= min(config.statistics.enabled, allowed.statistics),
        "statistics noise": own.statistics.noise_multiplier
        >= max(config.statistics.noise_multiplier, limits.min_noise),
        "steps": own.training.steps <= min(config.training.steps, limits.max_steps),
        "batch": own.training.batch_size >= config.training.batch_size,
        "rate": own.sampling_rate <= config.sampling_rate,
        "learning rate": own.training.learning_rate <= config.training.learning_rate,
        "seed": own.insecure_test_seed is None or allowed.insecure_test_seed,
    }  # fmt: skip
    return [name for name, kept in checks.items() if not kept]


@given(configs, policies_of_owners)
def test_own_settings_are_at_least_as_strict_as_the_run_and_the_owner(config, policy):
    assert laxer(own_config(policy, config), config, policy) == []


def just_accepting(config: Config) -> Policy:
    """The strictest owner who still accepts a run."""
    client, example, statistics = config.privacy.client, config.privacy.example, config.statistics
    noises = [
        client.noise_multiplier if client.enabled else 0.0,
        *([statistics.noise_multiplier] if statistics.enabled else []),
    ]
    limits = RunLimits().model_copy(
        update={
            "noise_at": client.noise_at,
            "min_noise": min(noises),
            "min_example_noise": example.noise_multiplier if example.enabled else 0.0,
            "max_clip": client.clip,
            "min_cohort": config.rounds.cohort,
            "min_survivors": config.secure_aggregation.survivors,
            "colluding": float(config.colluders),  # as a number: a share asks for two at least
            "max_steps": config.training.steps,
            "max_batch": config.training.batch_size,
            "max_records": config.data.records_per_client,
        }
    )
    budget = Budget(delta=config.privacy.delta, client_adjacency=client.adjacency)
    allowed = Allowed(insecure_test_seed=config.insecure_test_seed is not None)
    return Policy(budget=budget, allowed=allowed).model_copy(update={"limits": limits})


def test_where_a_device_computes_and_in_which_numbers_is_its_owners_alone():
    owners: Any = {"device": "cpu", "dtype": "float32", "quantization": "nf4"}
    policy = Policy(resources=Resources(**owners, gradient_checkpointing=True))
    wanted = ComputeSettings(device="cuda", dtype="bfloat16", quantization="int8")
    own = own_config(policy, Config(compute=wanted))
    assert own.compute == ComputeSettings(**owners, gradient_checkpointing=True)
    assert own_config(Policy(), Config(compute=wanted)).compute == ComputeSettings()


def test_the_noise_of_blocks_nobody_asked_for_refuses_no_run():
    asked = {"statistics": {"enabled": True, "noise_multiplier": 6.0}}
    policy = Policy(limits=RunLimits(min_noise=5.0))
    said = "\n".join(reasons(policy, parse(asked), SERVER))
    assert "statistics" not in said
    with_gains = {"statistics": {**asked["statistics"], "gains": True}}
    said = "\n".join(reasons(policy, parse(with_gains), SERVER))
    assert "statistics.gain_noise_multiplier = 4.0" in said


@given(configs)
def test_own_settings_of_an_accepted_run_are_valid_and_accept_its_own_plan(config):
    policy = just_accepting(config)
    assume(config.privacy.client.enabled or config.privacy.example.enabled)
    assert reasons(policy, config, SERVER) == ()
    own = own_config(policy, config)
    assert parse(tomllib.loads(to_toml(own))).model_dump() == own.model_dump()
    if not config.privacy.client.bits:
        make_plan(config, "r", 1, "", np.zeros(20, np.float32)).refuse_if_laxer(own)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"privacy": {"client": {"noise_at": "distributed", "clip": 2.0}}}, "clip"),
        ({"privacy": {"client": {"noise_at": "distributed", "noise_multiplier": 0.5}}}, "noise"),
        ({"privacy": {"client": {"noise_at": "server"}}}, "noise_at"),
        ({"privacy": {"client": {"enabled": False}}}, "noise"),
        ({"secure_aggregation": {"survivors": 0.5}, "rounds": {"cohort": 64},
          "data": {"clients": 64}},
         "survivors"),
        ({"secure_aggregation": {"colluding": 0.0}}, "colluders"),
        ({"training": {"steps": 21}}, "local_steps"),
        ({"privacy": {"client": {"noise_at": "distributed"}, "example": {"enabled": False}}},
         "record_clip"),
    ],
)  # fmt: skip
def test_a_plan_of_a_laxer_configuration_is_refused_by_the_own_settings(sections, named):
    config = run(**sections)
    plan = make_plan(config, "r", 1, "", np.zeros(20, np.float32))
    with pytest.raises(ProtocolError, match=rf"laxer .*: {named} \(own limit"):
        plan.refuse_if_laxer(own_config(Policy(), config))


# --- traps --------------------------------------------------------------------------------------


def taken_over(policy: Policy, config: Config) -> Config:
    """Faulty: takes the owner's numbers where they are set, though the run's may be stricter."""
    own = own_config(policy, config)
    client = own.privacy.client.model_copy(update={"noise_multiplier": policy.limits.min_noise})
    return own.model_copy(update={"privacy": own.privacy.model_copy(update={"client": client})})


def capped(policy: Policy, config: Config) -> Config:
    """Faulty: the owner's cap on records also lowers the denominator of the rate."""
    own = own_config(policy, config)
    most = min(config.data.records_per_client, 20)
    data = own.data.model_copy(update={"records_per_client": most})
    return own.model_copy(update={"data": data})


def unclaimed(policy: Policy, config: Config) -> Config:
    """Faulty: a level that the run switched off stays off, and with it every check of it."""
    own = own_config(policy, config)
    client = own.privacy.client.model_copy(update={"enabled": config.privacy.client.enabled})
    return own.model_copy(update={"privacy": own.privacy.model_copy(update={"client": client})})


@pytest.mark.parametrize(
    ("faulty", "sections", "named"),
    [
        (taken_over, {"privacy": {"client": {"noise_multiplier": 3.0}}}, "noise"),
        (capped, {}, "rate"),
        (unclaimed, {"privacy": {"client": {"enabled": False}}}, "client"),
    ],
)
def test_a_faulty_merge_is_found_by_the_law(faulty, sections, named):
    config = run(**sections)
    assert laxer(faulty(Policy(), config), config, Policy()) == [named]


def test_lax_types_would_have_taken_a_yes_for_a_number():
    class Lax(RunLimits):
        model_config = ConfigDict(strict=False)

    assert Lax.model_validate({"max_clip": True}).max_clip == 1.0
    with pytest.raises(ValueError, match="max_clip"):
        RunLimits.model_validate({"max_clip": True})


def test_the_places_of_noise_are_the_plans_in_the_same_order():
    assert policies.PLACES == PLACES


def test_every_public_name_is_there():
    assert all(hasattr(policies, name) for name in policies.__all__)


def test_a_row_of_packed_records_is_no_longer_than_the_policy_allows():
    client: dict[str, Any] = {"example": {"enabled": False}, "client": {"noise_at": "distributed"}}
    short, long = (run(training={"packed": packed}, privacy=client) for packed in (512, 513))
    assert not any("training.packed" in said for said in reasons(Policy(), short, SERVER))
    said = next(said for said in reasons(Policy(), long, SERVER) if "training.packed" in said)
    assert "training.packed = 513:" in said
    assert "(limits.max_tokens in policy.toml)" in said
