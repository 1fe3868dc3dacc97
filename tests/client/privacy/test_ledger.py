"""The ledger: counted before it leaves, found when changed, refused when spent."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.privacy.ledger import Declined, Ledger, Limit, verify
from privet.client.privacy.ledger_chain import RawRow, row_hash
from privet.common.errors import BudgetExceeded, LedgerCorrupt, PrivacyError, StateError
from privet.common.privacy.accounting import Charge, epsilon

DELTA = 1e-5
CHARGE = Charge("client", "server", "add_remove", 4.0)
EXAMPLE = Charge("example", "analyst", "add_remove", 8.0)
UNLIMITED = {"client": 1e6, "example": 1e6}

# Importing dp_accounting takes a second; a child that dies or fills a disk computes no epsilon.
CHILD = """
import os, signal, sys, types

class Charge:
    unit, against, adjacency = line = ("client", "server", "add_remove")
    to_json = lambda self: "{}"
    from_json = staticmethod(lambda text: CHARGE)

CHARGE = Charge()
fake = types.ModuleType("privet.common.privacy.accounting")
fake.Charge, fake.epsilon = Charge, lambda charges, delta: 0.0
fake.within = lambda charges, delta, budget: True
sys.modules[fake.__name__] = fake
from privet.client.privacy.ledger import Ledger

def release(ledger, round, client="ann"):
    payload = f"payload {round}".encode()
    ledger.check(client, [CHARGE], {"client": 1e6}, 1e-5)
    ledger.commit(client, "run-1", round, "ab", [CHARGE], payload)
    return payload

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledgers.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path, owner="run-1") as opened:
        yield opened


def release(
    ledger: Ledger,
    client: str,
    round: int,
    charges: list[Charge] | None = None,
    budgets: dict[str, float] | None = None,
) -> bytes:
    """What the gate does; the returned bytes are what leaves."""
    payload = f"{client} {round}".encode()
    charges = [CHARGE] if charges is None else charges
    ledger.check(client, charges, UNLIMITED if budgets is None else budgets, DELTA)
    ledger.commit(client, "run-1", round, "ab", charges, payload)
    return payload


def filled(path: Path) -> None:
    with Ledger.open(path, owner="run-1") as ledger:
        for round in (1, 2, 3, 4):
            for client in ("ann", "bob"):
                release(ledger, client, round)


def budget_for(releases: int) -> float:
    return float(epsilon([CHARGE] * releases, DELTA)) * 1.001


# What is recorded


def test_a_release_is_recorded_with_everything_it_says(ledger: Ledger) -> None:
    release(ledger, "ann", 1, [CHARGE, EXAMPLE])
    release(ledger, "ann", 2)
    first, second = ledger.rows("ann")
    assert (first.seq, first.client, first.run, first.round) == (1, "ann", "run-1", 1)
    assert first.plan == "ab"
    assert first.charges == (CHARGE, EXAMPLE)
    assert second.previous == first.hash
    assert ledger.charges("ann") == (CHARGE, EXAMPLE, CHARGE)
    assert ledger.participations("ann") == 2
    assert ledger.participations("nobody") == 0
    assert ledger.clients() == ["ann"]


def test_a_round_is_recorded_once(ledger: Ledger) -> None:
    release(ledger, "ann", 1)
    with pytest.raises(StateError, match="released round 1 of run 'run-1' already"):
        release(ledger, "ann", 1)
    assert ledger.participations("ann") == 1


def test_declined_rounds_are_kept_and_cost_nothing(ledger: Ledger) -> None:
    ledger.decline("bob", "run-1", 2, "over budget")
    ledger.decline("ann", "run-1", 1, "busy")
    ledger.decline("ann", "run-1", 1, "over budget")
    assert ledger.declined() == [
        Declined("ann", "run-1", 1, "over budget"),
        Declined("bob", "run-1", 2, "over budget"),
    ]
    assert ledger.declined("bob") == [Declined("bob", "run-1", 2, "over budget")]
    assert ledger.participations("ann") == 0


# The budget


def test_what_is_spent_grows_with_every_round_and_survives_a_restart(path: Path) -> None:
    spent = []
    for round in range(1, 6):
        with Ledger.open(path, owner="run-1") as ledger:
            release(ledger, "ann", round)
            spent.append(epsilon(ledger.charges("ann"), DELTA))
    assert all(b > a for a, b in pairwise(spent))
    assert spent[-1] == pytest.approx(epsilon([CHARGE] * 5, DELTA))


def test_a_server_that_picks_one_client_every_round_is_refused_by_that_clients_ledger(
    path: Path,
) -> None:
    """The trap: the epsilon of one round reported, and compared, as the total."""
    budgets = {"client": budget_for(3)}
    answered = 0
    refusal = ""
    for round in range(1, 11):
        with Ledger.open(path, owner="run-1") as ledger:  # restarts do not help the server
            try:
                release(ledger, "ann", round, budgets=budgets)
                answered += 1
            except BudgetExceeded as error:
                refusal = str(error)

    planned_per_round = epsilon([CHARGE], DELTA)  # the faulty version
    faulty_answered = sum(planned_per_round <= budgets["client"] for _ in range(1, 11))

    assert answered == 3
    assert faulty_answered == 10
    for part in ("'ann'", "client-level", "server", "add_remove", "1e-05", "nothing was spent"):
        assert part in refusal
    for value in (epsilon([CHARGE] * 3, DELTA), epsilon([CHARGE] * 4, DELTA), budgets["client"]):
        assert f"{value:.6g}" in refusal


def test_the_budget_holds_for_each_unit_and_each_adversary_apart(ledger: Ledger) -> None:
    against_analyst = Charge("client", "analyst", "add_remove", 8.0)
    both = [CHARGE, against_analyst, EXAMPLE]
    example_budget = epsilon([EXAMPLE], DELTA) * 1.001
    # Two adversaries are two lines: their epsilons are not added up.
    release(ledger, "ann", 1, both, {"client": budget_for(1), "example": example_budget})
    with pytest.raises(BudgetExceeded, match="client-level epsilon against the server"):
        release(ledger, "ann", 2, both, {"client": budget_for(1), "example": 100.0})
    with pytest.raises(BudgetExceeded, match="example-level epsilon against the analyst"):
        release(ledger, "ann", 2, both, {"client": 100.0, "example": example_budget})
    # What was spent counts against a budget even where the new release does not touch its unit.
    with pytest.raises(BudgetExceeded, match="example-level"):
        release(ledger, "ann", 2, [CHARGE], {"client": 100.0, "example": example_budget / 2})
    assert ledger.participations("ann") == 1


def test_a_runs_own_cap_counts_what_was_released_in_that_run_and_is_named(ledger: Ledger) -> None:
    cap = {"client": Limit(budget_for(2), "the run's own cap is 2", "Ask the operator")}

    def spend(run: str, round: int, budget: float = 1e6) -> None:
        ledger.check("ann", [CHARGE, EXAMPLE], {**UNLIMITED, "client": budget}, DELTA, run, cap)
        ledger.commit("ann", run, round, "ab", [CHARGE, EXAMPLE], b"bytes")

    for run in ("run-1", "run-2"):
        spend(run, 1)
        spend(run, 2)
        with pytest.raises(BudgetExceeded, match=r"of this run .* the run's own cap is 2; nothing"):
            spend(run, 3)
    owner = Limit(budget_for(4), "its owner allows so much", "Raise it")
    with pytest.raises(BudgetExceeded, match=r"its owner allows so much; .* Raise it\."):
        spend("run-3", 1, owner)
    assert ledger.participations("ann") == 4


def test_the_clients_of_one_file_have_their_own_budgets(ledger: Ledger) -> None:
    budgets = {"client": budget_for(1)}
    release(ledger, "ann", 1, budgets=budgets)
    release(ledger, "bob", 1, budgets=budgets)
    with pytest.raises(BudgetExceeded):
        release(ledger, "bob", 2, budgets=budgets)


@pytest.mark.parametrize("budgets", [{}, {"example": 100.0}, {"client": float("nan")}])
def test_a_unit_without_a_budget_has_nothing_to_spend(
    ledger: Ledger, budgets: dict[str, float]
) -> None:
    with pytest.raises(BudgetExceeded):
        release(ledger, "ann", 1, budgets=budgets)
    assert ledger.clients() == []


def test_a_release_without_charges_is_refused(ledger: Ledger) -> None:
    with pytest.raises(PrivacyError, match="at least one charge"):
        release(ledger, "ann", 1, [])


def test_a_commit_that_was_not_checked_as_it_is_now_is_refused(ledger: Ledger, path: Path) -> None:
    with pytest.raises(PrivacyError, match="not allowed by check"):
        ledger.commit("ann", "run-1", 1, "ab", [CHARGE], b"x")
    ledger.check("ann", [CHARGE], UNLIMITED, DELTA)
    with pytest.raises(PrivacyError, match="not allowed by check"):
        ledger.commit("ann", "run-1", 1, "ab", [CHARGE, CHARGE], b"x")
    # Two processes that both checked before either committed would pass the budget together.
    budgets = {"client": budget_for(1)}
    with Ledger.open(path, owner="run-1") as other:
        ledger.check("ann", [CHARGE], budgets, DELTA)
        other.check("ann", [CHARGE], budgets, DELTA)
        ledger.commit("ann", "run-1", 1, "ab", [CHARGE], b"x")
        with pytest.raises(PrivacyError, match="not allowed by check"):
            other.commit("ann", "run-1", 2, "ab", [CHARGE], b"y")
        assert other.participations("ann") == 1


# Asked again


def test_a_round_asked_again_gets_the_same_bytes_at_no_cost(ledger: Ledger, path: Path) -> None:
    assert ledger.resend("ann", "run-1", 1, "ab") is None
    payload = release(ledger, "ann", 1)
    with Ledger.open(path, owner="run-1") as later:
        assert later.resend("ann", "run-1", 1, "ab") == payload
        assert later.participations("ann") == 1


def test_a_round_asked_again_with_another_plan_gets_nothing(ledger: Ledger) -> None:
    release(ledger, "ann", 1)
    with pytest.raises(PrivacyError, match="answers a round once"):
        ledger.resend("ann", "run-1", 1, "cd")


def test_a_round_asked_again_after_a_later_release_gets_nothing(ledger: Ledger) -> None:
    release(ledger, "ann", 1)
    release(ledger, "ann", 2)
    with pytest.raises(PrivacyError, match="not kept any more"):
        ledger.resend("ann", "run-1", 1, "ab")
    assert ledger.resend("ann", "run-1", 2, "ab") == b"ann 2"


# Changed behind the ledger's back

FAULTS: dict[str, tuple[str, str]] = {
    "an edited charge": (
        "UPDATE release SET charges = replace(charges, '4.0', '40.0') "
        "WHERE client = 'ann' AND seq = 2",
        "client 'ann', row 2",
    ),
    "another run": (
        "UPDATE release SET run = 'run-2' WHERE client = 'ann' AND seq = 3",
        "client 'ann', row 3",
    ),
    "another round": (
        "UPDATE release SET round = 9 WHERE client = 'bob' AND seq = 1",
        "client 'bob', row 1",
    ),
    "a removed last row": (
        "DELETE FROM release WHERE client = 'ann' AND seq = 4",
        "client 'ann', row 4",
    ),
    "a removed last row, with its total": (
        "DELETE FROM release WHERE client = 'ann' AND seq = 4; UPDATE meta SET releases = 7",
        "client 'ann', row 4",
    ),
    "a removed last row, with its total and count": (
        "DELETE FROM release WHERE client = 'ann' AND seq = 4; UPDATE meta SET releases = 7;"
        "UPDATE head SET count = 3 WHERE client = 'ann'",
        "client 'ann', row 3",
    ),
    "a removed middle row": (
        "DELETE FROM release WHERE client = 'ann' AND seq = 2",
        "client 'ann', row 2",
    ),
    "a removed middle row, renumbered": (
        "DELETE FROM release WHERE client = 'ann' AND seq = 2;"
        "UPDATE release SET seq = seq - 1 WHERE client = 'ann' AND seq > 2;"
        "UPDATE head SET count = 3 WHERE client = 'ann'; UPDATE meta SET releases = 7",
        "client 'ann', row 2",
    ),
    "a removed first row": (
        "DELETE FROM release WHERE client = 'bob' AND seq = 1",
        "client 'bob', row 1",
    ),
    "reordered rows": (
        "UPDATE release SET seq = 9 WHERE client = 'ann' AND seq = 2;"
        "UPDATE release SET seq = 2 WHERE client = 'ann' AND seq = 3;"
        "UPDATE release SET seq = 3 WHERE client = 'ann' AND seq = 9",
        "client 'ann', row 2",
    ),
    "rows swapped between clients": (
        "UPDATE release SET client = 'eve' WHERE client = 'ann' AND seq = 4;"
        "UPDATE release SET client = 'ann' WHERE client = 'bob' AND seq = 4;"
        "UPDATE release SET client = 'bob' WHERE client = 'eve' AND seq = 4",
        "client 'ann', row 4",
    ),
    "all rows of a client given to another": (
        "UPDATE release SET client = 'zoe' WHERE client = 'bob';"
        "UPDATE head SET client = 'zoe' WHERE client = 'bob';"
        "UPDATE outbox SET client = 'zoe' WHERE client = 'bob'",
        "client 'zoe', row 1",
    ),
    "a head without rows": ("DELETE FROM release WHERE client = 'ann'", "client 'ann', row 4"),
    "rows without a head": ("DELETE FROM head WHERE client = 'ann'", "client 'ann', row 4"),
    "a client that is gone altogether": (
        "DELETE FROM release WHERE client = 'ann'; DELETE FROM head WHERE client = 'ann';"
        "DELETE FROM outbox WHERE client = 'ann'",
        "4 releases and should hold 8",
    ),
    "another payload": (
        "UPDATE outbox SET payload = CAST('y' AS BLOB) WHERE client = 'ann'",
        "client 'ann', row 4",
    ),
    "a payload that is gone": ("DELETE FROM outbox WHERE client = 'ann'", "client 'ann', row 4"),
    "another owner": ("UPDATE meta SET owner = 'run-2'", "client 'ann', row 1"),
}


def tamper(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_ledger_is_found_with_its_client_and_row(path: Path, fault: str) -> None:
    filled(path)
    assert verify(path, "run-1") == 8
    script, named = FAULTS[fault]
    tamper(path, script)
    with pytest.raises(LedgerCorrupt, match=named):
        verify(path)


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"another owner"}))
def test_a_client_whose_chain_was_changed_releases_nothing(path: Path, fault: str) -> None:
    filled(path)
    tamper(path, FAULTS[fault][0])

    def use() -> None:
        with Ledger.open(path, owner="run-1") as ledger:
            for client in ("ann", "bob", "zoe"):
                release(ledger, client, 9)

    with pytest.raises(LedgerCorrupt, match=r"left as it is.*restore the ledger"):
        use()


def test_the_other_clients_of_a_simulation_are_not_stopped_by_one_edited_row(path: Path) -> None:
    filled(path)
    tamper(path, FAULTS["an edited charge"][0])
    with Ledger.open(path, owner="run-1") as ledger:
        release(ledger, "bob", 9)
        for read in (ledger.rows, ledger.charges, ledger.participations):
            with pytest.raises(LedgerCorrupt, match="client 'ann', row 2"):
                read("ann")


def test_a_ledger_put_back_to_an_older_state_is_found_while_it_is_in_use(
    ledger: Ledger, path: Path
) -> None:
    release(ledger, "ann", 1)
    tamper(
        path,
        "DELETE FROM release; DELETE FROM head; DELETE FROM outbox; UPDATE meta SET releases = 0",
    )
    with pytest.raises(LedgerCorrupt, match="it was there and is gone"):
        release(ledger, "ann", 1)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    fields=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=3, max_size=3),
)
def test_no_two_different_rows_share_an_encoding(data: st.DataObject, fields: list[str]) -> None:
    def row(client: str, run: str, plan: str) -> RawRow:
        return RawRow(1, client, run, 1, plan, "[]", "", "", "")

    other = data.draw(st.permutations(fields) | st.just([fields[0] + fields[1], "", fields[2]]))
    same = row_hash("o", row(*fields)) == row_hash("o", row(*other))
    assert same == (list(fields) == list(other))


# Files that are not this ledger


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "cut to nothing":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(os.urandom(5000))
    elif kind == "holes":
        path.write_bytes(content[:4096] + bytes(len(content) - 4096))
    elif kind == "another database":
        path.unlink()
        tamper(path, "CREATE TABLE notes (text)")
    elif kind == "newer format":
        tamper(path, "UPDATE meta SET format = 99")


@pytest.mark.parametrize(
    "kind", ["cut", "cut to nothing", "garbage", "holes", "another database", "newer format"]
)
def test_a_damaged_file_is_refused_and_left_as_it_is(path: Path, kind: str) -> None:
    filled(path)
    damage(path, kind)
    content = path.read_bytes()
    for use in (lambda: Ledger.open(path, owner="run-1"), lambda: verify(path)):
        with pytest.raises(LedgerCorrupt, match=r"left as it (was|is)") as caught:
            use()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_the_ledger_of_another_run_is_refused_and_both_are_named(path: Path) -> None:
    filled(path)
    for use in (lambda: Ledger.open(path, owner="run-2"), lambda: verify(path, "run-2")):
        with pytest.raises(LedgerCorrupt, match="belongs to 'run-1', and 'run-2' was asked for"):
            use()


def test_a_journal_without_its_ledger_does_not_start_a_new_one(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"left over")
    with pytest.raises(LedgerCorrupt, match="moved or deleted"):
        Ledger.open(path, owner="run-1")
    assert not path.exists()


def test_verifying_a_missing_ledger_says_so_and_makes_none(path: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        verify(path)
    assert not path.exists()


# Disks


def test_a_full_disk_is_a_sentence_and_nothing_is_spent(ledger: Ledger, path: Path) -> None:
    release(ledger, "ann", 1)
    with ledger._transaction("BEGIN") as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
    ledger.check("ann", [CHARGE], UNLIMITED, DELTA)
    with pytest.raises(StateError, match="disk is full: free some space") as caught:
        ledger.commit("ann", "run-1", 2, "ab", [CHARGE], bytes(100_000))
    assert str(path) in str(caught.value)
    assert ledger.participations("ann") == 1
    assert ledger.resend("ann", "run-1", 1, "ab") == b"ann 1"
    with ledger._transaction("BEGIN") as db:
        db.execute("PRAGMA max_page_count = 1000000")
    release(ledger, "ann", 2)
    assert verify(path) == 2


def test_a_disk_that_fills_up_for_real_spends_nothing(path: Path) -> None:
    child = f"""{CHILD}
import resource
ledger = Ledger.open({str(path)!r}, owner="run-1")
release(ledger, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))
ledger.check("ann", [CHARGE], {{"client": 1e6}}, 1e-5)
ledger.commit("ann", "run-1", 2, "ab", [CHARGE], bytes(200_000))
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert "StateError" in done.stderr
    assert str(path) in done.stderr
    assert verify(path) == 1


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Takes away the right to write; root is not stopped by mode bits, so it steps down."""
    closed = [folder for folder in tmp_path.parents if not folder.stat().st_mode & 1]
    modes = {folder: folder.stat().st_mode for folder in closed}
    is_root = os.geteuid() == 0

    def take_away() -> None:
        tmp_path.chmod(0o555)
        if is_root:
            for folder in closed:
                folder.chmod(modes[folder] | 0o111)
            os.seteuid(65534)

    yield take_away
    if is_root:
        os.seteuid(0)
        for folder in closed:
            folder.chmod(modes[folder])
    tmp_path.chmod(0o755)


def test_a_read_only_folder_is_a_sentence(path: Path, unwritable: Callable[[], None]) -> None:
    unwritable()
    with pytest.raises(StateError, match="writable") as caught:
        Ledger.open(path, owner="run-1")
    assert str(path) in str(caught.value)


def test_a_ledger_in_a_folder_that_became_read_only_is_a_sentence(
    path: Path, unwritable: Callable[[], None]
) -> None:
    filled(path)
    unwritable()

    def use() -> None:
        with Ledger.open(path, owner="run-1") as ledger:
            release(ledger, "ann", 9)

    with pytest.raises(StateError, match="writable") as caught:
        use()
    assert not isinstance(caught.value, LedgerCorrupt)


# Crashes and many processes

STEPS = {
    "in check": ("BEGIN", 0),
    "before the transaction": ("BEGIN IMMEDIATE", 0),
    "before the payload": ("INSERT OR REPLACE INTO outbox", 0),
    "before the head": ("INSERT OR REPLACE INTO head", 0),
    "before the end of the transaction": ("COMMIT", 0),
    "after the transaction, before the bytes leave": ("", 1),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_process_killed_around_a_commit_spent_everything_or_nothing(
    path: Path, step: str
) -> None:
    statement, expected = STEPS[step]
    child = f"""{CHILD}
ledger = Ledger.open({str(path)!r}, owner="run-1")
print(release(ledger, 1).decode(), flush=True)
with ledger._transaction("BEGIN") as db:
    pass

def trace(text):
    # A read's COMMIT comes before the write's.
    if text == "BEGIN IMMEDIATE":
        trace.in_commit = True
    after_begin = trace.in_commit or {statement!r} != "COMMIT"
    if {statement!r} and text.startswith({statement!r}) and after_begin:
        die()
trace.in_commit = False
db.set_trace_callback(trace)
payload = release(ledger, 2)
die()
print(payload.decode(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split("\n")[:-1] == ["payload 1"]
    with Ledger.open(path, owner="run-1") as ledger:
        assert ledger.participations("ann") == 1 + expected
        again = ledger.resend("ann", "run-1", 2, "ab")
        assert again == (b"payload 2" if expected else None)
    assert verify(path) == 1 + expected


def test_bytes_that_leave_before_the_commit_are_not_counted_after_a_kill(path: Path) -> None:
    """The trap: send, then write down."""
    child = f"""{CHILD}
ledger = Ledger.open({str(path)!r}, owner="run-1")
ledger.check("ann", [CHARGE], {{"client": 1e6}}, 1e-5)
print("payload 1", flush=True)  # the faulty version
die()
ledger.commit("ann", "run-1", 1, "ab", [CHARGE], b"payload 1")
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    left = done.stdout.count("payload")
    assert left > verify(path)  # what the next test never sees


def test_a_row_is_there_for_all_bytes_that_left_before_a_kill_at_any_moment(path: Path) -> None:
    child = f"""{CHILD}
ledger = Ledger.open({str(path)!r}, owner="run-1")
for round in range(ledger.participations("ann") + 1, 1_000_000):
    print(release(ledger, round).decode(), flush=True)
"""
    left = 0
    for lines in (1, 3, 10, 4):
        with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().splitlines()
        left += lines + len(rest)
        counted = verify(path, "run-1")
        assert left <= counted <= left + 1
        left = counted


def test_two_processes_write_one_file_at_once(path: Path) -> None:
    child = f"""{CHILD}
for round in range(1, 21):
    with Ledger.open({str(path)!r}, owner="run-1") as ledger:
        release(ledger, round, sys.argv[1])
        release(ledger, 100 + round, sys.argv[1])
"""
    children = [
        subprocess.Popen([sys.executable, "-c", child, name], stderr=subprocess.PIPE)
        for name in ("ann", "bob")
    ]
    errors = [process.communicate()[1].decode() for process in children]
    assert errors == ["", ""]
    assert verify(path, "run-1") == 80


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_ledger_is_usable_on_both_sides_of_a_fork(ledger: Ledger, path: Path) -> None:
    release(ledger, "ann", 1)
    child = os.fork()
    if child == 0:
        try:
            for round in range(1, 11):
                release(ledger, "bob", round)
            ledger.close()
            os._exit(0)
        finally:
            os._exit(1)
    for round in range(2, 11):
        release(ledger, "ann", round)
    assert os.waitpid(child, 0)[1] == 0
    assert ledger.participations("bob") == 10
    assert verify(path, "run-1") == 20


def test_threads_share_a_ledger(ledger: Ledger, path: Path) -> None:
    threads = [
        threading.Thread(target=lambda n=name: [release(ledger, n, r) for r in range(1, 11)])
        for name in ("ann", "bob", "cat")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(path) == 30


def test_opening_leaves_no_other_file_behind(path: Path) -> None:
    filled(path)
    verify(path)
    with Ledger.open(path, owner="run-1"):
        pass
    left = {name for name in os.listdir(path.parent) if name.endswith(".tmp")}
    assert left == set()


KEPT_UNTIL_THE_END = """
import gc, sys
from functools import lru_cache
from privet.client.privacy.ledger import Ledger
@lru_cache
def kept():
    return Ledger.open(sys.argv[1], owner="run")
kept().decline("a", "run", 1, "why")
gc.freeze()
"""


def test_a_process_that_ends_leaves_its_ledger_in_one_file(tmp_path):
    path = tmp_path / "ledgers.sqlite"
    subprocess.run([sys.executable, "-c", KEPT_UNTIL_THE_END, path], check=True)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with Ledger.open(path, owner="run") as ledger:
        assert len(ledger.declined()) == 1


def test_releases_are_counted_by_run_and_round(ledger: Ledger) -> None:
    for client, round in (("ann", 1), ("bob", 1), ("ann", 3)):
        release(ledger, client, round)
    assert ledger.releases("run-1") == {1: 2, 3: 1}
    assert ledger.releases("run-2") == {}
