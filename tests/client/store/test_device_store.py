"""device_store.py and watched_folders.py: what a device keeps, agrees to, writes down, forgets."""

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.enrolled.participant import EnrolledParticipant
from privet.client.import_texts import watched_folders
from privet.client.import_texts.scan import Limits, key_of
from privet.client.store import device_store as homes
from privet.client.store import key_file as unlock_module
from privet.client.store.device_store import ME, DeviceStore, Joined, _above, _when
from privet.client.store.key_file import Passphrase
from privet.client.training.records import Record
from privet.common.errors import PrivacyError, StateError
from privet.common.privacy.accounting import Charge
from privet.common.secure_aggregation.keys import Directory
from privet.common.settings.config import parse, to_toml

SERVER = "fl.example.org:9092"
OTHERS = Directory({n: bytes([n]) * 32 for n in range(1, 17)}, closed=True)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A passphrase that costs nothing to try."""
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[DeviceStore]:
    with DeviceStore.create(tmp_path / "home", Passphrase("own")) as made:
        ask_for_no_example_noise(made.folder)
        made.join(Joined(SERVER, "PEM", closed=True), OTHERS)
        yield made


def text(**sections: Any) -> str:
    """A run at client level only, whose accounting takes no time."""
    table: dict[str, Any] = {
        "data": {"clients": 16, "source": "devices"},
        "rounds": {"cohort": 16},
        "privacy": {"client": {"noise_at": "distributed"}, "example": {"enabled": False}},
    }
    return to_toml(parse({**table, **sections}))


def ask_for_no_example_noise(folder: Path) -> None:
    """The policy that such a run needs."""
    path, key = folder / "policy.toml", "min_example_noise ="
    path.write_text(path.read_text().replace(f"{key} 0.5", f"{key} 0.0"))


def ask_nobody(home: DeviceStore) -> None:
    path = home.folder / "policy.toml"
    path.write_text(path.read_text().replace("ask = true", "ask = false"))


def charge() -> Charge:
    return Charge("client", "server", "add_remove", 2.0)


# --- making and opening -------------------------------------------------------------------------


def test_what_a_home_is_survives_a_restart(tmp_path: Path, home: DeviceStore):
    identity, card = home.identity.public, home.card
    home.close()
    with DeviceStore.open(tmp_path / "home", Passphrase("own")) as again:
        assert (again.identity.public, again.card) == (identity, card)
        assert json.loads(card)["identity"] == identity.hex()
        assert again.joined == Joined(SERVER, "PEM", closed=True)
        assert again.directory == OTHERS


def test_a_second_home_in_one_folder_is_refused_and_the_first_stays(
    tmp_path: Path, home: DeviceStore
):
    card = home.card
    with pytest.raises(StateError, match="left as it is"):
        DeviceStore.create(tmp_path / "home", Passphrase("other"))
    assert home.card == card


def test_the_folder_and_its_files_are_for_the_owner_alone(home: DeviceStore):
    assert home.folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in home.folder.iterdir())


def test_a_home_whose_making_was_interrupted_says_so(home: DeviceStore):
    home.vault.put_all({"card": None})
    with pytest.raises(StateError, match=r"interrupted.*privet client forget"):
        _ = home.card


# --- runs ----------------------------------------------------------------------------------------


def test_nothing_is_answered_before_the_owner_agrees_and_after_the_offer_changes(home: DeviceStore):
    assert not home.receive("run-1", text())
    with pytest.raises(PrivacyError, match="waits for your yes"):
        home.taking_part("run-1", begins=False)
    home.agree(home.run("run-1")[0], "owner")
    assert home.receive("run-1", text())
    assert home.taking_part("run-1", begins=False).run == "run-1"
    assert not home.receive("run-1", text(rounds={"cohort": 16, "count": 99}))
    with pytest.raises(PrivacyError, match="waits for your yes"):
        home.taking_part("run-1", begins=False)
    before = home.agreed("run-1")
    assert before is not None
    assert before[0].config.rounds.count != 99


@pytest.mark.parametrize(
    "fewer",
    [
        {"rounds": {"cohort": 15}},
        {"secure_aggregation": {"colluding": 2, "survivors": 0.9}},
        {"secure_aggregation": {"colluding": 3, "survivors": 0.8}},
    ],
)
def test_a_changed_run_whose_masks_promise_less_waits_for_the_owner_where_the_policy_agrees(
    home: DeviceStore, fewer: dict[str, Any]
):
    agreed = {"secure_aggregation": {"colluding": 3, "survivors": 0.9}}
    ask_nobody(home)
    assert home.receive("run-1", text(**agreed))
    assert home.receive("run-1", text(**agreed, rounds={"cohort": 16, "count": 3}))
    assert not home.receive("run-1", text(**{**agreed, **fewer}))
    assert home.receive("run-1", text(**agreed))
    home.receive("run-1", text(**{**agreed, **fewer}))
    home.agree(home.run("run-1")[0], "owner")
    assert home.receive("run-1", text(**{**agreed, **fewer}))


def test_no_flood_of_offers_makes_a_changed_run_a_first_one(
    home: DeviceStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(homes, "MAX_RUNS", 3)
    weaker = text(secure_aggregation={"colluding": 2})
    ask_nobody(home)
    assert home.receive("run-1", text(secure_aggregation={"colluding": 3}))
    assert not home.receive("run-1", weaker)
    refused = text(privacy={"client": {"noise_at": "server"}, "example": {"enabled": False}})
    for number in range(4):
        with pytest.raises(PrivacyError):
            home.receive(f"filler-{number}", refused)
    assert home.agreed("run-1") is not None
    assert not home.receive("run-1", weaker)


def test_a_no_stands_also_where_the_policy_says_yes_by_itself(home: DeviceStore):
    ask_nobody(home)
    assert home.receive("run-1", text())
    offer = home.run("run-1")[0]
    home.withdraw(offer)
    assert not home.receive("run-1", text())
    assert not home.receive(
        "run-1", text(rounds={"cohort": 17}, data={"clients": 17, "source": "devices"})
    )
    with pytest.raises(PrivacyError):
        home.taking_part("run-1", begins=False)
    home.agree(offer, "owner")
    assert home.receive("run-1", text())


def test_a_declined_run_is_not_said_to_wait(home: DeviceStore):
    offer = {"version": version("privet"), "run": "run-1", "config": text()}
    seat = EnrolledParticipant(home)
    seat.hello(offer)
    assert "waits for your yes" in str(home.last_note)
    home.withdraw(home.run("run-1")[0])
    home.note("another")
    assert seat.hello(offer)["accepted"] is False
    assert "another" in str(home.last_note)


def test_a_run_that_was_agreed_to_is_not_said_to_wait_any_more(home: DeviceStore):
    offer = {"version": version("privet"), "run": "run-1", "config": text()}
    EnrolledParticipant(home).hello(offer)
    home.agree(home.run("run-1")[0], "owner")
    assert home.last_note is None
    home.note("another")
    home.agree(home.run("run-1")[0], "owner")
    assert "another" in str(home.last_note)


def test_a_server_that_floods_a_device_with_offers_fills_no_disk(
    home: DeviceStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(homes, "MAX_RUNS", 3)
    home.receive("agreed", text())
    home.agree(home.run("agreed")[0], "owner")
    for number in range(6):
        home.receive(f"run-{number}", text())
    assert {offer.run for offer, _ in home.runs()} == {"agreed", "run-4", "run-5"}
    for offer, _ in home.runs():
        home.agree(offer, "owner")
    with pytest.raises(PrivacyError, match="keeps no more"):
        home.receive("one-more", text())


def test_a_paused_device_begins_no_round_and_finishes_the_one_it_is_in(home: DeviceStore):
    home.receive("run-1", text())
    home.agree(home.run("run-1")[0], "owner")
    home.pause(True)
    home.taking_part("run-1", begins=False)
    with pytest.raises(PrivacyError, match="paused"):
        home.taking_part("run-1", begins=True)


def test_leaving_ends_every_run_and_keeps_what_was_spent(home: DeviceStore):
    home.receive("run-1", text())
    home.agree(home.run("run-1")[0], "owner")
    home.ledger.check(ME, [charge()], {"client": 10.0}, 1e-5)
    home.ledger.commit(ME, "run-1", 1, "00", [charge()], b"payload")
    home.leave()
    assert home.joined is None
    assert home.runs() == []
    assert home.agreed("run-1") is None
    assert home.ledger.participations(ME) == home.releases == 1


def test_another_server_is_joined_after_leaving_the_first_only(home: DeviceStore):
    with pytest.raises(StateError, match="privet client leave"):
        home.join(Joined("other:1", "PEM", closed=True), OTHERS)
    home.leave()
    home.join(Joined("other:1", "PEM", closed=True), OTHERS)


# --- the outbox ----------------------------------------------------------------------------------


def test_the_outbox_has_everything_that_left_and_the_newest_bytes(
    home: DeviceStore, tmp_path: Path
):
    path = home.folder / "policy.toml"
    path.write_text(path.read_text().replace("keep_mb = 64.0", "keep_mb = 0.000019"))  # 19 bytes
    for number in range(4):
        home.sent("run-1", number, "vector", b"%010d" % number)
    assert [one.seq for one in home.outbox()] == [1, 2, 3, 4]
    assert [home.payload(seq) for seq in (1, 2, 3)] == [None] * 3
    assert home.payload(4) == b"0000000003"
    home.close()
    with DeviceStore.open(tmp_path / "home", Passphrase("own")) as again:
        again.sent("run-1", 9, "vector", b"x" * 9)
        assert [one.seq for one in again.outbox()] == [1, 2, 3, 4, 5]
        assert again.payload(4) is not None
        again.sent("run-1", 9, "vector", b"x" * 20)
        assert [again.payload(seq) for seq in (4, 5, 6)] == [None] * 3


@given(st.dictionaries(st.integers(1, 50), st.integers(0, 9)), st.integers(0, 60))
def test_what_is_kept_fits_and_is_the_newest(sizes: dict[int, int], limit: int):
    gone = _above(sizes, limit)
    kept = sizes.keys() - gone
    assert sum(sizes[seq] for seq in kept) <= limit
    assert all(one < other for one in gone for other in kept)
    if gone:
        assert sizes[max(gone)] + sum(sizes[seq] for seq in kept) > limit


# --- own records ---------------------------------------------------------------------------------


def scan(home: DeviceStore, *roots: Path, **given: Any) -> watched_folders.Scanned:
    return watched_folders.rescan(home, roots=[key_of(root) for root in roots], **given)


def texts(home: DeviceStore) -> list[str]:
    return [record.text for record in home.records()]


def write(path: Path, content: str, time: float) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    os.utime(path, (time, time))
    return path


def test_records_come_earliest_first_by_number_and_not_by_digits(home: DeviceStore, tmp_path: Path):
    write(tmp_path / "own" / "late.txt", "Written later.", 1_000_000_000)
    write(tmp_path / "own" / "early.txt", "Written first.", 999_999_999)
    scan(home, tmp_path / "own")
    assert texts(home) == ["Written first.", "Written later."]
    times = [record.time for record in home.records()]
    assert sorted(times, key=str) != times  # the order of digits, which it must not be


def test_times_of_every_kind_are_sorted():
    records = [
        Record("a", time="2020-01-01"),
        Record("b", time=-5.0),
        Record("c"),
        Record("d", time=3),
    ]
    assert [record.text for record in sorted(records, key=_when)] == ["c", "b", "d", "a"]


def test_a_rescan_holds_what_is_there_now(home: DeviceStore, tmp_path: Path):
    one = write(tmp_path / "own" / "one.txt", "The first text.", 1e9)
    two = write(tmp_path / "own" / "two.txt", "The second text.", 1e9 + 1)
    assert scan(home, tmp_path / "own").records == 2
    version = home.vault.version("sources")
    again = watched_folders.rescan(home)
    assert (again.unchanged, again.found, again.gone) == (2, (), 0)
    assert home.vault.version("sources") == version  # nothing was written
    one.unlink()
    write(two, "Another second text.", 1e9 + 2)
    after = watched_folders.rescan(home)
    assert (after.gone, after.records) == (1, 1)
    assert texts(home) == ["Another second text."]


def test_a_text_in_two_sources_is_held_once(home: DeviceStore, tmp_path: Path):
    write(tmp_path / "a" / "one.txt", "The same words.", 1e9)
    write(tmp_path / "b" / "one.txt", "The same words.", 1e9)
    assert scan(home, tmp_path / "a", tmp_path / "b", tmp_path / "a").records == 1
    assert texts(home) == ["The same words."]


def test_a_source_that_is_not_watched_any_more_leaves_no_records(home: DeviceStore, tmp_path: Path):
    write(tmp_path / "a" / "one.txt", "In a.", 1e9)
    write(tmp_path / "b" / "one.txt", "In b.", 1e9)
    scan(home, tmp_path / "a", tmp_path / "b")
    scan(home, tmp_path / "b")
    assert texts(home) == ["In b."]
    assert len(home.vault.names("records/")) == 1
    scan(home)
    assert home.records() == []


def test_what_was_ignored_says_why_at_every_scan_and_is_read_once(
    home: DeviceStore, tmp_path: Path
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "binary.txt").write_bytes(bytes(range(256)) * 20)
    first = scan(home, tmp_path / "own")
    assert len(first.ignored) == 1
    assert watched_folders.rescan(home).ignored == first.ignored


def test_a_scan_that_is_interrupted_changes_nothing(home: DeviceStore, tmp_path: Path):
    write(tmp_path / "own" / "one.txt", "The first text.", 1e9)
    scan(home, tmp_path / "own")
    write(tmp_path / "own" / "two.txt", "The second text.", 1e9)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched_folders.rescan(home, progress=stop)
    assert texts(home) == ["The first text."]


def test_of_two_scans_at_once_the_second_to_end_changes_nothing(home: DeviceStore, tmp_path: Path):
    write(tmp_path / "a" / "one.txt", "In a.", 1e9)
    write(tmp_path / "b" / "one.txt", "In b.", 1e9)
    scan(home, tmp_path / "a")
    write(tmp_path / "a" / "two.txt", "Also in a.", 1e9)
    asked: list[object] = []

    def meanwhile(item: object) -> None:
        if not asked:
            asked.append(item)
            scan(home, tmp_path / "a", tmp_path / "b")

    with pytest.raises(StateError, match="run it again"):
        watched_folders.rescan(home, progress=meanwhile)
    assert sorted(texts(home)) == ["Also in a.", "In a.", "In b."]
    assert len(watched_folders.read(home).roots) == 2  # what the other one added is not lost


def test_a_limit_is_kept_over_scans(home: DeviceStore, tmp_path: Path):
    limits = Limits(records=2)
    for number in range(4):
        write(tmp_path / "own" / f"{number}.txt", f"Text number {number}.", 1e9 + number)
    for _ in range(2):
        assert scan(home, tmp_path / "own", limits=limits).records == 2
        assert texts(home) == ["Text number 2.", "Text number 3."]


def test_sources_of_a_newer_privet_are_left_alone(home: DeviceStore):
    home.vault.put("sources", json.dumps({"format": 2}).encode())
    with pytest.raises(StateError, match="format 2"):
        watched_folders.rescan(home, roots=[])
    assert json.loads(home.vault.get("sources") or b"") == {"format": 2}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=6))
def test_any_order_of_adding_and_removing_ends_the_same(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
):
    folder = tmp_path_factory.mktemp("order")
    with DeviceStore.create(folder / "home", Passphrase("own")) as home:
        for word in words:
            path = folder / "own" / f"{word}.txt"
            if path.exists():
                path.unlink()
            else:
                write(path, f"The word {word}.", 1e9)
            (folder / "own").mkdir(exist_ok=True)
            scan(home, folder / "own")
        left = {f"The word {path.stem}." for path in (folder / "own").glob("*.txt")}
        assert set(texts(home)) == left
        assert watched_folders.read(home).records == len(left)
