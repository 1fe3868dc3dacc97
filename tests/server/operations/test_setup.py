"""A server's folder, its certificates, the programs that run, and a run's folder."""

import datetime
import itertools
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from privet import commands as main
from privet.common.errors import (
    AssetError,
    ConfigError,
    PrivetError,
    RunExists,
    RunUnfinished,
    StateError,
)
from privet.common.files import append_line
from privet.common.secure_aggregation import fleet_directory
from privet.common.secure_aggregation.keys import Directory, write_directory
from privet.common.settings.config import parse, read
from privet.server import directory_listing
from privet.server.operations import (
    commands,
    control,
    device_runs,
    enrolment,
    proxy,
    services,
    setup,
)
from privet.server.operations.control import Run
from privet.server.operations.server_folder import Server
from privet.server.run_folder import run_lock

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


SHORT = ("server.crt", "internal.crt", "internal-ca.crt")


def made(tmp_path: Path, **chosen: Any) -> Server:
    return setup.init(tmp_path / "server", ["privet.example.org", "192.0.2.7"], **chosen)


def verify(server: Server, name: str, authority: Path, when: datetime.datetime) -> None:
    certificate = x509.load_pem_x509_certificate(server.certificate(name).read_bytes())
    store = Store([x509.load_pem_x509_certificate(authority.read_bytes())])
    subject = x509.DNSName("localhost")
    PolicyBuilder().store(store).time(when).build_server_verifier(subject).verify(certificate, [])


def everything(folder: Path) -> Mapping[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_in_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    server = made(tmp_path)
    for path in (server.folder, *server.folder.rglob("*")):
        if not path.is_symlink():
            expected = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_folder_read_back_is_the_one_that_was_made(tmp_path: Path) -> None:
    server = made(tmp_path, port=4000, inner_port=4001)
    assert setup.load(server.folder) == server
    empty = fleet_directory.load(server.folder / "directory")
    assert isinstance(empty, fleet_directory.Chain)
    assert (empty.version, empty.fleet.startswith("privet.example.org-")) == (0, True)


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    server = made(tmp_path)
    before = everything(server.folder)
    with pytest.raises(RunExists, match="--renew"):
        made(tmp_path)
    assert everything(server.folder) == before


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Server) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(setup, "readme", full)  # the last file of all
    with pytest.raises(StateError, match="disk is full"):
        made(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "host", ["", "https://a.org", "a.org:9092", "a_b", "300.1.1.1", "a..b", "-a", "a" * 254, "ä"]
)
def test_a_host_that_is_no_name_is_refused_and_nothing_is_made(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        setup.init(tmp_path / "server", [host])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "chosen", [{"port": 0}, {"port": 9093}, {"inner_port": 70000}, {"days": 0}, {"days": 4000}]
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, chosen: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        made(tmp_path, **chosen)


def test_no_host_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one --host"):
        setup.init(tmp_path / "server", [])


def test_the_certificate_names_the_hosts_and_this_machine(tmp_path: Path) -> None:
    data = made(tmp_path).certificate("server.crt").read_bytes()
    names = x509.load_pem_x509_certificate(data).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    dns = names.value.get_values_for_type(x509.DNSName)
    addresses = names.value.get_values_for_type(x509.IPAddress)
    assert dns == ["privet.example.org", "localhost"]
    assert list(map(str, addresses)) == ["192.0.2.7", "127.0.0.1", "::1"]


def test_certificates_hold_for_their_days_and_under_their_own_authority(tmp_path: Path) -> None:
    server = made(tmp_path, days=10, now=NOW)
    outer, inner = server.folder / "ca.crt", server.certificate("internal-ca.crt")
    for name, own, other in (("server.crt", outer, inner), ("internal.crt", inner, outer)):
        for when in (NOW, NOW + 9 * DAY):
            verify(server, name, own, when)
        for when in (NOW - DAY, NOW + 11 * DAY):
            with pytest.raises(VerificationError):
                verify(server, name, own, when)
        with pytest.raises(VerificationError):
            verify(server, name, other, NOW)
    assert setup.certified_until(server) == NOW + 10 * DAY


def test_the_authority_cannot_make_another_authority(tmp_path: Path) -> None:
    data = (made(tmp_path).folder / "ca.crt").read_bytes()
    found = x509.load_pem_x509_certificate(data).extensions.get_extension_for_class(
        x509.BasicConstraints
    )
    assert (found.critical, found.value.ca, found.value.path_length) == (True, True, 0)


def test_no_key_of_the_inner_authority_is_kept(tmp_path: Path) -> None:
    server = made(tmp_path)
    keys = [name for name, data in everything(server.folder).items() if b"PRIVATE KEY" in data]
    assert sorted({Path(name).name for name in keys}) == ["ca.key", "internal.key", "server.key"]


def test_renewed_certificates_have_new_keys_and_the_same_authority(tmp_path: Path) -> None:
    server = made(tmp_path, days=10, now=NOW)
    authority = (server.folder / "ca.crt").read_bytes()
    before = {n: server.certificate(n).read_bytes() for n in ("server.key", "internal.key")}
    renewed = setup.renew(server.folder, days=20, now=NOW + 5 * DAY)
    assert renewed == server
    assert (server.folder / "ca.crt").read_bytes() == authority
    assert all(server.certificate(name).read_bytes() != data for name, data in before.items())
    assert setup.certified_until(server) == NOW + 25 * DAY
    verify(server, "server.crt", server.folder / "ca.crt", NOW + 24 * DAY)
    assert [p.name for p in server.folder.glob("certificates.*")] == ["certificates.2"]


def test_a_renewal_that_is_cut_short_changes_nothing_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = made(tmp_path)
    before = server.certificate("server.crt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "symlink_to", full)
        with pytest.raises(StateError, match="disk is full"):
            setup.renew(server.folder)
    assert server.certificate("server.crt").read_bytes() == before
    setup.renew(server.folder, ["new.example.org"])
    assert setup.load(server.folder).hosts == ("new.example.org",)
    assert server.certificate("server.crt").read_bytes() != before


def test_renewal_asks_for_an_authority_key_that_was_moved_away(tmp_path: Path) -> None:
    server = made(tmp_path)
    stick = tmp_path / "stick"
    os.replace(server.folder / "ca", stick)
    with pytest.raises(StateError, match="--ca-key"):
        setup.renew(server.folder)
    setup.renew(server.folder, ca_key=stick / "ca.key")


def test_renewal_refuses_the_key_of_another_authority_and_what_is_no_key(tmp_path: Path) -> None:
    server = made(tmp_path)
    other = setup.init(tmp_path / "other", ["b.org"])
    with pytest.raises(StateError, match="another CA"):
        setup.renew(server.folder, ca_key=other.folder / "ca" / "ca.key")
    with pytest.raises(StateError, match="PEM"):
        setup.renew(server.folder, ca_key=server.folder / "README.md")


def test_a_folder_that_is_none_damaged_or_newer_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no server's folder"):
        setup.load(tmp_path)
    server = made(tmp_path)
    facts = server.folder / "server.json"
    facts.write_text(facts.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StateError, match="format 2"):
        setup.load(server.folder)
    facts.write_text("[]")
    with pytest.raises(StateError, match="damaged"):
        setup.load(server.folder)


def test_the_superlink_listens_on_loopback_with_tls_and_node_keys(tmp_path: Path) -> None:
    server = made(tmp_path)
    command = services.commands(server)["superlink"]
    options = dict(itertools.pairwise(command))
    assert options["--host"] == "127.0.0.1"
    assert options["--isolation"] == "process"
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command
    assert Path(options["--superexec-auth-secret-file"]).read_bytes()


def test_a_server_without_nginx_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "find_nginx", lambda: None)
    with pytest.raises(AssetError, match="apt install nginx"):
        commands.up(made(tmp_path).folder)


@pytest.fixture
def enrolled(tmp_path: Path) -> Server:
    server = made(tmp_path)
    known = {number: bytes([number]) * 32 for number in range(4)}
    write_directory(server.folder / "directory", Directory(known, closed=True))
    return server


def settings(llama: Path, **more: Any) -> Any:
    return parse(
        {
            "name": "first",
            "data": {"source": "devices", **more.pop("data", {})},
            "model": {"base": str(llama)},
            "adapter": {"last_blocks": 1},
            "rounds": {"cohort": 4, "count": 3, **more.pop("rounds", {})},
            "secure_aggregation": {"min_cohort": 3},
            "insecure_test_seed": 1,
            **more,
        }
    )


def test_a_run_folder_has_the_settings_the_run_id_and_the_directory(
    enrolled: Server, llama_folder: Path
) -> None:
    config = device_runs.prepare(enrolled, settings(llama_folder), resume=False)
    place = enrolled.folder / "runs" / "first"
    assert config.data.clients == 4
    assert config.data.task == "generation"
    assert sorted(p.name for p in place.iterdir()) == ["config.toml", "directory", "run-id"]
    assert fleet_directory.listed(place / "directory").known.keys() == {0, 1, 2, 3}
    assert (place / "run-id").read_text().startswith("first-")


def test_a_run_is_resumed_with_the_same_settings_only(enrolled: Server, llama_folder: Path) -> None:
    first = device_runs.prepare(enrolled, settings(llama_folder), resume=False)
    with pytest.raises(RunExists, match="--resume"):
        device_runs.prepare(enrolled, settings(llama_folder), resume=False)
    assert device_runs.prepare(enrolled, settings(llama_folder), resume=True) == first
    clip = {"client": {"clip": 0.5}}
    with pytest.raises(ConfigError, match=r"other settings \(privacy.client.clip was 1.0"):
        device_runs.prepare(enrolled, settings(llama_folder, privacy=clip), resume=True)


def test_a_run_is_extended_but_not_while_a_process_serves_it(
    enrolled: Server, llama_folder: Path
) -> None:
    first = device_runs.prepare(enrolled, settings(llama_folder), resume=False)
    place = enrolled.folder / "runs" / "first"
    longer = settings(llama_folder, rounds={"count": 9})
    with (
        run_lock.locked(place, 7),
        pytest.raises(StateError, match=r"is going on, with other settings \(rounds.count"),
    ):
        device_runs.prepare(enrolled, longer, resume=True)
    found = device_runs.prepare(enrolled, longer, resume=True)
    assert (first.rounds.count, found.rounds.count) == (3, 9)
    assert read(place / "config.toml") == found


def test_a_run_goes_on_after_more_devices_were_enrolled_and_none_after_a_rewritten_entry(
    enrolled: Server, llama_folder: Path
) -> None:
    first = device_runs.prepare(enrolled, settings(llama_folder), resume=False)
    path = enrolled.folder / "directory"
    begun, signer = (
        fleet_directory.load(path),
        enrolment.read_key(enrolled.folder / "directory.key"),
    )
    assert isinstance(begun, fleet_directory.Chain)
    more = begun.with_entries([fleet_directory.Entry(4, bytes([9]) * 32)]).sign(signer)
    fleet_directory.write(path, more)
    assert device_runs.prepare(enrolled, settings(llama_folder), resume=True) == first
    assert directory_listing.newest(enrolled.folder / "runs" / "first") == more
    changed = (*begun.entries[:3], fleet_directory.Entry(3, bytes([9]) * 32))
    fleet_directory.write(path, fleet_directory.Chain(begun.fleet, begun.key, changed).sign(signer))
    with pytest.raises(StateError, match=r"does not continue .*entry 3 .* was rewritten"):
        device_runs.prepare(enrolled, settings(llama_folder), resume=True)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"secure_aggregation": {"min_cohort": 3, "survivors": 1.0, "colluding": 3}},
            r"at most 2 may collude|colluding",
        ),
        ({"data": {"source": "shakespeare"}}, "data.source"),
        ({"data": {"clients": 5}}, "4 devices are enrolled"),
        ({"rounds": {"cohort": 5}}, "rounds.cohort = 5"),
        ({"simulation": {"dropout": 0.1}}, "simulation.dropout"),
        ({"model": {"base": "/nowhere"}}, "/nowhere"),
    ],
)
def test_settings_no_device_can_take_part_in_leave_nothing_behind(
    enrolled: Server, llama_folder: Path, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(PrivetError, match=told):
        device_runs.prepare(enrolled, settings(llama_folder, **more), resume=False)
    assert list((enrolled.folder / "runs").iterdir()) == []


def test_a_run_that_its_own_cap_does_not_pay_for_is_refused_at_the_start(
    enrolled: Server, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared(count: int, budget: Mapping[str, float], cohort: int = 4) -> Any:
        private = {"example": {"enabled": False}, "budget": budget}
        config = settings(
            llama_folder,
            privacy={**private, "client": {"noise_at": "distributed"}},
            rounds={"count": count, "cohort": cohort},
            secure_aggregation={"min_cohort": 3, "colluding": 0},
            name=f"run-{count}-{cohort}-{len(budget)}",
        )
        refuse = main._Reports().refuse_unpaid
        return device_runs.prepare(enrolled, config, resume=False, refuse=refuse)

    with pytest.raises(ConfigError) as refused:
        prepared(8, {"client": 9.0})
    said = str(refused.value)
    assert "the run's own cap is 9 (privacy.budget.client in its configuration)" in said
    assert "pays for 3 of rounds.count = 8 rounds of each participant at worst" in said
    assert "set privacy.budget.client = 15.63" in said
    assert "or rounds.count = 3" in said
    assert list((enrolled.folder / "runs").iterdir()) == []
    prepared(3, {"client": 9.0})
    prepared(8, {})  # an owner's budget is the owner's
    assert capsys.readouterr().err == ""
    prepared(4, {"client": 9.0}, cohort=3)  # four devices share the rounds
    assert "warning: the run's own cap is 9" in capsys.readouterr().err


def test_a_run_without_devices_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(StateError, match="nobody is enrolled"):
        device_runs.prepare(made(tmp_path), settings(llama_folder), resume=False)


def record(number: int, **more: Any) -> dict[str, Any]:
    counts = {"asked": 4, "answered": 3, "declined": 1, "refused": 0, "void": False}
    return {"round": number, **counts, "seconds": 1.5, **more}


def following(
    monkeypatch: pytest.MonkeyPatch, place: Path, server: Server, states: list[Any]
) -> list[str]:
    """What `follow` shows while the SuperLink tells these states, a round after each."""
    place.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    number = [7]

    def told(_: Server) -> list[Run]:
        state = states.pop(0)
        append_line(place / "rounds.jsonl", record(3 - len(states)))
        if isinstance(state, Exception):
            raise state
        return [Run(number[0], str(place), state, "a reason")]

    def again(*_: object) -> int:
        if states[0] == "away":
            states.pop(0)
            raise StateError("gone")
        number[0] += 1
        return number[0]

    monkeypatch.setattr(control, "runs", told)
    monkeypatch.setattr(control, "stop_run", lambda *_: None)
    monkeypatch.setattr(control, "start_run", again)
    monkeypatch.setattr(device_runs, "going_on", lambda *_: None)
    for name in ("LOOK_S", "FIRST_WAIT_S", "SILENCE_S"):
        monkeypatch.setattr(device_runs, name, 0.0)
    device_runs.follow(server, place, 7, 3, said.append)
    return said


def test_following_shows_each_round_once_and_waits_for_a_superlink_that_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = made(tmp_path)
    states = ["running", StateError("gone"), "completed"]
    said = following(monkeypatch, server.folder / "runs" / "a", server, states)
    assert [line.split()[0] for line in said] == ["round", "waiting:", "round", "round", "done:"]
    assert said[0] == "round 1/3  4 asked  3 answered  1 declined  1.5 s"


def test_a_run_that_ends_without_its_rounds_is_not_said_to_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = made(tmp_path)
    place = server.folder / "runs" / "a"
    with pytest.raises(RunUnfinished, match=r"ended with 2 of 3 rounds done; .*--resume") as ended:
        following(monkeypatch, place, server, ["running", "completed"])
    assert ended.value.exit_code == 1


def serving_file(place: Path, run: int, refused: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / run_lock.LOCK).write_text(json.dumps({"run": run, "refused": refused}))


def test_a_run_that_privet_refuses_ends_with_its_own_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = made(tmp_path)
    place = server.folder / "runs" / "a"
    serving_file(place, 7, "a round needs 3 devices")
    with pytest.raises(StateError, match=r"failed: a round needs 3 devices; .*--resume"):
        following(monkeypatch, place, server, ["failed"])


def test_a_run_that_somebody_stopped_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = made(tmp_path)
    with pytest.raises(StateError, match=r"was stopped: a reason"):
        following(monkeypatch, server.folder / "runs" / "a", server, ["stopped"])


@pytest.mark.parametrize("how", ["failed", "running"])
def test_a_run_whose_server_process_was_lost_is_started_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower says so after a minute; that nobody holds the lock is seen at once."""
    server = made(tmp_path)
    place = server.folder / "runs" / "a"
    serving_file(place, 7, "")
    said = following(monkeypatch, place, server, [how, "away", "running", "completed"])
    assert [line.split()[0] for line in said] == [
        "round", "the", "waiting:", "round", "round", "done:"
    ]  # fmt: skip
    assert "goes on from its checkpoint" in said[1]


def test_a_run_that_is_lost_again_and_again_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = made(tmp_path)
    monkeypatch.setattr(device_runs, "read_records", lambda _: [])
    with pytest.raises(StateError, match="failed: a reason"):
        following(monkeypatch, server.folder / "runs" / "a", server, ["failed"] * 6)


def test_one_process_at_a_time_serves_a_run_folder(tmp_path: Path) -> None:
    assert not run_lock.lost(tmp_path, 7)
    with run_lock.locked(tmp_path, 7):
        assert not run_lock.lost(tmp_path, 7)
        with (
            pytest.raises(StateError, match="another process serves"),
            run_lock.locked(tmp_path, 8, patience_s=0),
        ):
            pass
    assert run_lock.lost(tmp_path, 7)
    assert not run_lock.lost(tmp_path, 8)
    assert run_lock.refusal(tmp_path, 7) == ""
    with pytest.raises(ConfigError), run_lock.locked(tmp_path, 9):
        raise ConfigError("a sentence")
    assert run_lock.refusal(tmp_path, 9) == "a sentence"
    assert run_lock.refusal(tmp_path, 7) == ""


def test_status_without_a_superlink_says_what_the_files_say(
    enrolled: Server, llama_folder: Path
) -> None:
    quiet = Server(enrolled.folder, enrolled.hosts, 1, 2)  # nothing answers there
    device_runs.prepare(enrolled, settings(llama_folder), resume=False)
    append_line(enrolled.folder / "runs" / "first" / "rounds.jsonl", record(1, mean_norm=0.5))
    found = commands.facts(quiet)
    assert found["superlink"] is False
    assert found["devices"] == {"enrolled": 0, "registered": None, "online": None, "each": []}
    assert found["warnings"] == []
    (run,) = found["runs"]
    assert (run["name"], run["status"], run["count"]) == ("first", "unknown", 3)
    assert run["rounds"] == [
        {"round": 1, "asked": 4, "answered": 3, "declined": 1, "refused": 0, "void": False}
    ]


@pytest.mark.parametrize(
    ("days", "after", "told"),
    [
        (60, 29, []),
        (60, 31, [f"{name} expires on 2026-03-02, in 2" for name in SHORT]),
        (60, 61, [f"{name} expired on 2026-03-02: no device can connect; " for name in SHORT]),
        (365, 3650, ["ca.crt expired", *(f"{name} expired" for name in SHORT)]),
    ],
)
def test_certificates_that_expire_within_a_month_or_have_are_warned_of(
    tmp_path: Path, days: int, after: int, told: list[str]
) -> None:
    made_on = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    server = made(tmp_path, days=days, now=made_on)
    said = setup.expiring(server, made_on + datetime.timedelta(days=after))
    assert len(said) == len(told)
    for one, words in zip(said, told, strict=True):
        assert one.startswith(words), said
        assert "--renew" in one or "new server's folder" in one


def test_status_prints_each_device_and_the_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = made(tmp_path, days=5)
    card = {"identity": "ab" * 32, "node": "key", "name": "desk"}
    entry = {"number": 0, "card": card, "removed": False}
    (server.folder / "devices.json").write_text(json.dumps([entry]))
    heard = {"version": "0.0.9", "run": "first", "accepted": False, "time": 1_700_000_000.0}
    (server.folder / "seen.json").write_text(json.dumps({"0": heard}))
    assert main.run(["server", "status", str(server.folder)]) == 0
    said = capsys.readouterr().out
    assert "0 desk  privet 0.0.9  seen 2023-11-14 22:13  not accepted  missing: runs" in said
    assert "WARNING: server.crt expires on " in said


def test_the_readme_names_the_port_and_where_the_authority_goes(tmp_path: Path) -> None:
    server = made(tmp_path, port=4321)
    text = (server.folder / "README.md").read_text()
    assert "privet.example.org:4321" in text
    assert "Move `ca/` away" in text
