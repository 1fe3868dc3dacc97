"""The vault: nothing to read for a thief, nothing to change unnoticed, nothing half-written."""

import fcntl
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privet.client.store import key_file as unlock_module
from privet.client.store import vault as vault_module
from privet.client.store.erase import LOCK, destroy, exclusive
from privet.client.store.key_file import KEY_FILE, private_file
from privet.client.store.vault import FILE, Keyring, Passphrase, Vault, rewrap, unlock_kind
from privet.common.errors import ConfigError, StateError


class FakeKeyring(dict[tuple[str, str], str]):
    """A keyring in memory."""

    def get_password(self, service: str, username: str) -> str | None:
        return self.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self[service, username]


@pytest.fixture
def keyring() -> FakeKeyring:
    return FakeKeyring()


@pytest.fixture
def unlock(keyring: FakeKeyring) -> Keyring:
    return Keyring(keyring)  # no Argon2id: the tests of the entries need no passphrase


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def vault(home: Path, unlock: Keyring) -> Iterator[Vault]:
    with Vault.create(home, unlock) as opened:
        yield opened


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A passphrase that costs nothing to try, for tests that try many."""
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# What it keeps


def test_what_was_put_is_there_after_a_restart(home: Path, unlock: Keyring) -> None:
    with Vault.create(home, unlock) as vault:
        vault.put("records/1", b"one")
        vault.put_all({"records/2": b"two", "card": b"", "gone": b"x"})
        vault.put_all({"gone": None, "never": None, "records/1": b"new"})
        assert vault.get("records/1") == b"new"
    with Vault.open(home, unlock) as vault:
        assert vault.get("records/1") == b"new"
        assert vault.get("card") == b""
        assert vault.get("gone") is None
        assert vault.names() == ["card", "records/1", "records/2"]
        assert vault.names("records/") == ["records/1", "records/2"]


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_vault_is_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = st.sampled_from(["a", "a/b", "é", "x" * 128, "y" * 129])
    steps = st.dictionaries(names, st.none() | st.binary(max_size=40), max_size=4)
    home, unlock = tmp_path_factory.mktemp("vault"), Keyring(FakeKeyring())
    model: dict[str, bytes] = {}
    vault = Vault.create(home, unlock)
    for step in data.draw(st.lists(steps | st.just("reopen"), max_size=8)):
        if isinstance(step, str):
            vault.close()
            vault = Vault.open(home, unlock)
            continue
        vault.put_all(step)
        model = {k: v for k, v in {**model, **step}.items() if v is not None}
    assert {name: vault.get(name) for name in vault.names()} == model
    vault.close()


def test_only_the_owner_can_read_the_files(home: Path, unlock: Keyring) -> None:
    before = os.umask(0)
    try:
        with Vault.create(home, unlock) as vault, exclusive(home):
            vault.put("a", b"b")
            rewrap(home, unlock, unlock)
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) == {FILE, f"{FILE}-wal", f"{FILE}-shm", KEY_FILE, LOCK}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 1025, "\ud800"])
def test_names_that_cannot_be_names_are_refused(vault: Vault, name: str) -> None:
    with pytest.raises(StateError, match="cannot name an entry"):
        vault.put(name, b"")
    assert vault.names() == []


def test_an_entry_that_is_too_large_is_refused(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_module, "MAX_ENTRY_BYTES", 10)
    with pytest.raises(StateError, match="11 bytes; the vault keeps at most 10"):
        vault.put_all({"a": b"1", "b": bytes(11)})
    assert vault.names() == []


def test_a_closed_vault_says_so(vault: Vault) -> None:
    vault.close()
    vault.close()
    with pytest.raises(StateError, match="is closed: open it again"):
        vault.get("a")


# Transactions


def test_calls_in_a_transaction_are_there_together_or_not_at_all(vault: Vault) -> None:
    vault.put("kept", b"1")

    def fails() -> None:
        with vault.transaction():
            vault.put("a", b"1")
            vault.put_all({"kept": None})
            assert vault.get("a") == b"1"
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert vault.names() == ["kept"]
    with vault.transaction():
        vault.put("a", b"1")
        vault.put("a", b"2")
    assert vault.get("a") == b"2"


def test_a_transaction_that_must_be_durable_is_not_hidden_in_another_one(vault: Vault) -> None:
    within = pytest.raises(StateError, match="not durable yet")
    with vault.transaction(), within, vault.transaction(outermost=True):
        pass
    with vault.transaction(writing=False), pytest.raises(StateError, match="only reads"):
        vault.put("a", b"1")


def test_each_process_sees_what_the_others_wrote(vault: Vault, home: Path, unlock: Keyring) -> None:
    with Vault.open(home, unlock) as other:
        vault.put("a", b"1")
        assert other.get("a") == b"1"
        first = other.version("a")
        other.put("a", b"2")
        assert vault.get("a") == b"2"
        assert vault.version("a") != first
        assert vault.version("b") is None
        vault.put("a", b"3")
        assert other.names() == ["a"]
        assert other.get("a") == b"3"


def test_threads_share_a_vault(vault: Vault) -> None:
    def write(name: str) -> None:
        for number in range(10):
            vault.put(f"{name}/{number}", b"x")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(vault.names()) == 30


# The thief

MARKERS = [b"Hedge", b"privet-marker-with-some-length", b"0123456789abcdef" * 40]


@pytest.mark.parametrize("closed", [True, False])
def test_a_stolen_folder_shows_neither_names_nor_data(
    home: Path, unlock: Keyring, closed: bool, tmp_path: Path
) -> None:
    vault = Vault.create(home, unlock)
    for number in range(40):
        for marker in MARKERS:
            vault.put(f"{marker.decode()}/{number}", marker * (number + 1))
    vault.put_all(dict.fromkeys(vault.names()[::2]))
    if closed:
        vault.close()
    stolen = shutil.copytree(home, tmp_path / "stolen")
    every = b"".join(contents(stolen).values())
    assert len(every) > 500_000
    assert closed != (Path(stolen) / f"{FILE}-wal").exists()
    assert [marker for marker in MARKERS if marker in every] == []
    assert not any(secret.encode() in every for secret in keyring_secrets(unlock))
    vault.close()
    # The scan would have found them.
    with closing(sqlite3.connect(stolen / "plain")) as db:
        db.execute("CREATE TABLE entry (name, data)")
        db.execute("INSERT INTO entry VALUES (?, ?)", ("Hedge/1", MARKERS[1]))
        db.commit()
    plain = b"".join(contents(stolen).values())
    assert [marker in plain for marker in MARKERS] == [True, True, False]


def keyring_secrets(unlock: Keyring) -> list[str]:
    assert isinstance(unlock.backend, FakeKeyring)
    return list(unlock.backend.values())


def test_names_of_one_length_class_leave_rows_of_one_size(vault: Vault, home: Path) -> None:
    vault.put_all({"a": b"1", "identity of some length": b"2", "x" * 128: b"3"})
    with closing(sqlite3.connect(home / FILE)) as db:
        sizes = {size for (size,) in db.execute("SELECT length(name) FROM entry")}
    assert sizes == {12 + 128 + 16}


def test_the_same_data_is_never_sealed_the_same_way(vault: Vault, home: Path) -> None:
    seen = []
    for name in ("a", "a", "b"):
        vault.put(name, b"same")
        with closing(sqlite3.connect(home / FILE)) as db:
            seen += [data for (data,) in db.execute("SELECT data FROM entry")]
    assert len(set(seen)) == 3  # a, a again, b; the second a is listed twice


# Somebody who can write the file

FAULTS = {
    "an entry removed": "DELETE FROM entry WHERE generation = 3",
    "the last entry removed": "DELETE FROM entry WHERE generation = 6",
    "all entries removed": "DELETE FROM entry",
    "an entry put back to its older version": (
        "UPDATE entry SET (generation, digest, name, data) = "
        "(SELECT generation, digest, name, data FROM older WHERE older.id = entry.id) "
        "WHERE id = (SELECT id FROM older WHERE generation = 2)"
    ),
    "a deleted entry put back": "INSERT INTO entry SELECT * FROM older WHERE generation = 4",
    "two entries swapped": (
        "CREATE TEMP TABLE x AS SELECT * FROM entry WHERE generation IN (3, 6);"
        "UPDATE entry SET (generation, digest, name, data) = (SELECT generation, digest, name, "
        "data FROM x WHERE x.id != entry.id) WHERE generation IN (3, 6)"
    ),
    "an entry copied": (
        "INSERT INTO entry SELECT randomblob(32), generation, digest, name, data FROM entry "
        "WHERE generation = 3"
    ),
    "another transaction": "UPDATE entry SET generation = 9 WHERE generation = 3",
    "an older state": (
        "UPDATE state SET (generation, digest, sealed) = "
        "(SELECT generation, digest, sealed FROM older_state)"
    ),
    "another number of the state": "UPDATE state SET generation = generation + 1",
    "a trigger": (
        "CREATE TRIGGER t AFTER INSERT ON entry BEGIN DELETE FROM entry WHERE generation = 3; END"
    ),
}


def attack(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)


def prepared(vault: Vault, home: Path) -> str:
    """Four transactions, 2 to 5; returns the SQL that shows an attacker the past."""
    vault.put("a", b"1")
    vault.put("b", b"2")
    vault.put("c", b"3")
    past = home.parent / "past.sqlite"
    with closing(sqlite3.connect(home / FILE)) as db:
        db.execute("VACUUM INTO ?", (str(past),))
    vault.put_all({"a": b"new", "c": None})
    return (
        f"ATTACH '{past}' AS past; CREATE TEMP TABLE older AS SELECT * FROM past.entry;"
        "CREATE TEMP TABLE older_state AS SELECT * FROM past.state; DETACH past;"
    )


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_change_by_somebody_without_the_key_is_found(
    vault: Vault, home: Path, unlock: Keyring, fault: str, is_open: bool
) -> None:
    past = prepared(vault, home)
    vault.put("d", b"4")
    # Transactions that wrote what is there: b 3, a 5, d 6; in the past: a 2, b 3, c 4.
    if not is_open:
        vault.close()
    attack(home / FILE, past + FAULTS[fault])
    wording = "not the tables of a vault" if fault == "a trigger" else "tampered with"
    use: Callable[[], Any] = vault.names if is_open else lambda: Vault.open(home, unlock)
    for _ in (1, 2):
        with pytest.raises(StateError, match=wording):
            use()
    if is_open:
        with pytest.raises(StateError, match=wording):
            vault.put("e", b"5")


def test_rows_that_are_sealed_one_by_one_do_not_show_that_one_is_gone(
    vault: Vault, home: Path, unlock: Keyring
) -> None:
    """The trap: each row has its own tag, and nothing counts the rows."""
    vault.put_all({"a": b"1", "ledger": b"spent"})
    entry = vault._open_keys.id("ledger")
    keys = vault._open_keys
    vault.close()
    attack(home / FILE, f"DELETE FROM entry WHERE id = x'{entry.hex()}'")
    with closing(sqlite3.connect(home / FILE)) as db:  # the faulty version
        rows = db.execute("SELECT id, generation, data FROM entry").fetchall()
    assert [keys.open("data", *row) for row in rows] == [b"1"]
    with pytest.raises(StateError, match="removed, added or put back"):
        Vault.open(home, unlock)


def test_a_row_changed_behind_sqlite_is_found_when_it_is_read(vault: Vault) -> None:
    """No counter of SQLite moves when a page is edited: the index in memory is what holds."""
    vault.put("a", b"1")
    vault._connected().execute("UPDATE entry SET digest = digest, generation = 7")
    with pytest.raises(StateError, match="not the one that was written last"):
        vault.get("a")
    with pytest.raises(StateError, match="tampered with"):
        vault.get("a")


def test_an_older_file_put_back_while_it_is_in_use_is_found(vault: Vault, home: Path) -> None:
    past = prepared(vault, home)
    script = (
        "DELETE FROM entry; INSERT INTO entry SELECT * FROM older;"
        "DELETE FROM state; INSERT INTO state SELECT * FROM older_state;"
    )
    attack(home / FILE, past + script)
    with pytest.raises(StateError, match="an older state was put back while it was in use"):
        vault.get("a")


def test_what_a_stranger_sealed_is_told_apart_from_damage(
    vault: Vault, home: Path, unlock: Keyring
) -> None:
    vault.put("a", b"1")
    vault.close()
    digest = hashlib.sha256(bytes(60)).hexdigest()
    attack(home / FILE, f"UPDATE state SET sealed = zeroblob(60), digest = x'{digest}'")
    with pytest.raises(StateError, match="tampered with: its state was not written"):
        Vault.open(home, unlock)


@pytest.mark.parametrize(
    "script",
    [
        "UPDATE entry SET data = zeroblob(length(data))",
        "UPDATE entry SET digest = zeroblob(32)",
        "UPDATE entry SET digest = x'00'",
        "UPDATE state SET sealed = zeroblob(68)",
        "DELETE FROM state",
    ],
)
def test_damage_is_told_apart_from_tampering(
    vault: Vault, home: Path, unlock: Keyring, script: str
) -> None:
    vault.put("a", b"1" * 100)
    vault.close()
    attack(home / FILE, script)

    def use() -> None:
        with Vault.open(home, unlock) as opened:
            opened.get("a")

    with pytest.raises(StateError, match="is damaged"):
        use()


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_anywhere_is_never_read_as_something_else(
    home: Path, unlock: Keyring, seed: int
) -> None:
    draw, refused = random.Random(seed), 0
    with Vault.create(home, unlock) as vault:
        vault.put_all({f"n{i}": bytes([i]) * 3000 for i in range(8)})
    for name in (FILE, KEY_FILE):
        content = bytearray((home / name).read_bytes())
        for _ in range(10):
            place = draw.randrange(len(content))
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            (home / name).write_bytes(changed)
            try:
                with Vault.open(home, unlock) as vault:
                    for i in range(8):
                        assert vault.get(f"n{i}") == bytes([i]) * 3000
                    assert vault.names() == [f"n{i}" for i in range(8)]
            except StateError:
                refused += 1
        (home / name).write_bytes(content)
    assert refused >= 10


# Files that are not this vault


@pytest.mark.parametrize("kind", ["cut", "cut to nothing", "garbage", "another database"])
def test_a_vault_that_is_no_vault_is_refused_and_left_as_it_is(
    vault: Vault, home: Path, unlock: Keyring, kind: str
) -> None:
    vault.put_all({str(i): bytes(2000) for i in range(20)})
    vault.close()
    path = home / FILE
    content = path.read_bytes()
    if kind == "another database":
        path.unlink()
        attack(path, "CREATE TABLE notes (text)")
    else:
        cut = {"cut": content[:9000], "cut to nothing": b"", "garbage": os.urandom(9000)}
        path.write_bytes(cut[kind])
    before = path.read_bytes(), (home / KEY_FILE).read_bytes()
    with pytest.raises(StateError, match=r"damaged.*left as it is") as caught:
        Vault.open(home, unlock)
    assert str(path) in str(caught.value)
    assert (path.read_bytes(), (home / KEY_FILE).read_bytes()) == before
    with pytest.raises(StateError, match="already"):
        Vault.create(home, unlock)
    assert path.read_bytes() == before[0]


def test_a_damaged_vault_with_an_unfinished_journal_is_left_as_it_is(
    vault: Vault, home: Path, unlock: Keyring, tmp_path: Path
) -> None:
    vault.put("a", b"1")
    vault.put("b", b"2")
    attack(home / FILE, "DELETE FROM entry WHERE generation = 2")
    crashed = Path(shutil.copytree(home, tmp_path / "crashed"))
    vault.close()
    names = (FILE, f"{FILE}-wal", KEY_FILE)
    before = [(crashed / name).read_bytes() for name in names]
    with pytest.raises(StateError, match="tampered"):
        Vault.open(crashed, unlock)
    assert [(crashed / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("name", [FILE, KEY_FILE])
def test_a_vault_of_a_newer_version_is_refused_and_left_untouched(
    vault: Vault, home: Path, unlock: Keyring, name: str
) -> None:
    vault.close()
    if name == FILE:
        attack(home / FILE, "PRAGMA user_version = 99")
    else:
        edit_key(home, lambda body: body.update(format=99))
    before = contents(home)
    with pytest.raises(StateError, match=r"version 99.*version 1\..*left untouched"):
        Vault.open(home, unlock)
    assert {k: contents(home)[k] for k in before} == before


def edit_key(home: Path, edit: Callable[[dict[str, Any]], object], *, keep: bool = False) -> None:
    """Rewrites key.json, with a right checksum unless `keep`."""
    body = json.loads((home / KEY_FILE).read_bytes())
    checksum = body.pop("checksum")
    edit(body)
    body["checksum"] = checksum if keep else unlock_module._checksum(body)
    (home / KEY_FILE).write_text(json.dumps(body))


def test_a_missing_half_is_a_sentence(vault: Vault, home: Path, unlock: Keyring) -> None:
    vault.close()
    aside = home.parent / "aside"
    for name, sentence in {
        KEY_FILE: "has no key.json.*nobody can open",
        FILE: "has a key.json and no vault.sqlite",
    }.items():
        (home / name).rename(aside)
        with pytest.raises(StateError, match=sentence):
            Vault.open(home, unlock)
        with pytest.raises(StateError, match="already"):
            Vault.create(home, unlock)
        aside.rename(home / name)
    with pytest.raises(StateError, match="no vault in"):
        Vault.open(home.parent / "elsewhere", unlock)
    assert not (home.parent / "elsewhere").exists()


def test_the_halves_of_two_vaults_are_a_sentence(
    vault: Vault, home: Path, unlock: Keyring, tmp_path: Path
) -> None:
    vault.close()
    Vault.create(tmp_path / "other", unlock).close()
    shutil.copy(tmp_path / "other" / KEY_FILE, home / KEY_FILE)
    with pytest.raises(StateError, match="two different vaults"):
        Vault.open(home, unlock)


@pytest.mark.parametrize("name", [FILE, KEY_FILE])
def test_links_are_not_followed(vault: Vault, home: Path, unlock: Keyring, name: str) -> None:
    vault.close()
    target = (home / name).rename(home.parent / "target")
    (home / name).symlink_to(target)
    with pytest.raises(StateError, match="is a link"):
        Vault.open(home, unlock)
    content = target.read_bytes()
    if name == KEY_FILE:  # a key that cannot be destroyed stops the erasure at once
        with pytest.raises(StateError, match="is a link"):
            destroy(home)
        assert (home / FILE).exists()
    else:
        assert FILE in destroy(home, keyring=unlock.backend).kept
    assert target.read_bytes() == content


# Unlocking


def test_a_passphrase_opens_and_a_wrong_one_is_told_apart_from_damage(home: Path) -> None:
    with Vault.create(home, Passphrase("a hedge between two gardens")) as vault:
        vault.put("a", b"1")
    assert unlock_kind(home) == "passphrase"
    before = contents(home)
    with pytest.raises(ConfigError, match=r"passphrase is not the one.*not damaged"):
        Vault.open(home, Passphrase("a hedge between two garden"))
    with Vault.open(home, Passphrase("a hedge between two gardens")) as vault:
        assert vault.get("a") == b"1"
    edit_key(home, lambda body: body["recipe"].update(salt="00" * 16), keep=True)
    with pytest.raises(StateError, match="is damaged: its checksum"):
        Vault.open(home, Passphrase("a hedge between two gardens"))
    assert contents(home)[FILE] == before[FILE]


@pytest.mark.usefixtures("cheap")
def test_a_rewritten_key_file_does_not_open(home: Path) -> None:
    """Vault, recipe and key are bound together."""
    Vault.create(home, Passphrase("p")).close()
    edit_key(home, lambda body: body.update(vault="00" * 16))
    with pytest.raises(ConfigError, match="somebody rewrote it"):
        Vault.open(home, Passphrase("p"))


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_kib", 100 * 2**20),
        ("memory_kib", 8),
        ("memory_kib", True),
        ("memory_kib", "65536"),
        ("iterations", 10**9),
        ("iterations", 0),
        ("lanes", 2**20),
        ("lanes", 1.0),
    ],
)
def test_a_hostile_key_file_cannot_ask_for_the_whole_machine(
    home: Path, name: str, value: object
) -> None:
    Vault.create(home, Passphrase("p")).close()
    edit_key(home, lambda body: body["recipe"].update({name: value}))
    started = time.perf_counter()
    with pytest.raises(StateError, match=f"asks for {name} = .* accepts"):
        Vault.open(home, Passphrase("p"))
    assert time.perf_counter() - started < 60  # obeyed, it would be hours


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body.pop("recipe"),
        lambda body: body.update(recipe=None),
        lambda body: body.update(recipe=[1]),
        lambda body: body["recipe"].update(kind="magic"),
        lambda body: body["recipe"].update(kind=["passphrase"]),
        lambda body: body["recipe"].update(salt=7),
        lambda body: body["recipe"].update(salt=""),
        lambda body: body["recipe"].update(kdf="scrypt"),
        lambda body: body.update(sealed="zz"),
        lambda body: body.update(sealed="00"),
        lambda body: body.update(vault=5),
    ],
)
def test_a_key_file_that_privet_did_not_write_is_a_sentence(home: Path, edit: Any) -> None:
    Vault.create(home, Passphrase("p")).close()
    edit_key(home, edit)
    with pytest.raises(StateError, match="privet wrote"):
        Vault.open(home, Passphrase("p"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"nul", b"\xff\xfe", b"[" * 60000])
def test_a_key_file_that_is_not_one_is_damaged(
    vault: Vault, home: Path, unlock: Keyring, content: bytes
) -> None:
    vault.close()
    (home / KEY_FILE).write_bytes(content)
    with pytest.raises(StateError, match="is damaged"):
        Vault.open(home, unlock)
    assert (home / KEY_FILE).read_bytes() == content


def test_secrets_do_not_show(vault: Vault, unlock: Keyring) -> None:
    shown = repr([Passphrase("hunter2"), unlock, vault, vault._keys])
    assert "hunter2" not in shown
    assert not any(secret in shown for secret in keyring_secrets(unlock))
    assert repr(Passphrase("hunter2")) == "Passphrase(***)"


@pytest.mark.parametrize("text", ["", "\ud800"])
def test_a_passphrase_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="passphrase is"):
        Passphrase(text)


@pytest.mark.usefixtures("cheap")
def test_a_passphrase_is_the_same_however_its_accents_were_typed(home: Path) -> None:
    Vault.create(home, Passphrase("haie é")).close()
    Vault.open(home, Passphrase("haie e\u0301")).close()


def test_the_passphrase_costs_an_attacker_what_it_should(home: Path) -> None:
    """RFC 9106, second recommended setting; a change of the defaults must be meant."""
    Vault.create(home, Passphrase("p")).close()
    recipe = json.loads((home / KEY_FILE).read_bytes())["recipe"]
    assert {k: recipe[k] for k in ("kdf", "iterations", "lanes", "memory_kib")} == {
        "kdf": "argon2id",
        "iterations": 3,
        "lanes": 4,
        "memory_kib": 65536,
    }


@pytest.mark.usefixtures("cheap", "vault")
def test_the_other_way_of_unlocking_is_a_sentence(
    home: Path, unlock: Keyring, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="unlocked by a keyring, and a passphrase was given"):
        Vault.open(home, Passphrase("p"))
    Vault.create(tmp_path / "other", Passphrase("p")).close()
    with pytest.raises(ConfigError, match="unlocked by a passphrase, and a keyring was given"):
        Vault.open(tmp_path / "other", unlock)
    assert unlock_kind(home) == "keyring"


class Refusing(FakeKeyring):
    def get_password(self, service: str, username: str) -> str | None:
        raise RuntimeError(f"locked {service} {username}")


class Forgetting(FakeKeyring):
    def set_password(self, service: str, username: str, password: str) -> None:
        pass


@pytest.mark.parametrize(
    ("backend", "sentence"), [(Refusing(), "refuses"), (Forgetting(), "does not give back")]
)
def test_a_keyring_that_does_not_keep_is_refused_and_nothing_is_left(
    home: Path, backend: FakeKeyring, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Vault.create(home, Keyring(backend))
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("vault")
def test_a_keyring_without_the_entry_is_a_sentence(home: Path) -> None:
    with pytest.raises(ConfigError, match="no usable entry 'vault-"):
        Vault.open(home, Keyring(FakeKeyring()))


def test_a_system_without_a_keyring_is_told_to_use_a_passphrase(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match="not installed: install it, or use a passphrase"):
        Vault.create(home, Keyring())
    # What the package gives where there is no keyring: a class of this module.
    null = type("Keyring", (), {"__module__": "keyring.backends.null"})()
    package = type("Package", (), {"get_keyring": staticmethod(lambda: null)})
    monkeypatch.setattr(importlib, "import_module", lambda _: package)
    with pytest.raises(ConfigError, match="has none that keeps anything"):
        Vault.create(home, Keyring())


@pytest.mark.usefixtures("cheap")
def test_a_changed_passphrase_opens_and_the_old_one_does_not(
    home: Path, keyring: FakeKeyring
) -> None:
    old, new, ring = Passphrase("old"), Passphrase("new"), Keyring(keyring)
    with Vault.create(home, old) as vault:
        vault.put("a", b"1")
    with pytest.raises(ConfigError, match="not the one"):
        rewrap(home, new, old)
    for before, after in ((old, new), (new, ring), (ring, ring), (ring, old)):
        rewrap(home, before, after)
        with Vault.open(home, after) as vault:
            assert vault.get("a") == b"1"
        if before is not after:
            with pytest.raises(ConfigError):
                Vault.open(home, before)
        assert len(keyring) == (after is ring)
    assert sorted(contents(home)) == [KEY_FILE, FILE]


@pytest.mark.usefixtures("cheap")
def test_the_replaced_key_file_is_overwritten(home: Path) -> None:
    Vault.create(home, Passphrase("old")).close()
    with open(home / KEY_FILE, "rb") as replaced:
        before = replaced.read()
        rewrap(home, Passphrase("old"), Passphrase("new"))
        replaced.seek(0)
        after = replaced.read()
    assert len(after) == len(before)
    assert after != before
    assert b"sealed" not in after


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_change_of_the_passphrase_that_fails_leaves_the_old_one(
    home: Path, keyring: FakeKeyring, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    Vault.create(home, Passphrase("old")).close()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        with pytest.raises(StateError, match="disk is full"):
            rewrap(home, Passphrase("old"), Keyring(keyring))
    assert keyring == {}
    assert sorted(contents(home)) == [KEY_FILE, FILE]
    Vault.open(home, Passphrase("old")).close()


# Destruction


@pytest.mark.usefixtures("cheap")
def test_destruction_takes_the_key_first_and_says_what_it_did(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    with Vault.create(home, Passphrase("p")) as vault:
        vault.put("a", b"1")
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        order.append(path.name)
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    sha256 = hashlib.sha256((home / KEY_FILE).read_bytes()).hexdigest()
    (home / "policy.toml").write_text("# the owner's")
    (home / f".{KEY_FILE}.ab12.tmp").write_text("left by a kill")
    (home / f"{FILE}-journal").symlink_to(home / "policy.toml")
    with open(home / KEY_FILE, "rb") as watched:
        erased = destroy(home)
        overwritten = watched.read()
    assert b"sealed" not in overwritten
    assert order[0] == KEY_FILE
    assert erased.key_sha256 == sha256
    assert "has no key.json" in erased.refusal
    assert {name for name, _ in erased.removed} == {FILE, LOCK}
    assert erased.kept == ("policy.toml", f"{FILE}-journal")
    assert sorted(os.listdir(home)) == ["policy.toml", f"{FILE}-journal"]
    for part in (sha256, "has no key.json", FILE, "policy.toml"):
        assert part in str(erased)
    with pytest.raises(StateError, match="no vault in"):
        Vault.open(home, Passphrase("p"))
    with pytest.raises(StateError, match="nothing was erased"):
        destroy(home)


def test_destruction_deletes_the_entry_of_the_keyring(
    vault: Vault, home: Path, keyring: FakeKeyring, unlock: Keyring, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(home, tmp_path / "copy"))
    vault.close()
    assert "deleted" in destroy(home, keyring=keyring).keyring
    assert keyring == {}
    with pytest.raises(ConfigError, match="no usable entry"):  # a copy is worth nothing either
        Vault.open(copy, unlock)


def test_destruction_that_was_interrupted_is_finished(
    vault: Vault, home: Path, keyring: FakeKeyring
) -> None:
    vault.put("a", b"1")
    (home / KEY_FILE).unlink()
    erased = destroy(home, keyring=keyring)
    assert erased.key_sha256 == ""
    assert "no key.json was there" in str(erased)
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("vault")
def test_a_damaged_key_file_is_destroyed_as_well(home: Path, keyring: FakeKeyring) -> None:
    (home / KEY_FILE).write_bytes(b"damaged")
    assert destroy(home, keyring=keyring).key_sha256 == hashlib.sha256(b"damaged").hexdigest()
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("vault")
def test_a_keyring_that_refuses_does_not_stop_the_destruction(home: Path) -> None:
    # An empty one raises KeyError, where a locked one raises an error of its own.
    assert "could not be deleted" in destroy(home, keyring=FakeKeyring()).keyring
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("vault")
def test_a_vault_in_use_by_a_worker_is_not_destroyed(home: Path) -> None:
    before = contents(home)
    with exclusive(home), pytest.raises(StateError, match=f"process {os.getpid()}"):
        destroy(home)
    assert {k: contents(home)[k] for k in before} == before


# One worker

HOLD = """
import sys
from privet.client.store.erase import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_worker_is_refused_and_the_first_one_is_named(home: Path) -> None:
    home.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        refused = pytest.raises(StateError, match=f"process {child.pid}.*one at a time")
        with refused, exclusive(home):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    for _ in (1, 2):
        with exclusive(home):
            assert (home / LOCK).read_text() == f"{os.getpid()}\n"


def test_a_lock_on_a_removed_file_holds_nobody_back_and_is_taken_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    real = fcntl.flock
    calls: list[int] = []

    def flock(handle: int, how: int) -> None:
        if not calls:  # between open and flock the file is erased
            (home / LOCK).unlink()
        calls.append(how)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(home):
        assert len(calls) == 2
        assert (home / LOCK).exists()


# Crashes and disks

CHILD = """
import resource, sys
from privet.client.store.vault import Keyring, Vault

class Fake(dict):
    def get_password(self, *name):
        return self[name]

vault = Vault.open(sys.argv[1], Keyring(Fake({keyring})))

def write(number, size):
    vault.put_all({{f"n{{i}}": number.to_bytes(4, "big") * size for i in range(20)}})
    print(number, flush=True)
"""


def child(keyring: FakeKeyring, home: Path, code: str) -> list[str]:
    program = CHILD.format(keyring=dict(keyring)) + code
    return [sys.executable, "-c", program, str(home)]


KILLED = """
number = int.from_bytes(vault.get("n0")[:4], "big")
while True:
    number += 1
    write(number, 500 if number % 3 else 20_000)
"""


def kill_and_look(home: Path, unlock: Keyring, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    assert isinstance(unlock.backend, FakeKeyring)
    command = child(unlock.backend, home, KILLED)
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split(b"\n")
        said = max((int(line) for line in lines[:-1]), default=0)
        with Vault.open(home, unlock) as vault:
            found = {(vault.get(f"n{i}") or b"")[:4] for i in range(20)}
            lengths = {len(vault.get(f"n{i}") or b"") for i in range(20)}
        assert len(found) == len(lengths) == 1
        assert int.from_bytes(found.pop(), "big") >= said


def test_a_process_killed_at_any_moment_leaves_whole_transactions(
    vault: Vault, home: Path, unlock: Keyring
) -> None:
    vault.put_all({f"n{i}": bytes(4) for i in range(20)})
    vault.close()
    kill_and_look(home, unlock, 10, 1)


@pytest.mark.heavy
def test_a_process_killed_100_times_leaves_whole_transactions(
    vault: Vault, home: Path, unlock: Keyring
) -> None:
    vault.put_all({f"n{i}": bytes(4) for i in range(20)})
    vault.close()
    kill_and_look(home, unlock, 100, 2)


FILLED = """
import errno
from privet.common.errors import StateError
number = 1
try:
    while True:
        number += 1
        write(number, 20_000)
except StateError as error:
    print(error, file=sys.stderr)
vault.put_all({"n0": vault.get("n0")})  # the vault goes on, with what fits
assert len({vault.get(f"n{i}")[:4] for i in range(20)}) == 1
"""


def test_a_disk_that_fills_up_leaves_whole_transactions(
    vault: Vault, home: Path, unlock: Keyring, keyring: FakeKeyring
) -> None:
    vault.put_all({f"n{i}": bytes(4) for i in range(20)})
    vault.close()
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
    done = subprocess.run(
        child(keyring, home, limit + FILLED), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert str(home / FILE) in done.stderr
    said = [int(line) for line in done.stdout.split()]
    assert said
    with Vault.open(home, unlock) as opened:
        found = {(opened.get(f"n{i}") or b"")[:4] for i in range(20)}
    assert [int.from_bytes(number, "big") for number in found] == said[-1:]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root for a small tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    with suppress(OSError), open(disk / "rest", "wb", buffering=0) as rest:
        while rest.write(bytes(4096)):
            pass


def test_a_full_disk_is_a_sentence_and_the_vault_stays_whole(
    small_disk: Path, unlock: Keyring
) -> None:
    home, other = small_disk / "home", small_disk / "other"
    with Vault.create(home, unlock) as vault:
        vault.put_all({"a": b"kept", "big/0": bytes(200_000)})
        fill(small_disk)
        with pytest.raises(StateError, match=r"disk is full.*Nothing was written"):
            vault.put_all({"a": b"lost", "big/1": bytes(2_000_000)})
        assert vault.get("a") == b"kept"
    with pytest.raises(StateError, match="disk is full"):
        Vault.create(other, unlock)
    with Vault.open(home, unlock) as vault:
        assert vault.names() == ["a", "big/0"]
        (small_disk / "rest").unlink()
        vault.put_all({"a": b"new", "big/0": None})
        assert vault.names() == ["a"]
    Vault.create(other, unlock).close()  # no key of nothing is in the way


def test_a_write_that_fails_changes_nothing_and_the_next_one_works(vault: Vault) -> None:
    vault.put("a", b"1")
    pages = vault._connected().execute("PRAGMA page_count").fetchone()[0]
    vault._connected().execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StateError, match="disk is full"):
        vault.put_all({"a": b"2", "b": bytes(100_000)})
    assert vault.get("a") == b"1"
    assert vault.names() == ["a"]
    vault._connected().execute("PRAGMA max_page_count = 1000000")
    vault.put_all({"a": b"2", "b": bytes(100_000)})
    assert vault.get("a") == b"2"


def test_two_processes_write_at_once(vault: Vault, home: Path, keyring: FakeKeyring) -> None:
    code = "for number in range(1, 101):\n    vault.put(f'{sys.argv[2]}/{number}', b'x')\n"
    children = [
        subprocess.Popen([*child(keyring, home, code), name], stderr=subprocess.PIPE)
        for name in ("ann", "bob")
    ]
    for number in range(50):
        vault.put(f"own/{number}", b"x")
    errors = [process.communicate()[1].decode() for process in children]
    assert errors == ["", ""]
    assert len(vault.names()) == 250


def test_a_temporary_file_is_private_and_removed_by_an_error(tmp_path: Path) -> None:
    def fails() -> None:
        with private_file(tmp_path / "x") as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_a_thousand_entries_open_in_no_time(vault: Vault, home: Path, unlock: Keyring) -> None:
    vault.put_all({f"records/{i}": bytes(1000) for i in range(1000)})
    vault.close()
    took = []
    for _ in range(5):
        started = time.process_time()  # not how busy the machine is
        Vault.open(home, unlock).close()
        took.append(time.process_time() - started)
    assert min(took) < 0.2


def test_the_vault_loads_nothing_heavy() -> None:
    code = (
        "import privet.client.store.vault, sys; "
        "print([m for m in ('torch', 'numpy', 'flwr', 'keyring') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
