"""The ledger kept in the vault: the same class, the same tests, and what is new about its place.

The tests in `SHARED` are those of `test_ledger`, run here once more: its names `Ledger`, `verify`
and `tamper` are given versions that use a vault, and its fixtures are this module's.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from privet.client.privacy import ledger_chain
from privet.client.privacy.ledger import Ledger
from privet.client.store.erase import destroy
from privet.client.store.vault import FILE, Keyring, Passphrase, Vault
from privet.common.errors import LedgerCorrupt, PrivacyError, StateError

from . import test_ledger
from .test_ledger import CHARGE, DELTA, UNLIMITED, release

SHARED = """
test_a_changed_ledger_is_found_with_its_client_and_row
test_a_client_whose_chain_was_changed_releases_nothing
test_a_commit_that_was_not_checked_as_it_is_now_is_refused
test_a_ledger_put_back_to_an_older_state_is_found_while_it_is_in_use
test_a_release_is_recorded_with_everything_it_says
test_a_release_without_charges_is_refused
test_a_round_asked_again_after_a_later_release_gets_nothing
test_a_round_asked_again_gets_the_same_bytes_at_no_cost
test_a_round_asked_again_with_another_plan_gets_nothing
test_a_round_is_recorded_once
test_a_server_that_picks_one_client_every_round_is_refused_by_that_clients_ledger
test_a_unit_without_a_budget_has_nothing_to_spend
test_declined_rounds_are_kept_and_cost_nothing
test_the_budget_holds_for_each_unit_and_each_adversary_apart
test_the_clients_of_one_file_have_their_own_budgets
test_the_other_clients_of_a_simulation_are_not_stopped_by_one_edited_row
test_threads_share_a_ledger
test_what_is_spent_grows_with_every_round_and_survives_a_restart
"""
globals().update({name: getattr(test_ledger, name) for name in SHARED.split()})

KEYS: dict[str, str] = {}


class FakeKeyring:
    """A keyring in memory, one for all vaults of this module."""

    def get_password(self, service: str, username: str) -> str | None:
        return KEYS.get(service + username)

    def set_password(self, service: str, username: str, password: str) -> None:
        KEYS[service + username] = password

    def delete_password(self, service: str, username: str) -> None:
        del KEYS[service + username]


UNLOCK = Keyring(FakeKeyring())


def vault_at(path: Path) -> Vault:
    """A vault of its own connection, as another process would have it."""
    folder = path.with_suffix(".home")
    return (Vault.open if (folder / FILE).exists() else Vault.create)(folder, UNLOCK)


class Opener:
    """What `test_ledger` calls Ledger."""

    @staticmethod
    def open(path: Path, *, owner: str) -> Ledger:
        return Ledger.in_vault(vault_at(path), owner=owner)


def database(vault: Vault) -> Any:
    return closing(ledger_chain.memory(vault.get("ledger")))


def verified(path: Path, owner: str | None = None) -> int:
    with vault_at(path) as vault, database(vault) as db:
        return sum(ledger_chain.inspect_open(path, db, owner, chains=True))


def tampered(path: Path, script: str) -> None:
    """Somebody with the vault's key: the chain is what is left."""
    with vault_at(path) as vault, database(vault) as db:
        db.executescript(script)
        vault.put("ledger", db.serialize())


@pytest.fixture(autouse=True)
def in_a_vault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_ledger, "Ledger", Opener)
    monkeypatch.setattr(test_ledger, "verify", verified)
    monkeypatch.setattr(test_ledger, "tamper", tampered)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def vault(path: Path) -> Iterator[Vault]:
    with vault_at(path) as opened:
        yield opened


@pytest.fixture
def ledger(vault: Vault) -> Iterator[Ledger]:
    with Ledger.in_vault(vault, owner="run-1") as opened:
        yield opened


def test_every_method_that_writes_has_written_the_vault_when_it_returns(
    ledger: Ledger, vault: Vault, path: Path
) -> None:
    seen = [vault.version("ledger")]
    for write in (
        lambda: release(ledger, "ann", 1),
        lambda: ledger.decline("ann", "run-1", 2, "busy"),
        lambda: ledger.announce("ann", "run-1", 3),
    ):
        write()
        seen.append(vault.version("ledger"))
    assert len(set(seen)) == 4
    with vault_at(path) as other, Ledger.in_vault(other, owner="run-1") as later:
        assert later.participations("ann") == 1
        assert [row.reason for row in later.declined()] == ["busy"]
        assert later.announce("ann", "run-1", 4) == 3
    assert ledger.announce("ann", "run-1", 5) == 4


def test_reading_writes_nothing(ledger: Ledger, vault: Vault) -> None:
    release(ledger, "ann", 1)
    before = vault.version("ledger")
    ledger.check("ann", [CHARGE], UNLIMITED, DELTA)
    ledger.resend("ann", "run-1", 1, "ab")
    assert (ledger.rows("ann"), ledger.clients(), ledger.declined()) == (
        ledger.rows("ann"),
        ["ann"],
        [],
    )
    assert vault.version("ledger") == before


def test_a_vault_that_cannot_be_written_spends_nothing_and_releases_nothing(
    ledger: Ledger, vault: Vault, path: Path
) -> None:
    release(ledger, "ann", 1)
    pages = vault._connected().execute("PRAGMA page_count").fetchone()[0]
    vault._connected().execute(f"PRAGMA max_page_count = {pages}")
    ledger.check("ann", [CHARGE], UNLIMITED, DELTA)
    with pytest.raises(StateError, match="disk is full"):
        ledger.commit("ann", "run-1", 2, "ab", [CHARGE], bytes(500_000))
    assert ledger.participations("ann") == 1
    assert ledger.resend("ann", "run-1", 1, "ab") == b"ann 1"
    with pytest.raises(PrivacyError, match="not allowed by check"):  # asked anew, like any other
        ledger.commit("ann", "run-1", 2, "ab", [CHARGE], b"x")
    vault._connected().execute("PRAGMA max_page_count = 1000000")
    release(ledger, "ann", 2)
    assert verified(path) == 2


def test_memory_that_is_kept_after_a_failed_write_counts_what_the_disk_does_not(
    ledger: Ledger, vault: Vault, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: the row stays in memory, resend gives its bytes away, a restart forgets it."""

    def full(*_: object) -> None:
        raise StateError("the disk is full")

    def commit(number: int) -> None:
        ledger.check("ann", [CHARGE], UNLIMITED, DELTA)
        with monkeypatch.context() as patch:
            patch.setattr(vault, "put", full)
            with pytest.raises(StateError, match="full"):
                ledger.commit("ann", "run-1", number, "ab", [CHARGE], b"bytes")

    commit(1)
    assert ledger.resend("ann", "run-1", 1, "ab") is None
    with monkeypatch.context() as faulty:
        faulty.setattr(ledger._storage, "close", lambda: None)
        commit(2)
        assert ledger.resend("ann", "run-1", 2, "ab") == b"bytes"  # left, and not on disk
    assert verified(path) == 0


def test_a_deleted_ledger_is_never_replaced_by_a_new_one(
    ledger: Ledger, vault: Vault, path: Path
) -> None:
    release(ledger, "ann", 1)
    vault.put_all({"ledger": None})
    for _ in (1, 2):
        with pytest.raises(LedgerCorrupt, match=r"had a ledger and has none.*must not release"):
            ledger.participations("ann")
        with pytest.raises(LedgerCorrupt, match="had a ledger and has none"):
            Ledger.in_vault(vault, owner="run-1")
    assert vault.names() == ["ledger-begun"]
    with vault_at(path) as other, pytest.raises(LedgerCorrupt, match="had a ledger"):
        Ledger.in_vault(other, owner="run-1")


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_an_entry_that_is_no_ledger_is_left_as_it_is(
    ledger: Ledger, vault: Vault, content: bytes
) -> None:
    vault.put("ledger", content)
    with pytest.raises(LedgerCorrupt, match="left as it is"):
        release(ledger, "ann", 1)
    with pytest.raises(LedgerCorrupt, match="left as it is"):
        Ledger.in_vault(vault, owner="run-1")
    assert vault.get("ledger") == content


def test_the_ledger_of_another_owner_is_refused(ledger: Ledger, vault: Vault) -> None:
    release(ledger, "ann", 1)
    with pytest.raises(LedgerCorrupt, match="belongs to 'run-1', and 'run-2' was asked for"):
        Ledger.in_vault(vault, owner="run-2")


def test_a_release_inside_a_transaction_that_is_not_durable_is_refused(
    ledger: Ledger, vault: Vault
) -> None:
    """The trap: commit returns, the bytes leave, and the block around it is rolled back."""
    ledger.check("ann", [CHARGE], UNLIMITED, DELTA)
    with vault.transaction(), pytest.raises(StateError, match="not durable yet"):
        ledger.commit("ann", "run-1", 1, "ab", [CHARGE], b"x")
    assert ledger.participations("ann") == 0


def test_two_that_hold_the_ledger_in_memory_lose_no_row(vault: Vault, path: Path) -> None:
    """The trap: read, change, write, where two do it at once."""
    with vault_at(path) as other:
        mine, theirs = (Ledger.in_vault(v, owner="run-1") for v in (vault, other))
        for round in range(1, 6):
            release(mine, "ann", round)
            release(theirs, "bob", round)
        assert verified(path) == 10
        # The faulty version: what one has in memory, over what the other wrote.
        old = vault.get("ledger")
        release(theirs, "bob", 6)
        assert old is not None
        vault.put("ledger", old)
        assert verified(path) == 10
        with pytest.raises(LedgerCorrupt, match="it was there and is gone"):
            theirs.participations("bob")


def test_nothing_of_a_ledger_is_readable_in_the_folder(
    ledger: Ledger, vault: Vault, tmp_path: Path
) -> None:
    ledger.check("some-client", [CHARGE], UNLIMITED, DELTA)
    ledger.commit("some-client", "run-1", 1, "plan", [CHARGE], b"payload of the round" * 500)
    ledger.decline("some-client", "run-1", 2, "the battery was low")
    files = [path for path in vault.folder.rglob("*") if path.is_file()]
    every = b"".join(path.read_bytes() for path in files)
    assert len(every) > 50_000
    for secret in (b"some-client", b"payload of the round", b"battery", b"declined", b"run-1"):
        assert secret not in every
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {vault.folder}


def test_a_destroyed_vault_takes_its_ledger_with_it(vault: Vault, ledger: Ledger) -> None:
    release(ledger, "ann", 1)
    vault.close()
    destroy(vault.folder, keyring=FakeKeyring())
    with pytest.raises(StateError, match="no vault in"):
        Vault.open(vault.folder, Passphrase("any"))


STEPS = {
    "before the vault": ("before", 0),
    "before the vault's state": ("UPDATE state", 0),
    "before the vault's commit": ("COMMIT", 0),
    "after it, before the bytes leave": ("", 1),
}

CHILD = (
    test_ledger.CHILD
    + """
import json
from privet.client.store.vault import Keyring, Vault

class Fake:
    keys = json.loads(sys.argv[2])
    def get_password(self, service, username):
        return self.keys[service + username]

vault = Vault.open(sys.argv[1], Keyring(Fake()))
ledger = Ledger.in_vault(vault, owner="run-1")
"""
)


def run(vault: Vault, code: str) -> list[str]:
    return [sys.executable, "-c", CHILD + code, str(vault.folder), json.dumps(KEYS)]


@pytest.mark.parametrize("step", STEPS)
def test_a_process_killed_around_the_vaults_write_spent_everything_or_nothing(
    vault: Vault, path: Path, step: str
) -> None:
    statement, expected = STEPS[step]
    code = f"""
print(release(ledger, 1).decode(), flush=True)
ledger.check("ann", [CHARGE], {{"client": 1e6}}, 1e-5)
if {statement!r} == "before":
    vault.put = lambda *given: die()
elif {statement!r}:
    trace = lambda text: text.startswith({statement!r}) and die()
    vault._connection.set_trace_callback(trace)
ledger.commit("ann", "run-1", 2, "ab", [CHARGE], b"payload 2")
die()
print("payload 2", flush=True)
"""
    done = subprocess.run(run(vault, code), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split("\n")[:-1] == ["payload 1"]
    assert verified(path) == 1 + expected
    with Ledger.in_vault(vault, owner="run-1") as ledger:
        again = ledger.resend("ann", "run-1", 2, "ab")
        assert again == (b"payload 2" if expected else None)


def test_a_row_is_there_for_all_bytes_that_left_before_a_kill(vault: Vault, path: Path) -> None:
    code = """
for round in range(ledger.participations("ann") + 1, 1_000_000):
    print(release(ledger, round).decode(), flush=True)
"""
    left = 0
    for lines in (1, 7, 3):
        with subprocess.Popen(run(vault, code), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(lines):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().splitlines()
        left += lines + len(rest)
        counted = verified(path, "run-1")
        assert left <= counted <= left + 1
        left = counted


def test_two_processes_release_at_once(vault: Vault, path: Path) -> None:
    code = """
for round in range(1, 16):
    release(ledger, round, sys.argv[3])
"""
    children = [
        subprocess.Popen([*run(vault, code), name], stderr=subprocess.PIPE)
        for name in ("ann", "bob")
    ]
    errors = [process.communicate()[1].decode() for process in children]
    assert errors == ["", ""]
    assert verified(path, "run-1") == 30
