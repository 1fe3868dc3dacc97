"""The whole protocol: the sum is the plain sum, whoever drops out wherever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import ConfigError, RoundVoid
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, quorum
from privet.experiments.protocol import DROPOUT_PHASES, Device, run
from privet.server import unmasking as server

from ..masking_party import identity, stream, terms

POLICY = MaskingPolicy(min_cohort=3, min_survivors=2, colluders=0)


def cohort(size: int, policy: MaskingPolicy = POLICY) -> dict[int, Device]:
    return {3 * n + 1: Device(3 * n + 1, identity(n), policy) for n in range(size)}


def plain_sum(vectors, survivors, bits: int) -> np.ndarray:
    total = np.sum([vectors[n] for n in survivors], axis=0, dtype=np.uint64)
    return np.asarray(total & np.uint64((1 << bits) - 1), dtype=np.uint32)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_sum_is_the_plain_sum_at_every_dropout_point_degree_and_modulus(data):
    size = data.draw(st.integers(3, 9), label="clients")
    bits = data.draw(st.sampled_from([8, 12, 16, 20, 31, 32]), label="bits")
    degree = data.draw(st.sampled_from([size - 1, *range(2, size - 1, 2)]), label="degree")
    holders = degree + 1
    threshold = data.draw(st.integers(holders // 2 + 1, holders), label="threshold")
    survivors = data.draw(st.integers(2, size), label="survivors")
    when = data.draw(st.lists(st.sampled_from([*DROPOUT_PHASES, *[None] * 4]), min_size=size,
                              max_size=size), label="lost")  # fmt: skip
    its = terms(bits=bits, survivors=survivors, colluders=0, dimension=data.draw(st.integers(1, 9)))
    devices = cohort(size)
    top = (1 << bits) - 1
    numbers = st.lists(st.integers(0, top), min_size=its.dimension, max_size=its.dimension)
    vectors = {n: np.array(data.draw(numbers), dtype=np.uint32) for n in devices}
    lost = {phase: [n for n, at in zip(devices, when, strict=True) if at == phase]
            for phase in DROPOUT_PHASES}  # fmt: skip
    left = [size - sum(when.count(phase) for phase in DROPOUT_PHASES[:i]) for i in range(1, 6)]
    graph = Graph(degree, threshold)
    least = max(survivors, threshold, quorum(left[0], 0))
    with pytest.MonkeyPatch.context() as patch:  # sparse graphs are below every policy
        patch.setattr(MaskingPolicy, "refuse_cohort", lambda *_: None)
        try:
            found = run(its, devices, vectors, lost, stream("law"), lambda _: graph)
        except RoundVoid:
            assert degree < size - 1 or min(left) < least
            assert any(when)
            return
    assert degree < size - 1 or min(left) >= threshold
    assert min(left) >= quorum(left[0], 0)
    assert left[2] >= survivors
    expected = [
        n for n, at in zip(devices, when, strict=True) if at in ("vector", "confirming", None)
    ]
    assert set(found.survivors) <= set(expected)
    if degree == size - 1:
        assert found.survivors == tuple(expected)
        pairs = zip(devices, when, strict=True)
        assert found.dropped == tuple(n for n, at in pairs if at in ("shares", "training"))
    assert np.array_equal(found.total, plain_sum(vectors, found.survivors, bits))
    assert not found.refused


@pytest.mark.parametrize("phase", DROPOUT_PHASES)
@pytest.mark.parametrize("count", [1, 3])
def test_in_a_full_graph_each_phase_may_lose_a_third_and_one_more_voids(phase, count):
    devices = cohort(10, MaskingPolicy(colluders=2))
    its = terms(survivors=7, colluders=2, dimension=3)
    vectors = {n: np.array([n, 2 * n, (1 << 20) - n], dtype=np.uint32) for n in devices}
    lost = list(devices)[:count]
    found = run(its, devices, vectors, {phase: lost}, stream("third"))
    assert np.array_equal(found.total, plain_sum(vectors, found.survivors, 20))
    again = {n: Device(n, device.identity, device.policy) for n, device in devices.items()}
    with pytest.raises(RoundVoid, match=r"nothing is revealed|fewer than the threshold"):
        run(its, again, vectors, {phase: list(devices)[:4]}, stream("void"))


def test_losses_in_every_phase_at_once_leave_the_sum_of_the_rest():
    devices = cohort(90, MaskingPolicy())
    numbers = list(devices)
    its = terms(survivors=60, dimension=5)
    vectors = {n: np.full(5, n, dtype=np.uint32) for n in devices}
    lost = {phase: numbers[2 * i : 2 * i + 2] for i, phase in enumerate(DROPOUT_PHASES)}
    found = run(its, devices, vectors, lost, stream("all"))
    assert found.survivors == tuple(numbers[6:])
    assert found.dropped == tuple(numbers[2:6])
    assert np.array_equal(found.total, plain_sum(vectors, found.survivors, 20))


def test_devices_pin_identities_and_count_rounds():
    devices = cohort(5, MaskingPolicy(5, 3))
    vectors = {n: np.zeros(4, dtype=np.uint32) for n in devices}
    run(terms(), devices, vectors)
    for device in devices.values():
        assert device.last_round == 7
        assert device.directory.known.keys() == devices.keys()
    run(terms(round=8), devices, vectors)


def test_the_whole_protocol_is_a_function_of_its_randomness():
    def total(label: str) -> np.ndarray:
        devices = cohort(5, MaskingPolicy(5, 3))
        sent: list[bytes] = []
        original = server.add_vector

        def add_vector(running: server.Sum, number: int, message: bytes) -> None:
            sent.append(message)
            original(running, number, message)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "add_vector", add_vector)
            run(terms(), devices, {n: np.zeros(4, np.uint32) for n in devices}, None, stream(label))
        return np.frombuffer(b"".join(sent), np.uint8)

    assert np.array_equal(total("one"), total("one"))
    assert not np.array_equal(total("one"), total("two"))


def test_an_unknown_phase_is_refused():
    with pytest.raises(ConfigError, match="expected phases"):
        run(terms(), {}, {}, {"lunch": [1]})
