"""client.py: every command on a real home; bad input is one sentence and exit code 2."""

import datetime
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from privet import commands as main
from privet.client.commands import client
from privet.client.enrolled import access
from privet.client.import_texts import watched_folders
from privet.client.runtime import connection, processes, supervisor
from privet.client.store import key_file as unlock_module
from privet.client.store.device_store import ME, DeviceStore, Joined
from privet.client.store.erase import exclusive
from privet.client.store.key_file import Passphrase
from privet.common.errors import PrivacyError, StateError
from privet.common.privacy.accounting import Charge
from privet.common.secure_aggregation.keys import Directory, write_directory
from privet.experiments.benchmarks.harness import wait_for

from ..store.test_device_store import SERVER, ask_for_no_example_noise, text

SECRET_WORDS = "dear diary"
ENTRY = "import sys; from privet.client.commands.client import app; app()"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, a cheap passphrase in a file."""
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pass").write_text("own words\n")
    for name, value in (("HOME", "home"), ("PASSPHRASE_FILE", "pass")):
        monkeypatch.setenv(f"PRIVET_{name}", str(tmp_path / value))
    return tmp_path


@pytest.fixture
def made(place: Path) -> Path:
    assert main.run(["client", "init", "--name", "desk"]) == 0
    return place / "home"


class Device:
    """The home of a test, seen from inside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> DeviceStore:
        self._home = DeviceStore.open(self.folder, Passphrase("own words"))
        return self._home

    def __exit__(self, *_: object) -> None:
        self._home.close()


@pytest.fixture
def joined(made: Path) -> Path:
    ask_for_no_example_noise(made)
    with Device(made) as home:
        enrolled = Directory({n: bytes([n]) * 32 for n in range(1, 17)}, closed=True)
        home.join(Joined(SERVER, "PEM", closed=True), enrolled)
    return made


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that works; what it says."""

    def said(*arguments: str) -> str:
        capsys.readouterr()
        code = main.run(["client", *arguments])
        found = capsys.readouterr()
        assert code == 0, found
        assert SECRET_WORDS not in found.out + found.err
        return found.out

    return said


@pytest.fixture
def ask(say: Any) -> Any:
    """The same with --json."""
    return lambda *arguments: json.loads(say(*arguments, "--json"))


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Any:
    """The one sentence of a refused command; nothing in the home changes."""

    def refused(*arguments: str) -> str:
        before = contents(Path("home"))
        capsys.readouterr()
        code = main.run(["client", *arguments])
        said = capsys.readouterr()
        assert (code, said.out) == (2, ""), said
        assert "Traceback" not in said.err
        assert contents(Path("home")) == before
        return " ".join(said.err.split())

    return refused


def contents(folder: Path) -> dict[str, bytes]:
    """Files that are what they are; SQLite's journal and the lock may come and go."""
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {str(p): data for p, data in found.items() if p.name in ("key.json", "policy.toml")}


# --- init, card, policy --------------------------------------------------------------------------


def test_init_makes_a_home_and_prints_the_card_and_what_to_do_next(place: Path, say: Any):
    said = say("init", "--name", "desk")
    card = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert card["name"] == "desk"
    assert card["node"].startswith("ecdsa-sha2-nistp384 ")
    assert str(place / "home") in said
    assert "privet client add" in said
    assert json.loads(say("card")) == card


def test_a_second_init_is_refused_and_changes_nothing(made: Path, refuse: Any):
    assert "left as it is" in refuse("init")
    assert "privet client status" in refuse("init", "--keyring")
    assert made.is_dir()


def test_without_a_home_every_command_says_to_make_one(refuse: Any):
    for words in ("status", "card", "add", "budget", "outbox", "runs", "pause", "start", "leave"):
        assert "privet client init" in refuse(words)


@pytest.mark.usefixtures("made")
def test_the_policy_is_shown_checked_and_its_mistakes_named(made: Path, ask: Any, refuse: Any):
    assert ask("policy")["limits"]["budget"]["client"] == 10.0

    path = made / "policy.toml"
    path.write_text(path.read_text().replace("max_clip =", "max_clap ="))
    assert "limits.max_clap: unknown key; did you mean max_clip?" in refuse("policy")
    path.write_text("[limits]\nmin_cohort = 3\nmin_survivors = 0.1\n")
    assert "honest survivors" in refuse("policy", "--check")


def test_a_wrong_policy_is_told_by_status_and_stops_start(joined: Path, ask: Any, refuse: Any):
    (joined / "policy.toml").write_text("[when]\nhour = 3\n")
    assert "when.hour: unknown key" in ask("status")["not_now"]
    assert "when.hour: unknown key" in refuse("start")


# --- the passphrase ------------------------------------------------------------------------------


@pytest.mark.usefixtures("made")
def test_a_wrong_passphrase_is_a_sentence(place: Path, refuse: Any):
    (place / "pass").write_text("other words\n")
    assert "passphrase is not the one" in refuse("status")


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines\n", b"\xff\xfe", b"x" * 70_000])
def test_a_file_that_is_no_passphrase_is_named(place: Path, refuse: Any, content: bytes):
    (place / "pass").write_bytes(content)
    assert "expected a passphrase in one line" in refuse("status")


@pytest.mark.usefixtures("made")
def test_without_a_terminal_and_a_file_it_is_said_how_to_give_one(
    monkeypatch: pytest.MonkeyPatch, refuse: Any
):
    monkeypatch.delenv("PRIVET_PASSPHRASE_FILE")
    monkeypatch.setattr("sys.stdin", io.StringIO("own words\n"))
    assert "--passphrase-file" in refuse("status")


@pytest.mark.usefixtures("made")
def test_a_passphrase_comes_from_a_descriptor_a_credential_or_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, ask: Any
):
    monkeypatch.delenv("PRIVET_PASSPHRASE_FILE")
    descriptor = supervisor.as_file_descriptor(b"own words")
    ask("status", "--passphrase-file", f"/dev/fd/{descriptor}")
    os.close(descriptor)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(place))
    (place / "pass").rename(place / "privet-passphrase")
    ask("status")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    typed = {True: "own words"}  # by whether what is typed is hidden
    monkeypatch.setattr(typer, "prompt", lambda *_, **how: typed[how["hide_input"]])
    ask("status")


def test_a_home_may_be_opened_by_the_keyring_alone(
    monkeypatch: pytest.MonkeyPatch, ask: Any, refuse: Any
):
    class Backend(dict[tuple[str, str], str]):
        def get_password(self, service: str, user: str) -> str | None:
            return self.get((service, user))

        def set_password(self, service: str, user: str, password: str) -> None:
            self[service, user] = password

        def delete_password(self, service: str, user: str) -> None:
            del self[service, user]

    backend = Backend()
    monkeypatch.setattr(unlock_module, "_system_keyring", lambda: backend)
    assert "choose one" in refuse("init", "--keyring", "--passphrase-file", "pass")
    ask("init", "--keyring")
    assert ask("status")["records"] == 0  # whatever $PRIVET_PASSPHRASE_FILE says
    assert "a passphrase was given" in refuse("status", "--passphrase-file", "pass")
    ask("passphrase", "--new-file", "pass")
    assert backend == {}
    ask("passphrase", "--keyring")
    assert "deleted" in ask("forget", "--yes")["keyring"]
    assert backend == {}


@pytest.mark.usefixtures("made")
def test_a_passphrase_is_changed_and_the_old_one_opens_no_more(place: Path, ask: Any, refuse: Any):
    (place / "new").write_text("new words")
    assert ask("passphrase", "--new-file", "new")["opens_by"] == "passphrase"
    assert "passphrase is not the one" in refuse("status")
    ask("status", "--passphrase-file", "new")


def test_a_vault_of_a_newer_privet_is_left_untouched(made: Path, refuse: Any):
    with sqlite3.connect(made / "vault.sqlite") as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    assert "format version 2" in refuse("status")


def test_half_a_home_is_told_as_such(made: Path, refuse: Any):
    (made / "key.json").unlink()
    assert "has no key.json" in refuse("status")


# --- own records ---------------------------------------------------------------------------------


@pytest.fixture
def own(place: Path) -> Path:
    folder = place / "own"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(f"{SECRET_WORDS}, day {number}.")
        (folder / f"{number:02}.bin").write_bytes(b"\0\1")
    (folder / "chat.jsonl").write_text(json.dumps({"user": "me", "text": SECRET_WORDS}) + "\nno\n")
    return folder


@pytest.mark.usefixtures("made")
def test_add_shows_files_records_and_why_others_were_ignored(own: Path, say: Any):
    said = say("add", str(own), "--me", "me")
    assert "21 records in all" in said
    assert "more files with" in said
    assert "20, such as" in said
    assert str(own / "19.bin") not in said
    again = say("add", "--all")
    assert "21 files as they were" in again
    assert all(f"{number:02}.bin" in again for number in range(20))


@pytest.mark.usefixtures("made")
def test_added_twice_a_source_is_watched_once_and_removed_with_its_records(
    own: Path, ask: Any, refuse: Any
):
    assert ask("add", str(own))["records"] == 21
    assert ask("add", "own", str(own / "00.txt"))["records"] == 21
    (own / "new.txt").write_text("One more day.")
    found = ask("add")
    assert [one["path"] for one in found["files"]] == [str(own / "new.txt")]
    assert ask("sources")["sources"] == {str(own): 22, str(own / "00.txt"): 1}
    assert "is not watched" in refuse("sources", "--remove", "elsewhere")
    assert ask("sources", "--remove", "own")["records"] == 1
    assert ask("sources", "--remove", "own/00.txt") == {"sources": {}, "records": 0, "me": []}


def test_what_a_chat_made_of_records_goes_with_them(made: Path, own: Path, ask: Any):
    ask("add", str(own))
    derived = {"profile", "retrieval/minilm"}
    with Device(made) as home:
        home.vault.put_all(dict.fromkeys(derived, b"made of the records"))
    ask("add")
    with Device(made) as home:
        assert derived <= set(home.vault.names())
    ask("sources", "--remove", "own")
    with Device(made) as home:
        assert not derived & set(home.vault.names())


@pytest.mark.usefixtures("made")
def test_adding_nothing_or_what_is_not_there_is_a_sentence(refuse: Any):
    assert "there is no" in refuse("add", "nowhere")
    assert "nothing is watched yet" in refuse("add")


@pytest.mark.usefixtures("made")
def test_names_that_a_terminal_would_obey_are_harmless(own: Path, say: Any):
    (own / "\x1b[2Jgone.txt").write_text("A strange name.")
    (own / os.fsdecode(b"\xff.txt")).write_text("Not UTF-8.")
    said = say("add", "own", "--all")
    assert "\x1b" not in said
    assert "23 records in all" in said


# --- the server ----------------------------------------------------------------------------------


def certificate(path: Path, begins: int = -1, days: int = 30) -> Path:
    """A self-signed certificate that holds from `begins` days on."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "operator")])
    start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=begins)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    built = built.public_key(key.public_key()).serial_number(1).not_valid_before(start)
    signed = built.not_valid_after(start + datetime.timedelta(days=days)).sign(key, hashes.SHA256())
    hidden = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(signed.public_bytes(Encoding.PEM) + hidden)
    path.with_suffix(".key").write_bytes(hidden)
    return path


def test_joining_keeps_the_certificate_alone_and_says_what_pinning_leaves_open(
    made: Path, place: Path, say: Any
):
    certificate(place / "ca.crt")
    said = say("join", "--server", SERVER, "--ca", "ca.crt")
    assert "A server that invents devices" in said
    with Device(made) as home:
        assert home.joined is not None
        assert home.joined.ca.count("BEGIN CERTIFICATE") == 1
        assert "PRIVATE" not in home.joined.ca
        home.pin(Directory({3: b"\3" * 32}, closed=False))
    say("join", "--server", SERVER, "--ca", "ca.crt")
    with Device(made) as home:
        assert home.directory.known == {3: b"\3" * 32}  # what was pinned stays pinned


def test_a_directory_closes_the_circle_and_says_whether_this_device_is_in_it(
    made: Path, place: Path, say: Any, refuse: Any
):
    certificate(place / "ca.crt")
    write_directory(place / "others", Directory({1: b"\1" * 32}, closed=True))
    words = ("join", "--server", SERVER, "--ca", "ca.crt", "--directory")
    assert "is not in the directory yet" in say(*words, "others")
    with Device(made) as home:
        assert home.directory.closed
        write_directory(place / "all", Directory({1: home.identity.public}, closed=True))
    assert "it has 1 devices" in say(*words, "all")
    (place / "all").write_text("1 zz\n")
    assert "line 1" in refuse(*words, "all")


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((SERVER,), "without TLS is refused"),
        ((SERVER, "--insecure-test"), "on this machine only"),
        (("10.0.0.1:9092", "--insecure-test"), "on this machine only"),
        (("127.0.0.1.example.org:9", "--insecure-test"), "on this machine only"),
        (("localhost:9092", "--insecure-test", "--ca", "ca.crt"), "leave --insecure-test out"),
        (("http://fl.example.org:9092", "--ca", "ca.crt"), "without http://"),
        (("https://fl.example.org:9092", "--ca", "ca.crt"), "without https://"),
        (("fl.example.org", "--ca", "ca.crt"), "expected HOST:PORT"),
        (("fl.example.org:99999", "--ca", "ca.crt"), "expected HOST:PORT"),
        (("fl.example.org:0", "--ca", "ca.crt"), "expected HOST:PORT"),
        ((SERVER, "--ca", "nowhere"), "does not exist"),
        ((SERVER, "--ca", "ca.key"), "found a private key"),
        ((SERVER, "--ca", "pass"), "found none"),
        ((SERVER, "--ca", "old.crt"), "has expired: it holds from"),
        ((SERVER, "--ca", "young.crt"), "is not valid yet: it holds from"),
    ],
)
def test_a_server_that_cannot_be_trusted_is_not_joined(
    place: Path, refuse: Any, ask: Any, words: tuple[str, ...], expected: str
):
    certificate(place / "ca.crt")
    certificate(place / "old.crt", begins=-40)
    certificate(place / "young.crt", begins=2)
    assert expected in refuse("join", "--server", *words)
    assert ask("status")["server"] is None


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.3.2.1"])
def test_a_test_without_tls_joins_this_machine(ask: Any, host: str):
    ask("join", "--server", f"{host}:9092", "--insecure-test")
    assert ask("status")["insecure"] is True


def test_a_server_the_owner_does_not_allow_is_not_joined(made: Path, place: Path, refuse: Any):
    certificate(place / "ca.crt")
    path = made / "policy.toml"
    path.write_text(path.read_text().replace("servers = []", 'servers = ["*.example.com:9092"]'))
    assert "allowed.servers" in refuse("join", "--server", SERVER, "--ca", "ca.crt")


@pytest.mark.usefixtures("joined")
def test_leaving_is_said_and_happens_once(ask: Any, refuse: Any):
    assert ask("leave")["left"] == SERVER
    assert "has joined no server" in refuse("leave")


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def offered(joined: Path) -> Path:
    with Device(joined) as home:
        home.receive("run-1", text())
    return joined


def test_a_run_is_shown_in_full_before_the_first_round_and_agreed_to(
    offered: Path, say: Any, ask: Any
):
    assert "waits for your yes" in say("runs")
    assert "base model" in say("runs", "run-1")
    assert ask("runs")["runs"][0]["state"] == "waits"
    asks = dict(ask("runs", "run-1")["asks"])
    assert {"base model", "rounds", "epsilon, client-level"} <= asks.keys()
    assert "Agreed" in say("runs", "run", "--agree")
    with Device(offered) as home:
        assert home.taking_part("run-1", begins=False).run == "run-1"
        home.ledger.decline("me", "run-1", 3, "the load is 9.9")
    assert "agreed by you" in say("runs")
    assert "the load is 9.9" in say("runs", "run-1")
    assert "Declined" in say("runs", "run-1", "--decline")
    assert ask("runs")["runs"][0]["state"] == "declined"


def test_what_changed_since_the_owner_agreed_is_shown(offered: Path, say: Any, ask: Any):
    say("runs", "run-1", "--agree")
    with Device(offered) as home:
        assert not home.receive("run-1", text(rounds={"cohort": 16, "count": 77}))
    found = ask("runs", "run-1")
    assert found["state"] == "changed"
    assert any(
        line.startswith("rounds.count:") and line.endswith("77") for line in found["changed"]
    )
    assert "changed since you agreed" in say("runs", "run-1", "--agree", "--partly")
    assert ask("runs", "run-1")["changed"] == []


def test_a_run_that_is_paid_for_in_part_needs_the_owners_explicit_word(
    offered: Path, say: Any, capsys: Any
):
    with Device(offered) as home:
        home.receive("run-2", text(rounds={"cohort": 16, "count": 9}))
        home.receive("run-3", text(name="x", rounds={"cohort": 16, "count": 4}))
    capsys.readouterr()
    assert main.run(["client", "runs", "run-2", "--agree"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "your budget.client = 10 in policy.toml allows 4 of 9 rounds" in said
    assert "--agree --partly, or raise budget.client" in said
    with Device(offered) as home:
        assert home.run("run-2")[1] is None
    assert "Agreed" in say("runs", "run-2", "--agree", "--partly")
    assert "Agreed" in say("runs", "run-3", "--agree")
    policy = offered / "policy.toml"
    policy.write_text(policy.read_text().replace("ask = true", "ask = false"))
    with Device(offered) as home, pytest.raises(PrivacyError, match="allows 4 of 12 rounds"):
        home.receive("run-4", text(rounds={"cohort": 16, "count": 12}))  # nobody said a word


def test_a_run_past_the_policy_is_refused_with_every_reason(offered: Path, capsys: Any):
    with Device(offered) as home:
        home.receive("run-2", text(training={"steps": 99}))
    capsys.readouterr()
    assert main.run(["client", "runs", "run-2", "--agree"]) == 2
    assert "limits.max_steps" in capsys.readouterr().err
    with Device(offered) as home:
        assert home.run("run-2")[1] is None


@pytest.mark.usefixtures("offered")
def test_calls_that_make_no_sense_are_sentences(refuse: Any):
    assert "choose one" in refuse("runs", "run-1", "--agree", "--decline")
    assert "name the run" in refuse("runs", "--agree")
    assert "there is no run 'other'" in refuse("runs", "other")
    assert "name its number" in refuse("outbox", "--payload", "x")


def test_the_beginning_of_two_runs_names_neither(offered: Path, refuse: Any):
    with Device(offered) as home:
        home.receive("run-2", text())
    assert "more than one run" in refuse("runs", "run")


# --- status, budget, outbox ----------------------------------------------------------------------


@pytest.fixture
def spent(offered: Path) -> Path:
    """Two rounds were released; of each, keys and the vector left."""
    charges = [
        Charge("client", against, "add_remove", 2.0, distance=1e-9)
        for against in ("analyst", "server")
    ]
    with Device(offered) as home:
        home.agree(home.run("run-1")[0], "owner")
        for number in (1, 2):
            home.sent("run-1", number, "keys", b"public keys")
            home.ledger.check(ME, charges, {"client": 10.0}, 1e-5)
            home.ledger.commit(ME, "run-1", number, "ab" * 32, charges, b"before the mask")
            home.sent("run-1", number, "vector", b"masked %d" % number)
        home.note("round 3 of run-1: it is night")
    return offered


@pytest.mark.usefixtures("spent")
def test_status_says_how_the_device_is(ask: Any, say: Any):
    found = ask("status")
    assert found["releases"] == 2
    assert found["runs"][0]["state"] == "agreed"
    assert found["note"]["sentence"].endswith("it is night")
    assert (found["worker"], found["paused"], found["server"]) == (None, False, SERVER)
    say("pause")
    assert "paused" in ask("status")["not_now"]
    said = say("status")
    assert "2 releases" in said
    assert "not running" in said
    assert ask("pause", "--off") == {"paused": False}
    assert ask("status")["paused"] is False


def test_status_says_whether_the_device_has_its_server(joined: Path, ask: Any, say: Any):
    assert "start` is not running)" in say("status")
    assert "takes part when it is asked" not in say("status")
    watch = connection.Watch(joined / connection.FILE, SERVER, lambda _: None)
    watch.reached()
    with exclusive(joined):
        assert ask("status")["connection"]["ok"] is True
        said = say("status")
        assert "link     reached " in said
        if ask("status")["not_now"] is None:  # this machine may be too busy to take part
            assert "takes part when it is asked" in said
        watch.failed(ConnectionRefusedError())
        found = ask("status")["connection"]
        assert (found["ok"], found["failed"]) == (False, "refused")
        said = " ".join(say("status").split())
        assert "(nothing answers at its address: it may be switched off)" in said
        assert "takes part when it is asked" not in said


def test_status_says_why_not_now(joined: Path, ask: Any):
    path = joined / "policy.toml"
    now = datetime.datetime.now()
    start, end = (f"{(now.hour + more) % 24:02}:00" for more in (2, 3))
    path.write_text(path.read_text().replace('hours = ""', f'hours = "{start}-{end}"'))
    assert "outside when.hours" in ask("status")["not_now"]


def test_a_running_worker_is_seen_and_a_stale_lock_is_not(made: Path, ask: Any):
    with exclusive(made):
        assert ask("status")["worker"] == os.getpid()
    assert (made / "worker.lock").read_text().strip() == str(os.getpid())
    assert ask("status")["worker"] is None
    (made / "worker.lock").write_text("nonsense")
    assert ask("status")["worker"] is None


@pytest.mark.usefixtures("spent")
def test_status_loads_nothing_heavy(place: Path):
    heavy = {"torch", "flwr", "transformers", "opacus", "dp_accounting", "scipy", "peft", "keyring"}
    heavy |= {
        "numpy",
        "httpx",
        "privet.server",
        "privet.experiments.commands.experiment",
        "privet.common.model.assets",
    }
    code = (
        "import sys; from privet.commands import run\n"
        "run(['client', 'status', '--json'])\n"
        f"print('HEAVY', sorted({heavy!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=place)
    assert done.stdout.endswith("HEAVY []\n")
    assert '"releases": 2' in done.stdout


@pytest.mark.usefixtures("spent")
def test_the_budget_is_composed_from_the_ledger_a_line_for_each_adversary(ask: Any, say: Any):
    from privet.common.privacy.accounting import epsilon

    found = ask("budget")
    charge = Charge("client", "server", "add_remove", 2.0, distance=1e-9)
    assert [line["against"] for line in found["lines"]] == ["analyst", "server"]
    analyst, server = found["lines"]
    for line in (analyst, server):
        assert line["epsilon"] == epsilon([charge] * 2, found["delta"])
    for line in found["lines"]:
        assert (line["budget"], line["releases"], line["adjacency"]) == (10.0, 2, "add_remove")
    # rows of an older privet, without their plans
    assert (server["with_masks"], server["known"], found["older"]) == (None, True, 2)
    said = " ".join(say("budget").split())
    assert "all your records" in said
    assert "not known" in said
    assert "Of 2 releases, which an older privet wrote down without their plans" in said


@pytest.mark.usefixtures("made")
def test_a_release_without_noise_has_no_bound_in_words_and_null_in_json(
    made: Path, ask: Any, say: Any
):
    assert "Nothing was released" in say("budget")
    with Device(made) as home:
        bare = Charge("client", "analyst", "add_remove", 0.0)
        home.ledger.check(ME, [bare], {"client": float("inf")}, 1e-5)
        home.ledger.commit(ME, "run-1", 1, "00", [bare], b"")
    assert ask("budget")["lines"][0]["epsilon"] is None
    assert "no bound" in say("budget")


@pytest.mark.usefixtures("spent")
def test_the_outbox_names_each_byte_string_and_the_release_it_belongs_to(
    place: Path, ask: Any, say: Any, refuse: Any
):
    found = ask("outbox")["outbox"]
    assert [(one["phase"], one["release"]) for one in found] == [
        ("keys", None), ("vector", 1), ("keys", None), ("vector", 2),
    ]  # fmt: skip
    one = ask("outbox", "4", "--payload", "bytes")
    assert (place / "bytes").read_bytes() == b"masked 2"
    assert [charge["against"] for charge in one["release"]["charges"]] == ["analyst", "server"]
    assert "noise multiplier 2" in " ".join(say("outbox", "2").split())
    assert "vector" in say("outbox")
    assert "is there already" in refuse("outbox", "4", "--payload", "bytes")
    assert "nothing with number 9" in refuse("outbox", "9")


def test_bytes_that_made_room_are_told_as_such(spent: Path, refuse: Any):
    with Device(spent) as home:
        home.vault.put_all({"payload/00000002": None})
    assert "made room for newer ones" in refuse("outbox", "2", "--payload", "bytes")


# --- forgetting ----------------------------------------------------------------------------------


def test_forgetting_erases_everything_with_proof(spent: Path, say: Any):
    said = say("forget", "--yes")
    assert "key.json was overwritten and removed" in said
    assert "policy.toml" in said
    assert not spent.exists()


def test_what_somebody_else_put_into_the_folder_is_left(made: Path, ask: Any):
    (made / "notes").write_text("not the vault's")
    found = ask("forget", "--yes")
    assert found["kept"] == ["notes"]
    assert found["folder_removed"] is False
    assert [path.name for path in made.iterdir()] == ["notes"]


@pytest.mark.usefixtures("made")
def test_forgetting_needs_the_word_and_a_terminal(monkeypatch: pytest.MonkeyPatch, refuse: Any):
    monkeypatch.setattr("sys.stdin", io.StringIO("FORGET\n"))
    assert "add --yes" in refuse("forget")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(typer, "prompt", lambda *_, **__: "yes")
    assert "was not typed" in refuse("forget")


def test_a_running_worker_keeps_its_home(made: Path, refuse: Any):
    with exclusive(made):
        assert f"process {os.getpid()}" in refuse("forget", "--yes")


# --- start and work ------------------------------------------------------------------------------


def test_the_children_get_their_secrets_by_descriptor_and_never_as_arguments(joined: Path):
    with Device(joined) as home:
        node, worker = processes.specs(home, Passphrase("own words"), 4242)
        key = home.vault.get("node-key")
    try:
        words = " ".join((*node.command, *worker.command))
        assert "own words" not in words
        assert ("--port", "4242") in zip(worker.command, worker.command[1:], strict=False)
        given = dict(zip(worker.command, worker.command[1:], strict=False))
        assert Path(given["--passphrase-file"]).read_bytes() == b"own words"
        secret = Path(given["--secret-file"]).read_bytes()
        asked = dict(zip(node.command, node.command[1:], strict=False))
        assert Path(asked["--superexec-auth-secret-file"]).read_bytes() == secret
        assert Path(asked["--auth-supernode-private-key"]).read_bytes() == key
        assert Path(asked["--root-certificates"]).read_bytes() == b"PEM"
        assert len(secret) == 32
        assert worker.takes_down == (node.name,)
    finally:
        for descriptor in (*node.pass_fds, *worker.pass_fds):
            os.close(descriptor)


def test_a_device_that_belongs_nowhere_or_runs_already_does_not_start(
    made: Path, refuse: Any, ask: Any
):
    assert "privet client join" in refuse("start")
    ask("join", "--server", "localhost:9", "--insecure-test")
    with exclusive(made):
        assert f"process {os.getpid()}" in refuse("start")


def worker_command(place: Path) -> tuple[list[str], tuple[int, ...]]:
    secret, words = (supervisor.as_file_descriptor(data) for data in (b"s" * 32, b"own words"))
    given = ["--port", str(processes.free_port()), "--secret-file", f"/dev/fd/{secret}"]
    given += ["--server", "fl.example.org:9092", "--home", str(place / "home")]
    given += ["--passphrase-file", f"/dev/fd/{words}"]
    return [sys.executable, "-c", ENTRY, "work", *given], (secret, words)


def test_a_worker_looks_for_new_records_waits_for_its_node_and_ends_at_sigterm(
    own: Path, made: Path, place: Path, ask: Any
):
    ask("add", str(own))
    (own / "new.txt").write_text("One more day.")
    command, given = worker_command(place)
    process = subprocess.Popen(
        command, pass_fds=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reader.start()
    try:
        wait_for(lambda: any("1 files read, 22 records" in line for line in lines), 300, "the scan")
        wait_for(lambda: any("waiting for it" in line for line in lines), 300, "the node")
        assert ask("status")["worker"] == process.pid
        second = subprocess.run(
            command, pass_fds=given, capture_output=True, text=True, check=False
        )
        assert second.returncode != 0
        assert f"process {process.pid}" in second.stderr.replace("\n", " ")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        reader.join()
        process.stdout.close()
        for descriptor in given:
            os.close(descriptor)
    assert not any(SECRET_WORDS in line for line in lines)
    assert ask("status")["worker"] is None
    assert ask("sources")["records"] == 22
    assert made.is_dir()


def test_a_scan_waits_while_a_message_is_answered_and_gives_up_at_the_end(own: Path, made: Path):
    stop, busy = threading.Event(), threading.Lock()
    said: list[str] = []
    with Device(made) as home:
        watched_folders.rescan(home, roots=[str(own)])
        (own / "new.txt").write_text("One more day.")
        busy.acquire()
        watcher = threading.Thread(target=processes.watch, args=(home, stop, busy, said.append))
        watcher.start()
        time.sleep(0.3)
        assert said == []
        busy.release()
        wait_for(lambda: said, 300, "the scan")
        assert said == ["1 files read, 22 records in all"]
        stop.set()
        watcher.join(300)
        assert not watcher.is_alive()


def test_a_scan_that_fails_is_said_without_its_text_and_tried_again(
    made: Path, monkeypatch: pytest.MonkeyPatch
):
    path = made / "policy.toml"
    path.write_text(path.read_text().replace("rescan_minutes = 15.0", "rescan_minutes = 0.001"))
    errors: list[Exception] = [ValueError(SECRET_WORDS), StateError("run it again")]

    def failing(*_: Any, **__: Any) -> Any:
        if errors:
            raise errors.pop(0)
        stop.set()
        return SimpleNamespace(found=(), gone=0)

    stop, said = threading.Event(), list[str]()
    monkeypatch.setattr(watched_folders, "rescan", failing)
    with Device(made) as home:
        processes.watch(home, stop, threading.Lock(), said.append)
    assert said[0].endswith("ValueError")
    assert "run it again" in said[1]


def test_a_service_has_the_home_and_where_the_passphrase_lies(made: Path, say: Any, refuse: Any):
    assert "--passphrase-file" in refuse("service")
    unit = say("service", "--passphrase-file", "pass")
    assert f'"{made}"' in unit
    words = unit.partition("ExecStart=")[2].split()
    names = {command.name for command in client.app.registered_commands}
    assert (words[1], words[2] in names) == ("client", True)
    credential = unit.partition("LoadCredential=")[2].partition(":")[0]
    assert credential == access.CREDENTIAL_NAME
