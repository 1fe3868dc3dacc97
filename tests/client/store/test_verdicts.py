"""verdicts.py: verdicts are kept in the vault and become pairs; nothing of them leaves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.store import key_file as unlock_module
from privet.client.store import verdicts as feedback
from privet.client.store.device_store import DeviceStore
from privet.client.store.erase import destroy
from privet.client.store.key_file import Passphrase
from privet.client.store.vault import FILE
from privet.client.store.verdicts import MAX_TEXT, SIDE_BY_SIDE, Pair, Verdict, check, pairs
from privet.common.errors import DataError, StateError

NOW = 1_800_000_000.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceStore]:
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)
    with DeviceStore.create(tmp_path / "home", Passphrase("own")) as made:
        yield made


def accept(answer: str, time: float, over: str | None = None, prompt: str = "tea?") -> Verdict:
    return Verdict("accept", prompt, answer, over=over, time=time)


def reject(answer: str, time: float, prompt: str = "tea?") -> Verdict:
    return Verdict("reject", prompt, answer, time=time)


def edit(answer: str, edited: str, time: float, prompt: str = "tea?") -> Verdict:
    return Verdict("edit", prompt, answer, edited=edited, time=time)


def orders(verdicts: list[Verdict]) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in pairs(verdicts)]


# --- what a verdict is --------------------------------------------------------------------------


def test_a_verdict_is_what_was_given_with_a_time():
    fields = {"kind": "accept", "prompt": "tea?", "answer": "green", "over": "black"}
    assert check(fields, "here", NOW) == accept("green", NOW, "black")
    assert check({**fields, "time": 5}, "here", NOW).time == 5.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "like", "answer": "a"}, "accept, reject, edit"),
        ({"answer": "a"}, "accept, reject, edit"),
        ({"kind": "reject"}, '"answer" must be a text'),
        ({"kind": "reject", "answer": "  "}, '"answer" must be a text'),
        ({"kind": "reject", "answer": 3}, "found int"),
        ({"kind": "reject", "answer": "a" * (MAX_TEXT + 1)}, "20,001 characters"),
        ({"kind": "reject", "answer": "\ud800"}, "surrogate"),
        ({"kind": "reject", "answer": "a", "over": "b"}, "'over' does not belong to reject"),
        ({"kind": "edit", "answer": "a"}, "what the answer became"),
        ({"kind": "edit", "answer": "a", "edited": " a "}, "the answer itself"),
        ({"kind": "accept", "answer": "a", "over": "a"}, "the answer itself"),
        ({"kind": "accept", "answer": "a", "time": "now"}, "seconds since 1970"),
        ({"kind": "accept", "answer": "a", "time": NOW + 1}, "not in the future"),
        ({"kind": "accept", "answer": "a", "time": float("nan")}, "seconds since 1970"),
        ({"kind": "accept", "answer": "a", "time": 10**400}, "seconds since 1970"),
        ({"kind": "accept", "answer": "a", "time": True}, "seconds since 1970"),
    ],
)
def test_what_is_no_verdict_is_refused_in_a_sentence(fields: dict[str, object], said: str):
    with pytest.raises(DataError, match=said) as error:
        check(fields, "line 3", NOW)
    assert str(error.value).startswith("line 3: ")


# --- pairs --------------------------------------------------------------------------------------


def test_an_edit_is_preferred_to_what_it_was_made_of():
    assert pairs([edit("warm", "warm and sweet", 7.0)]) == (
        Pair("tea?", "warm and sweet", "warm", 7.0),
    )


def test_the_answer_taken_is_preferred_to_the_one_beside_it():
    assert orders([accept("green", 1, over="black")]) == [("green", "black")]


def test_accepted_answers_are_preferred_to_rejected_ones_of_the_same_prompt_only():
    verdicts = [accept("a", 1), reject("b", 2), reject("c", 3, prompt="coffee?"), accept("d", 4)]
    assert orders(verdicts) == [("a", "b"), ("d", "b")]


def test_one_verdict_alone_is_no_pair():
    assert orders([accept("a", 1), accept("b", 2)]) == []
    assert orders([reject("a", 1), reject("b", 2)]) == []


def test_the_later_of_two_contradicting_verdicts_stands():
    assert orders([accept("a", 1), reject("b", 2), reject("a", 3), accept("b", 4)]) == [("b", "a")]
    assert orders([accept("a", 1, over="b"), accept("b", 2, over="a")]) == [("b", "a")]
    assert orders([accept("b", 2, over="a"), accept("a", 1, over="b")]) == [("b", "a")]


def test_an_accepted_answer_is_paired_with_the_latest_few_rejected_ones():
    verdicts = [accept("a", 0), *(reject(f"b{i}", i + 1) for i in range(SIDE_BY_SIDE + 3))]
    assert orders(verdicts) == [("a", f"b{i}") for i in range(3, SIDE_BY_SIDE + 3)]


@given(
    st.lists(
        st.builds(
            lambda kind, a, b, time: {
                "accept": accept(f"{a}", time, f"{b}" if a != b else None),
                "reject": reject(f"{a}", time),
                "edit": edit(f"{a}", f"{b}!", time),
            }[kind],
            st.sampled_from(["accept", "reject", "edit"]),
            st.integers(0, 3),
            st.integers(0, 3),
            st.integers(0, 20).map(float),
        ),
        max_size=30,
    )
)
def test_pairs_are_in_order_of_time_and_never_contradict_each_other(verdicts: list[Verdict]):
    found = pairs(verdicts)
    assert [pair.time for pair in found] == sorted(pair.time for pair in found)
    both = {(pair.prompt, frozenset((pair.chosen, pair.rejected))) for pair in found}
    assert len(both) == len(found)
    assert all(pair.chosen != pair.rejected for pair in found)


# --- kept on the device -------------------------------------------------------------------------


def test_verdicts_survive_a_restart_with_their_numbers(home: DeviceStore):
    given_ = [accept("green", 1, "black"), reject("white", 2), edit("warm", "warm, please", 3)]
    assert feedback.add(home, given_[:2]) == [1, 2]
    assert feedback.add(home, given_[2:]) == [3]
    home.close()
    with DeviceStore.open(home.folder, Passphrase("own")) as again:
        assert feedback.kept(again) == dict(enumerate(given_, start=1))
        records = feedback.own_records(again)
    assert [(r.prompt, r.text, r.rejected) for r in records] == [
        ("tea?", "green", "black"),
        ("tea?", "green", "white"),
        ("tea?", "warm, please", "warm"),
    ]


def test_some_or_all_verdicts_are_forgotten_and_numbers_are_not_mixed_up(home: DeviceStore):
    feedback.add(home, [reject("a", 1), reject("b", 2), reject("c", 3)])
    assert feedback.forget(home, [2]) == 1
    assert list(feedback.kept(home)) == [1, 3]
    with pytest.raises(StateError, match="no verdict 2"):
        feedback.forget(home, [1, 2])
    assert list(feedback.kept(home)) == [1, 3]
    assert feedback.forget(home, None) == 2
    assert feedback.kept(home) == {}


def test_more_verdicts_than_are_kept_are_refused_as_a_whole(
    home: DeviceStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feedback, "MAX_VERDICTS", 2)
    feedback.add(home, [reject("a", 1)])
    with pytest.raises(StateError, match="at most 2"):
        feedback.add(home, [reject("b", 2), reject("c", 3)])
    assert list(feedback.kept(home)) == [1]


def test_on_the_disk_no_verdict_can_be_read_and_forgetting_the_device_erases_them(
    home: DeviceStore,
):
    feedback.add(home, [accept("quite unmistakable", 1, "something else entirely")])
    home.close()
    for path in home.folder.iterdir():
        assert b"unmistakable" not in path.read_bytes()
    destroy(home.folder)
    assert not (home.folder / FILE).exists()


def test_texts_are_masked_in_repr():
    shown = repr(edit("secret", "secrets", 1)) + repr(Pair("secret", "secret", "secret", 1.0))
    assert "secret" not in shown


def test_no_code_that_makes_bytes_for_the_server_reads_verdicts():
    """What a device says is made by these files; a verdict has no way into them but training."""
    import privet.client

    folder = Path(privet.client.__file__).parent
    for name in (
        "app", "commands/device_status", "enrolled/join", "personal/person_losses",
        "privacy/gate", "privacy/masked_upload", "runtime/worker",
    ):  # fmt: skip
        code = (folder / f"{name}.py").read_text()
        assert "feedback" not in code
        assert "verdicts" not in code
