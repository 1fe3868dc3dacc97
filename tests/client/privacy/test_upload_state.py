"""A masking state comes back from its bytes as it was, and no other bytes become one."""

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.privacy.upload_state import decode, encode
from privet.common.errors import StateError
from privet.common.secure_aggregation.keys import Directory
from privet.server import unmasking as server

from ...masking_party import PHASES, Party, identity


def _states() -> dict[str, Any]:
    found = dict[str, Any]()
    for party in (Party(undealt=(13,)), Party(silent=(14,))):
        party.until("unmask")._unmask()
        for phase, states in party.states.items():
            found |= {f"{phase} {number}": state for number, state in states.items()}
    return found


STATES = _states()


def test_every_state_of_a_round_comes_back_as_it_was():
    assert {type(state).__name__ for state in STATES.values()} == {
        "Announced", "Shared", "Received", "Masked", "Confirmed", "Finished"
    }  # fmt: skip
    for state in STATES.values():
        again = decode(encode(state))
        assert again == state
        assert type(again) is type(state)


@pytest.mark.parametrize("last", PHASES[1:])
def test_a_round_whose_devices_are_stored_after_every_phase_gives_the_same_sum(last):
    party = Party(directory=Directory({n: identity(n).public for n in range(10, 15)}, True))
    for phase in PHASES:
        getattr(party, f"_{phase}")()
        if phase != last:
            stored = {n: encode(state) for n, state in party.states[phase].items()}
            party.states[phase] = {n: decode(data) for n, data in stored.items()}
    whole = Party(directory=party.directory)
    assert whole.outcome().total.tolist() == _total(party)


def _total(party: Party) -> Any:
    return server.unmask(party.served["confirm"], party.sent["unmask"]).total.tolist()


def test_what_is_kept_does_not_grow_with_the_directory():
    known = {n: identity(n).public for n in range(10, 15)}
    small, large = (
        Party(
            directory=Directory(known | {n: n.to_bytes(32, "big") for n in range(100, more)}, True)
        )
        for more in (100, 400)
    )
    for phase in PHASES[:2]:
        kept = []
        for party in (small, large):
            getattr(party, f"_{phase}")()
            kept.append({n: encode(state) for n, state in party.states[phase].items()})
        assert kept[0] == kept[1]


@given(st.sampled_from(sorted(STATES)), st.data())
def test_cut_bytes_and_bytes_that_follow_are_refused(name, data):
    whole = encode(STATES[name])
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(StateError, match=r"the device takes part again in the next round"):
        decode(whole[:cut])
    with pytest.raises(StateError, match="bytes follow their end"):
        decode(whole + data.draw(st.binary(min_size=1, max_size=9)))


@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused(data):
    with pytest.raises(StateError, match=r"at least 6 bytes|the magic bytes"):
        decode(data)


@settings(max_examples=300)
@given(st.sampled_from(sorted(STATES)), st.data())
def test_a_changed_byte_gives_a_sentence_or_the_state_of_exactly_these_bytes(name, data):
    whole = bytearray(encode(STATES[name]))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(whole))
    except StateError:
        return
    assert encode(found) == bytes(whole)


@pytest.mark.parametrize(
    ("at", "value", "sentence"),
    [(0, 80, "magic bytes"), (4, 1, "expected version 2, got 1"), (5, 0, "a kind from 1 to 6"),
     (5, 7, "a kind from 1 to 6, got 7"), (5, 2, "cut|has \\d+ bytes")],
)  # fmt: skip
def test_another_magic_version_or_kind_is_refused_with_the_reason(at, value, sentence):
    whole = bytearray(encode(STATES["keys 10"]))
    whole[at] = value
    with pytest.raises(StateError, match=sentence):
        decode(bytes(whole))


def test_no_refusal_shows_a_secret():
    state = STATES["receive 10"]
    whole = encode(state)
    for cut in range(0, len(whole), 7):
        with pytest.raises(StateError) as refused:
            decode(whole[:cut])
        assert state.seed.value.hex() not in str(refused.value)
        assert repr(state.seed.value) not in str(refused.value)


PACKAGES = ("client", "common", "experiments", "server")
UNSAFE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def _imported(path: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_no_module_loads_bytes_that_could_run_code():
    """Flower and Ray pickle what they move between processes of one machine; privet does not."""
    top = Path(__file__).resolve().parents[3]
    files = [path for name in PACKAGES for path in sorted((top / name).rglob("*.py"))]
    assert len(files) > 100
    found = {str(path.relative_to(top)): _imported(path) & UNSAFE for path in files}
    assert {path: names for path, names in found.items() if names} == {}
