"""server/rounds.py: the sum is the sum, nothing wraps, nothing is decoded that must not be."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privet.common.errors import CheckpointCorrupt, ConfigError, ProtocolError, RunUnfinished
from privet.common.files import read_lines
from privet.common.privacy.clipping import clip
from privet.common.privacy.encoding import (
    NOISE_DEVIATIONS,
    NOISE_EXTRA,
    Grid,
    cannot_wrap,
    choose_grid,
    decode,
    pack,
    round_randomly,
    rounded_sensitivity,
    unwrap,
    wrap,
)
from privet.common.privacy.noise import TestSource, skellam, skellam_table
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.rotation import flat_bound
from privet.common.privacy.round_plan import Plan
from privet.common.settings.config import Config, parse
from privet.server import void_rounds
from privet.server.cohort import draw
from privet.server.round_record import RoundRecord
from privet.server.rounds import PLANS, Reply, run_rounds
from privet.server.run_folder import checkpoint

from ..served import RUN, exchange_of, served

SIZE = 40
LAYOUT = exchange_of(SIZE).state.digest
Vector = NDArray[np.float32]


def configured(*, count: int = 1, cohort: int = 4, **sections: Any) -> Config:
    table: dict[str, Any] = {
        "data": {"clients": 8},
        "rounds": {"count": count, "cohort": cohort, "optimizer": "fedavg", "learning_rate": 1.0},
        "privacy": {"example": {"enabled": False}, "client": {"enabled": False}},
        "insecure_test_seed": 1,
    }
    for name, values in sections.items():
        table[name] = {**table[name], **values}
    table["privacy"]["client"] = {"bits": 32, **table["privacy"]["client"]}
    return parse(table)


def delta_of(client: int, number: int, size: int = SIZE) -> NDArray[np.float64]:
    drawn = np.random.default_rng([client, number]).normal(size=size)
    return clip(drawn / size**0.5 * 0.8, 1.0).vector


def contribution(client: int, plan: Plan, size: int = SIZE) -> bytes:
    """What the gate lets out, without a ledger."""
    source = TestSource(1, f"client {client} round {plan.round}")
    found = round_randomly(delta_of(client, plan.round, size), plan.step, source.words)
    if plan.noise_at == "device":
        found += skellam(skellam_table(plan.variance), size, source)
    return pack(wrap(found, plan.bits), plan.bits)


def honest(phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector) -> Iterator[Reply]:
    assert phase == "round"
    for client in cohort:
        yield Reply(client, contribution(client, plan, len(start)))


def run(
    folder: Path, config: Config, ask: Any = honest, size: int = SIZE, show: Any = None
) -> Vector:
    folder.mkdir(exist_ok=True)
    return run_rounds(served(folder, config, ask, show), exchange_of(size))


def asked(config: Config) -> list[int]:
    """The cohort of the first round."""
    return draw(config.data.clients, config.rounds.cohort, 1, config.data.seed)


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    lines = read_lines(folder / "rounds.jsonl")
    times = ("seconds", "phases")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


# --- the mean ----------------------------------------------------------------------------------


def test_without_noise_the_decoded_mean_is_the_plain_mean_to_the_rounding(tmp_path):
    config = configured(cohort=8)
    step = make_plan(config, RUN, 1, LAYOUT, np.zeros(SIZE, np.float32)).step
    plain = np.mean([delta_of(client, 1) for client in range(8)], axis=0)
    found = run(tmp_path, config)
    assert np.abs(found - plain).max() < step + 1e-7


def fits(values: NDArray[np.float64], variance: float) -> bool:
    """Whether the values' variance is the declared one; 5 deviations of that estimate."""
    return bool(abs(np.var(values) / variance - 1) < 5 * (2 / values.size) ** 0.5)


@pytest.mark.parametrize("noise_at", ["server", "device"])
def test_the_noise_in_the_mean_has_the_declared_variance(tmp_path, noise_at):
    size, client = 20_000, {"enabled": True, "noise_at": noise_at, "noise_multiplier": 1.5}
    config = configured(privacy={"client": client})
    plan = make_plan(config, RUN, 1, LAYOUT, np.zeros(size, np.float32))
    plain = np.mean([delta_of(one, 1, size) for one in asked(config)], axis=0)
    noise = run(tmp_path, config, size=size) - plain
    adders = 4 if noise_at == "device" else 1
    declared = adders * plan.variance * (plan.step / 4) ** 2
    assert declared == pytest.approx(adders * (1.5 / 4) ** 2, rel=0.02)
    assert fits(noise, declared)
    assert not fits(noise, declared * 2 / 3)
    assert not fits(noise, declared * 3 / 2)


def test_the_denominator_is_the_cohort_also_when_a_client_is_missing(tmp_path):
    def without_last(
        phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector
    ) -> Iterator[Reply]:
        yield from list(honest(phase, cohort, plan, start))[:-1]

    config = configured()
    last = asked(config)[-1]
    moved = run(tmp_path / "all", config) - run(tmp_path / "less", config, without_last)
    assert moved == pytest.approx(delta_of(last, 1) / 4, abs=1e-6)

    def faulty(deltas: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Divides by who came: everybody's weight tells of the one who did not."""
        return np.asarray(np.mean(deltas, axis=0))

    deltas = [delta_of(one, 1) for one in asked(config)]
    assert np.abs(faulty(deltas) - faulty(deltas[:-1]) - deltas[-1] / 4).max() > 0.01


# --- nothing wraps -----------------------------------------------------------------------------


def bound(plan: Plan, config: Config) -> int:
    """Of the total noise in a coordinate, in grid steps."""
    adders: int = 1 if config.privacy.client.noise_at == "server" else config.rounds.cohort
    return adders * math.ceil(NOISE_DEVIATIONS * math.sqrt(plan.variance) + NOISE_EXTRA)


@settings(deadline=None, max_examples=150)
@given(
    noise_at=st.sampled_from(["device", "distributed", "server"]),
    multiplier=st.floats(0.01, 30),
    limit=st.floats(1e-3, 1e3),
    cohort=st.integers(1, 2000),
    bits=st.just(0) | st.integers(12, 32),
    size=st.integers(1, 100_000),
)
def test_no_plan_lets_a_sum_wrap(noise_at, multiplier, limit, cohort, bits, size):
    client = {"enabled": True, "noise_at": noise_at, "noise_multiplier": multiplier}
    client |= {"clip": limit, "bits": bits}
    cohort = max(cohort, 10) if noise_at == "distributed" else cohort
    config = configured(cohort=cohort, data={"clients": cohort}, privacy={"client": client})
    try:
        plan = make_plan(config, RUN, 1, LAYOUT, np.zeros(size, np.float32))
    except ConfigError:
        return  # said to be too small; that it is, the finest grid decides
    largest = flat_bound(plan.clip, size) if plan.rotated else plan.clip
    assert cannot_wrap(Grid(plan.step, plan.bits), largest, bound(plan, config), cohort)
    # the noise is the multiplier times the norm after rounding, not before
    needed = multiplier * rounded_sensitivity(limit, plan.step, size)[0]
    assert plan.counted_variance**0.5 == pytest.approx(needed)


def test_a_grid_sized_for_the_noise_before_rounding_would_wrap():
    cohort, size, bits, multiplier = 8, 2_000, 16, 3.0
    client = {"enabled": True, "noise_at": "device", "noise_multiplier": multiplier, "bits": bits}
    config = configured(cohort=cohort, privacy={"client": client})

    def faulty() -> tuple[Grid, float]:
        grid = choose_grid(1.0, multiplier * cohort**0.5, cohort, size, bits)
        return grid, multiplier * rounded_sensitivity(1.0, grid.step, size)[0]

    grid, deviation = faulty()
    assert not cannot_wrap(grid, 1.0, cohort * skellam_table(deviation**2).bound, cohort)
    plan = make_plan(config, RUN, 1, LAYOUT, np.zeros(size, np.float32))
    table = skellam_table(plan.variance)
    assert table.bound <= NOISE_DEVIATIONS * plan.variance**0.5 + NOISE_EXTRA
    largest = flat_bound(1.0, size) if plan.rotated else 1.0
    assert cannot_wrap(Grid(plan.step, bits), largest, cohort * table.bound, cohort)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_at_the_edge_of_the_modulus_is_decoded_right(tmp_path, sign):
    """Everybody sends the whole clip in one coordinate, with the largest noise there can be."""
    client = {"enabled": True, "noise_at": "device", "noise_multiplier": 1.0, "bits": 16}
    config = configured(cohort=8, privacy={"client": client})
    sent = 0

    def extreme(
        phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector
    ) -> Iterator[Reply]:
        nonlocal sent
        assert phase == "round"
        largest = math.floor(plan.clip / plan.step) + 1 + skellam_table(plan.variance).bound
        vector = np.zeros(len(start), np.int64)
        vector[0] = sign * largest
        sent = sign * largest * len(cohort)
        assert abs(sent) > 0.8 * 2 ** (plan.bits - 1)
        for one in cohort:
            yield Reply(one, pack(wrap(vector, plan.bits), plan.bits))

    step = make_plan(config, RUN, 1, LAYOUT, np.zeros(SIZE, np.float32)).step
    assert run(tmp_path, config, extreme)[0] == pytest.approx(sent * step / 8)
    # the faulty version: one bit less
    assert decode(unwrap(wrap(np.array([sent]), 15), 15), step)[0] != pytest.approx(sent * step)


# --- who answers -------------------------------------------------------------------------------


def one_of_four(
    phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector
) -> Iterator[Reply]:
    for place, reply in enumerate(honest(phase, cohort, plan, start)):
        yield reply if place == 0 else Reply(reply.client, None)


def test_where_nobody_comes_nothing_is_decoded_and_the_run_ends_unfinished(tmp_path):
    config = configured(count=2, rounds={"patience": 3})
    with pytest.raises(
        RunUnfinished, match=r"^0 of 2 rounds .* last 3 attempts were void"
    ) as ended:
        run(tmp_path, config, one_of_four)
    assert ended.value.exit_code == 1
    lines = without_seconds(tmp_path)
    assert [(one["round"], one["void"], one["attempt"]) for one in lines] == [
        (1, True, 1), (1, True, 2), (1, True, 3)
    ]  # fmt: skip
    assert not (tmp_path / checkpoint.CURRENT).exists()
    first, second, last = lines
    assert first["who"]["came"] == first["who"]["asked"][:1]
    assert first["missing"]["declined"] == {"round": first["who"]["asked"][1:]}
    # the one who came sends the same bytes again; the others are those not asked before
    assert set(first["who"]["came"]) < set(second["who"]["asked"])
    assert not {*first["who"]["asked"][1:]} & {*second["who"]["asked"]}
    assert ("wait_s" in first, "wait_s" in last) == (True, False)


def test_who_is_asked_instead_has_come_in_the_fewest_rounds_before():
    there = range(12)
    before: list[RoundRecord] = [
        {"round": 1, "again": True, "who": {"asked": [0, 1, 2, 3], "came": [0, 1, 2]}},
        {"round": 1, "who": {"asked": [0, 1, 2, 3], "came": [0, 1, 2, 3]}},
        {"round": 2, "who": {"asked": [3, 4, 5, 6, 10, 11], "came": [3, 4, 5, 6]}},
        {"round": 3, "again": True, "who": {"asked": [7, 8, 9], "came": [7]},
         "missing": {"declined": {"keys": [8]}, "silent": {"keys": [9]}, "refused": {}}},
    ]  # fmt: skip
    asked = void_rounds.cohort_of(there, [7, 8, 9], before, 3, seed=0)
    assert asked == [7, 10, 11]  # 7 came along, and 10 and 11 never came, though they were asked
    assert 3 not in void_rounds.cohort_of(there, [*range(5, 12)], before, 3, seed=0)


def test_a_void_round_does_not_count_and_what_it_is_repeated_as_is_the_same_round(tmp_path):
    """Without masks who answered sends the same bytes again, so one plan is one release."""
    seen: list[tuple[int, str]] = []

    def late(phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector) -> Iterator[Reply]:
        seen.append((plan.round, plan.digest))
        asking = one_of_four if len(seen) in (2, 3) else honest
        return asking(phase, cohort, plan, start)

    found = run(tmp_path / "late", configured(count=3, cohort=8), late)
    assert [number for number, _ in seen] == [1, 2, 2, 2, 3]
    assert len({digest for _, digest in seen}) == 3
    assert found.tobytes() == run(tmp_path / "whole", configured(count=3, cohort=8)).tobytes()
    assert [one["void"] for one in without_seconds(tmp_path / "late")] == [0, 1, 1, 0, 0]


def test_a_run_that_ended_unfinished_goes_on_with_the_same_round_when_devices_come(tmp_path):
    config = configured(count=2, cohort=8, rounds={"patience": 2})

    def only_first(
        phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector
    ) -> Iterator[Reply]:
        return (honest if plan.round == 1 else one_of_four)(phase, cohort, plan, start)

    with pytest.raises(RunUnfinished, match=r"^1 of 2 rounds"):
        run(tmp_path / "cut", config, only_first)
    found = run(tmp_path / "cut", config)
    assert found.tobytes() == run(tmp_path / "whole", config).tobytes()
    assert [one["round"] for one in without_seconds(tmp_path / "cut")] == [1, 2, 2, 2]


def test_patience_is_for_attempts_in_a_row(tmp_path):
    calls: list[int] = []

    def every_third(
        phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector
    ) -> Iterator[Reply]:
        calls.append(plan.round)
        return (one_of_four if len(calls) % 3 else honest)(phase, cohort, plan, start)

    run(tmp_path, configured(count=4, rounds={"patience": 3}), every_third)
    assert calls == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_the_wait_grows_up_to_its_cap_on_devices_and_is_none_in_a_simulation():
    config = configured(rounds={"wait_s": 5.0})
    real = config.model_copy(update={"data": config.data.model_copy(update={"source": "devices"})})
    assert [void_rounds.wait_s(real, n) for n in (1, 2, 3, 4, 99)] == [1, 2, 4, 5, 5]
    assert [void_rounds.wait_s(config, n) for n in (1, 9)] == [0, 0]


def test_how_long_a_server_waits_is_no_part_of_what_a_run_is():
    plain = configured()
    assert (
        configured(rounds={"patience": 1, "wait_s": 1.0, "extra_releases": 9}).digest
        == plain.digest
    )


def test_the_line_of_a_void_round_names_who_is_missing_and_what_it_cost():
    record: RoundRecord = {
        "asked": 9, "answered": 1, "needed": 5, "attempt": 2, "wait_s": 4.0, "spent": False,
        "again": True,
        "missing": {
            "declined": {"keys": [1, 3]},
            "silent": {"keys": [4], "shares": [5]},
            "refused": {"7": "its keys are not signed"},
        },
    }  # fmt: skip
    assert void_rounds.sentence(record, {1: "ann", 7: "kim"}) == (
        "void, 2 in a row: 1 came of 5 needed; 2 declined (why stays on them) [keys]: 1 (ann), 3; "
        "1 no answer [keys]: 4; 1 no answer [shares]: 5; 1 did not fit: 7 (kim) (its keys are not "
        "signed); nothing was spent; asked again in 4 s"
    )
    assert "stays spent; asked" in void_rounds.sentence(record | {"spent": True, "again": False})


def test_the_quorum_itself_is_enough(tmp_path):
    def two_of_four(
        phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector
    ) -> Iterator[Reply]:
        yield from list(honest(phase, cohort, plan, start))[:2]

    assert run(tmp_path, configured(), two_of_four).any()
    (line,) = without_seconds(tmp_path)
    assert (line["answered"], line["declined"], line["void"]) == (2, 0, False)


@pytest.mark.parametrize("stranger", [False, True])
def test_an_answer_twice_or_unasked_stops_the_run_and_is_named(tmp_path, stranger):
    config = configured()
    other = min(set(range(8)) - set(asked(config)))

    def ask(phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector) -> Iterator[Reply]:
        yield from honest(phase, cohort, plan, start)
        client = other if stranger else min(cohort)
        yield Reply(client, contribution(client, plan))

    with pytest.raises(ProtocolError, match=r"round 1: client \d answered twice or was not asked"):
        run(tmp_path, config, ask)
    assert not (tmp_path / "rounds.jsonl").exists()


@pytest.mark.parametrize("cut", [lambda b: b[:-1], lambda b: b + b"\0", lambda _: b""])
def test_a_vector_that_does_not_fit_is_left_out_counted_and_named(tmp_path, caplog, cut):
    config = configured()
    first = asked(config)[0]

    def ask(phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector) -> Iterator[Reply]:
        for reply in honest(phase, cohort, plan, start):
            vector = reply.payload or b""
            yield Reply(reply.client, cut(vector) if reply.client == first else vector)

    found = run(tmp_path, config, ask)
    plain = sum(delta_of(one, 1) for one in asked(config)[1:]) / 4
    assert found == pytest.approx(plain, abs=1e-6)
    (line,) = without_seconds(tmp_path)
    assert (line["answered"], line["refused"], line["void"]) == (3, 1, False)
    assert f"round 1: client {first} is left out: {SIZE} residues" in caplog.text


def test_a_step_that_leaves_float32_stops_the_run_before_anything_is_kept(tmp_path):
    config = configured(rounds={"learning_rate": 1e42})
    with np.errstate(over="ignore"), pytest.raises(ConfigError, match=r"round 1: .*float32 holds"):
        run(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["plans.jsonl"]  # who was asked for what


# --- resume ------------------------------------------------------------------------------------

ADAM = {"count": 4, "optimizer": "fedadam", "learning_rate": 0.1}
SERVER = {"enabled": True, "noise_at": "server"}


class _Killed(BaseException):
    """Stands for kill -9: nothing of privet's catches it."""


@pytest.mark.parametrize("at", ["first reply", "last reply", "checkpoint", "log", "shown"])
def test_a_run_killed_anywhere_in_a_round_goes_on_to_the_same_bits(tmp_path, monkeypatch, at):
    config = configured(rounds=ADAM, privacy={"client": SERVER})
    whole = run(tmp_path / "whole", config)

    def ask(phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector) -> Iterator[Reply]:
        if at == "first reply" and plan.round == 3:
            raise _Killed
        yield from honest(phase, cohort, plan, start)
        if at == "last reply" and plan.round == 3:
            raise _Killed

    def show(record: Any) -> None:
        if at == "shown" and record["round"] == 3:
            raise _Killed

    save = checkpoint.save

    def dies_at_3(folder: Path, kept: checkpoint.Checkpoint) -> None:
        if kept.round == 3:
            raise _Killed
        save(folder, kept)

    with monkeypatch.context() as patch:
        if at == "checkpoint":
            patch.setattr(checkpoint, "save", dies_at_3)
        if at == "log":
            patch.setattr("privet.server.rounds.append_line", _no_third_line)
        with pytest.raises(_Killed):
            run(tmp_path / "cut", config, ask, show=show)
    assert run(tmp_path / "cut", config).tobytes() == whole.tobytes()
    assert without_seconds(tmp_path / "cut") == without_seconds(tmp_path / "whole")


def _no_third_line(path: Path, value: dict[str, Any]) -> None:
    if value.get("round") == 3:
        raise _Killed
    with path.open("a") as log:
        log.write(json.dumps(value) + "\n")


def test_a_damaged_checkpoint_falls_back_says_so_and_sums_no_shown_round_again(tmp_path, caplog):
    """Fresh server noise on a sum that was shown would be a second release of it."""
    config = configured(rounds=ADAM | {"count": 3}, privacy={"client": SERVER})
    run(tmp_path, config)
    current = tmp_path / checkpoint.CURRENT
    current.write_bytes(current.read_bytes()[:100])
    rounds: list[int] = []

    def ask(phase: str, cohort: Mapping[int, bytes], plan: Plan, start: Vector) -> Iterator[Reply]:
        rounds.append(plan.round)
        return honest(phase, cohort, plan, start)

    run(tmp_path, config, ask)
    assert rounds == []
    assert "Going on from the previous one" in caplog.text
    assert "rounds 3 to 3 are lost and are not run again" in caplog.text
    assert [line["round"] for line in without_seconds(tmp_path)] == [1, 2, 3]
    assert list(tmp_path.glob(checkpoint.CURRENT + ".damaged-*"))


def test_a_log_without_its_checkpoint_is_refused(tmp_path):
    config = configured()
    run(tmp_path, config)
    (tmp_path / checkpoint.CURRENT).unlink()
    with pytest.raises(CheckpointCorrupt, match="has 1 rounds, but the checkpoint"):
        run(tmp_path, config)


@pytest.mark.parametrize("change", ["run", "layout", "config_hash"])
def test_a_checkpoint_of_something_else_is_refused_and_kept(tmp_path, change):
    config = configured(count=2)
    run(tmp_path, config)
    kept = checkpoint.load(tmp_path, run=RUN, config_hash=config.digest, layout=LAYOUT)
    assert kept is not None
    changed: dict[str, Any] = {change: "other"}
    checkpoint.save(tmp_path, dataclasses.replace(kept, **changed))
    before = (tmp_path / checkpoint.CURRENT).read_bytes()
    with pytest.raises(CheckpointCorrupt, match=f"has {change} 'other'"):
        run(tmp_path, config)
    assert (tmp_path / checkpoint.CURRENT).read_bytes() == before


# --- plans -------------------------------------------------------------------------------------


def test_a_plan_is_on_disk_before_anybody_is_asked(tmp_path):
    config = configured(count=2)
    seen = []

    def ask(_phase, messages, plan, adapter):
        kept = [line["plan"] for line in read_lines(tmp_path / PLANS)]
        assert kept[-1] == plan.to_dict()
        assert read_lines(tmp_path / PLANS)[-1]["dimension"] == len(adapter)
        assert read_lines(tmp_path / PLANS)[-1]["asked"] == sorted(messages)
        seen.append(plan.round)
        return honest(_phase, messages, plan, adapter)

    run(tmp_path, config, ask)
    assert seen == [1, 2]
    assert [line["plan"]["round"] for line in read_lines(tmp_path / PLANS)] == [1, 2]


def test_a_round_begun_again_after_a_crash_has_its_plan_written_once(tmp_path):
    def crash(*_):
        raise RuntimeError

    config = configured(count=1)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            run(tmp_path, config, crash)
    run(tmp_path, config)
    assert len(read_lines(tmp_path / PLANS)) == 1
