"""connection.py: a device knows whether it has its server, and says so in privet's words."""

import json
import os
import socket
import ssl
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from privet.client.runtime.connection import FILE, Connection, Watch, classify, read, sentence

SERVER = "fl.example.org:9092"
NOW = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
DAY = 86400.0


class Clock:
    """A time that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Answered(Exception):
    """As httpx's, of a request that was answered with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status)


def caused(by: BaseException) -> Exception:
    """As httpx tells it: the cause of the cause."""
    inner, outer = OSError("inner"), Exception("outer")
    inner.__cause__, outer.__cause__ = by, inner
    return outer


def untrusted(code: int) -> Exception:
    error = ssl.SSLCertVerificationError("certificate verify failed")
    error.verify_code = code
    return caused(error)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def watch(tmp_path: Path, clock: Clock, said: list[str]) -> Watch:
    return Watch(tmp_path / FILE, SERVER, said.append, lambda: (NOW - DAY, NOW + DAY), clock)


def told(folder: Path, now: float, running: bool = True) -> str:
    return sentence(read(folder, SERVER), running, now)[1]


def fails(watch: Watch, error: Exception) -> None:
    def ask() -> None:
        raise error

    with pytest.raises(type(error)):
        watch.watched(ask)()


def test_a_device_says_when_its_server_was_reached(watch: Watch, tmp_path: Path):
    assert told(tmp_path, NOW) == "not reached yet (no answer so far)"
    assert watch.watched(lambda x: x + 1)(1) == 2
    assert sentence(read(tmp_path, SERVER), True, NOW + 12) == (True, "reached 12 s ago")
    assert told(tmp_path, NOW + 500).startswith("not reached since 2023-11-14 22:13 UTC (nothing")
    assert "`privet client start` is not running" in told(tmp_path, NOW + 12, running=False)


def test_a_device_that_is_not_enrolled_is_told_to_send_its_card(watch: Watch, tmp_path: Path):
    fails(watch, Answered(412))
    assert told(tmp_path, NOW) == (
        "not enrolled yet: send your card to the operator (privet client card)"
    )
    watch.reached()
    assert told(tmp_path, NOW + 1) == "reached 1 s ago"


def test_a_device_that_was_removed_is_not_enrolled_any_more(
    watch: Watch, clock: Clock, tmp_path: Path
):
    watch.reached()
    clock.now += 20
    fails(watch, Answered(412))  # a minute after a crash that is the node before
    assert "takes the process before for connected" in told(tmp_path, clock.now)
    clock.now += 600
    fails(watch, Answered(412))
    assert told(tmp_path, clock.now).startswith("not enrolled any more: not reached since 2023-11")


def test_an_expired_certificate_is_told_with_its_date(watch: Watch, clock: Clock, tmp_path: Path):
    watch.reached()
    clock.now += 60
    fails(watch, untrusted(10))
    assert told(tmp_path, clock.now) == (
        "not reached since 2023-11-14 22:13 UTC (its certificate expired on 2023-11-13: the "
        "operator renews it)"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (caused(ConnectionRefusedError()), "nothing answers at its address"),
        (caused(socket.gaierror(-2, "unknown")), "its name is not known here"),
        (caused(TimeoutError()), "it does not answer"),
        (caused(ssl.SSLError("wrong version")), "does not speak TLS"),
        (untrusted(9), "holds from a later date"),
        (untrusted(62), "for another name"),
        (untrusted(20), "not signed by the one this device joined with"),
        (Answered(401), "refuses this device's signature"),
        (Answered(503), "its SuperLink does not"),
        (Answered(500), "status 500"),
        (RuntimeError("quotes a secret"), "the connection broke (RuntimeError)"),
    ],
)
def test_each_failure_has_a_sentence_of_privets(
    watch: Watch, tmp_path: Path, said: list[str], error: Exception, words: str
):
    watch.reached()
    fails(watch, error)
    assert words in told(tmp_path, NOW)
    assert said[1].startswith(f"the server {SERVER} is not reached: ")
    assert "secret" not in said[1] + (tmp_path / FILE).read_text()


def test_a_failure_is_said_once_and_the_server_that_is_back_too(
    watch: Watch, clock: Clock, said: list[str]
):
    for _ in range(5):
        fails(watch, caused(ConnectionRefusedError()))
        clock.now += 1
    watch.reached()
    watch.reached()
    assert [line.split(":9092 ")[1][:14] for line in said] == ["is not reached", "is reached"]
    assert watch.failure == ""


def test_a_run_that_has_ended_is_no_lost_server(watch: Watch, tmp_path: Path):
    watch.reached()
    fails(watch, Answered(403))
    assert told(tmp_path, NOW + 3) == "reached 3 s ago"


def test_the_file_is_for_the_owner_alone_and_written_seldom(
    watch: Watch, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    replaced = os.replace

    def counted(source: str, target: str) -> None:
        written.append(source)
        replaced(source, target)

    monkeypatch.setattr(os, "replace", counted)
    for _ in range(100):
        watch.reached()
        clock.now += 1
    assert len(written) == 10
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == [FILE]
    assert "example" not in (tmp_path / FILE).read_text()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"format": 9, "server": "x"}']
)
def test_a_damaged_file_or_another_servers_says_nothing(tmp_path: Path, content: str):
    (tmp_path / FILE).write_text(content)
    assert read(tmp_path, SERVER) == Connection(read(tmp_path, SERVER).server)
    Watch(tmp_path / FILE, "other:1", lambda _: None).reached()
    assert json.loads((tmp_path / FILE).read_text())["reached"] > 0
    assert read(tmp_path, SERVER).reached == 0.0


def test_the_certificate_that_ran_out_may_be_the_authoritys():
    kind, words = classify(untrusted(10), False, lambda: (NOW + DAY, NOW - 3 * DAY), NOW)
    assert (kind, "2023-11-11" in words) == ("certificate expired", True)
