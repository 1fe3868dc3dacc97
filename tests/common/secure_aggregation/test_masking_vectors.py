"""Each message with one fault is refused with the sentence in tests/vectors."""

import json

import pytest

from ...make_vectors import PATH, Case, build, deliver

CASES = json.loads(PATH.read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_message_with_one_fault_is_refused_with_the_known_sentence(case):
    message = bytes.fromhex(case["message"])
    found = deliver(Case(case["name"], case["step"], message, case["setup"], case["sender"]))
    assert found == case["expected"]
    # sender and round are named
    assert found.startswith(("ProtocolError: round 7: ", "RoundVoid: round 7: "))
    assert " client " in found or "the server" in found


def test_there_are_enough_vectors_each_with_its_own_name():
    assert len({case["name"] for case in CASES}) == len(CASES) >= 40


def test_the_file_is_what_the_script_writes():
    assert build() == CASES
