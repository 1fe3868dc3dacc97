"""The signed directory: what a device takes over, and what it refuses by name."""

import dataclasses
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from privet.client.enrolled import join
from privet.client.enrolled import pinned_directory as fleet
from privet.client.store import key_file as unlock_module
from privet.client.store.device_store import DeviceStore
from privet.client.store.key_file import Passphrase
from privet.common.errors import ConfigError, DataError, ProtocolError, StateError
from privet.common.secure_aggregation import fleet_directory, keys
from privet.common.secure_aggregation.fleet_directory import Chain, Entry, Head, brought_up
from privet.common.secure_aggregation.keys import Directory, Identity, write_directory

SIGNER, STRANGER = (Identity.of(bytes([n]) * 32) for n in (200, 201))
FLEET = "fl.example.org-1"


def person(number: int) -> bytes:
    return Identity.of(bytes([number + 1]) * 32).public


def chain_of(*clients: int, fleet: str = FLEET, signer: Identity = SIGNER) -> Chain:
    entries = tuple(Entry(n, person(n)) for n in clients)
    return Chain(fleet, signer.public, entries).sign(signer)


def grown(before: Chain, *entries: Entry, signer: Identity = SIGNER) -> Chain:
    return before.with_entries(entries).sign(signer)


OWN = chain_of(0, 1, 2)


# --- the chain -----------------------------------------------------------------------------------


def test_a_directory_comes_back_from_its_file_whole(tmp_path: Path):
    found = grown(OWN, Entry(1, person(1), removed=True), Entry(3, person(3)))
    fleet_directory.write(tmp_path / "directory", found)
    assert fleet_directory.load(tmp_path / "directory") == found
    assert found.directory.known == {n: person(n) for n in (0, 2, 3)}
    assert (found.version, found.directory.enrolled) == (5, 3)
    assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([Entry(1, person(9))], "adds client 1 a second time"),
        ([Entry(3, person(1))], "gives client 3 the identity of client 1"),
        ([Entry(7, person(7), removed=True)], "removes client 7, who is not"),
        ([Entry(1, person(2), removed=True)], "removes client 1, who is not"),
        ([Entry(1, person(1), removed=True)] * 2, "removes client 1, who is not"),
        ([Entry(1, person(1), removed=True), Entry(1, person(1))], "client 1 a second time"),
        ([Entry(1, person(1), removed=True), Entry(3, person(1))], "the identity of client 1"),
    ],
    ids=["number", "identity", "nobody", "another", "gone", "number back", "identity back"],
)
def test_no_number_and_no_identity_is_given_out_twice(entries: list[Entry], told: str):
    with pytest.raises(ProtocolError, match=told):
        OWN.with_entries(entries)


def test_a_chain_longer_than_a_device_pins_is_refused(monkeypatch: pytest.MonkeyPatch):
    longer = grown(OWN, Entry(3, person(3)))
    monkeypatch.setattr(keys, "MAX_KNOWN", 3)
    with pytest.raises(ProtocolError, match="at most 3 are read"):
        OWN.with_entries([Entry(3, person(3))])
    with pytest.raises(ProtocolError, match="has 4 entries; at most 3"):
        brought_up(OWN, longer.head, 3, longer.entries[3:])
    with pytest.raises(ProtocolError, match="has 4 entries; at most 3"):
        fleet_directory.entries_of(fleet_directory.lines_of(longer))


def cut(text: str, index: int) -> str:
    lines = text.splitlines()
    del lines[index]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (lambda t: cut(t, -1), "head should be"),
        (lambda t: cut(t, -2), "2 entries and its head is that of 3"),
        (lambda t: cut(t, 2), "entry 1 of the directory should be"),
        (lambda t: t[:-1], "was cut"),
        (lambda t: t.replace(person(1).hex(), person(9).hex()), "its head is that of 3 others"),
        (lambda t: t.replace("1 add 1", "1 add 9"), "its head is that of 3 others"),
        (lambda t: t.replace("1 add 1", "1 add 01"), "entry 1 of the directory should be"),
        (lambda t: t.replace("1 add 1", "1 sub 1"), "entry 1 of the directory should be"),
        (lambda t: t.replace("2 add 2", "2 add 1"), "adds client 1 a second time"),
        (lambda t: t.replace(FLEET, "fl.example.org-2"), "its head is that of 3 others"),
        (lambda t: t.replace(" 3 ", " 2 "), "3 entries and its head is that of 2"),
        (lambda t: t.replace(OWN.signature.hex(), "00" * 64), "is not signed by the key"),
        (lambda t: t.replace(OWN.signature.hex(), "unsigned"), "is not signed by the key"),
        (lambda t: t.replace(OWN.signature.hex(), "ab"), "head should be"),
    ],
)
def test_a_file_that_was_cut_or_altered_is_refused(tmp_path: Path, alter: Any, told: str):
    (tmp_path / "directory").write_text(alter(fleet_directory.text(OWN)))
    with pytest.raises(StateError, match=told):
        fleet_directory.load(tmp_path / "directory")


# --- what a device takes over --------------------------------------------------------------------


def shown(own: Chain, server: Chain) -> Chain:
    """What a device holds in the end that is greeted until it asks for nothing more."""
    entries: tuple[Entry, ...] = ()
    since, head = server.version, server.head
    for _ in range(3):
        found = brought_up(own, head, since, entries)
        if isinstance(found, Chain):
            return found
        since, entries = found, server.entries[found:]
    raise AssertionError("it asks for ever")


def test_a_newer_directory_is_taken_over_by_its_head_and_the_new_entries():
    newer = grown(OWN, Entry(3, person(3)), Entry(0, person(0), removed=True))
    assert brought_up(OWN, newer.head, newer.version, ()) == 3  # asks from its own end on
    assert brought_up(OWN, newer.head, 3, newer.entries[3:]) == newer
    assert shown(OWN, OWN) is OWN
    nothing = Chain("", SIGNER.public)  # joined with the key alone
    assert shown(nothing, newer) == newer
    assert shown(nothing, chain_of()) == chain_of()


REWRITTEN = Chain(
    FLEET, SIGNER.public, (Entry(0, person(0)), Entry(1, person(8)), *OWN.entries[2:])
)


@pytest.mark.parametrize(
    ("server", "told"),
    [
        (chain_of(0, 1), "version 2 .* holds version 3: forgotten are client 2 added"),
        (chain_of(0, 2, 3), "entry 1 .* was rewritten: client 1 added .* became client 2 added"),
        (REWRITTEN.sign(SIGNER), r"entry 1 .* rewritten: client 1 added \(.*became client 1 added"),
        (
            grown(REWRITTEN, Entry(3, person(3))),
            r"entry 1 .* was rewritten: client 1 added \(.* became client 1 added",
        ),
        (chain_of(0, 1, 2, 3, signer=STRANGER), "under the key .* and the pinned one is"),
        (dataclasses.replace(chain_of(0, 1, 2, 3), signature=bytes(64)), "not signed by"),
        (
            dataclasses.replace(
                chain_of(0, 1, 2, 3), signature=STRANGER.sign(chain_of(0, 1, 2, 3).head.message)
            ),
            "not signed by the pinned",
        ),
        (
            dataclasses.replace(chain_of(0, 1, 2, 3), signature=OWN.signature),
            "not signed by the pinned",
        ),
        (chain_of(0, 1, 2, 3, fleet="fl.example.org-2"), "of fl.example.org-2, and .* belongs to"),
    ],
    ids=["goes back", "forgets one", "rewrites", "rewrites and grows", "key", "no signature",
         "stranger", "old signature", "other server"],
)  # fmt: skip
def test_a_directory_that_does_not_continue_the_held_one_is_refused_by_name(
    server: Chain, told: str
):
    with pytest.raises(ProtocolError, match=told):
        shown(OWN, server)


def test_entries_that_were_cut_or_altered_on_their_way_are_refused():
    newer = chain_of(0, 1, 2, 3, 4)
    with pytest.raises(
        ProtocolError, match=r"of 5 entries of the directory, 3 to 3 came: .* short"
    ):
        brought_up(OWN, newer.head, 3, newer.entries[3:4])
    with pytest.raises(
        ProtocolError, match=r"of 5 entries of the directory, 0 to 2 came: .* short"
    ):
        brought_up(OWN, newer.head, 0, newer.entries[:3])
    altered = (*newer.entries[:4], Entry(4, person(9)))
    assert brought_up(OWN, newer.head, 3, altered[3:]) == 0  # asks for all, to tell what differs
    with pytest.raises(ProtocolError, match="are not those of the signed head"):
        brought_up(OWN, newer.head, 0, altered)


@pytest.mark.parametrize("line", ["", "head", "head x", f"head a b {'0' * 64} 1", "head  x y z"])
def test_a_malformed_head_is_refused(line: str):
    with pytest.raises(ProtocolError, match="head should be"):
        Head.of(line)


# --- a device ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[DeviceStore]:
    with DeviceStore.create(tmp_path / "home", Passphrase("own")) as made:
        yield made


def asked(tmp_path: Path, chain: Chain | Directory | None, **more: Any) -> join.Asked:
    path = tmp_path / "given"
    if isinstance(chain, Chain):
        fleet_directory.write(path, chain)
    elif chain is not None:
        write_directory(path, chain)
    return join.Asked("127.0.0.1:9", None, None if chain is None else path, insecure=True, **more)


def offer(chain: Chain, since: int) -> Mapping[str, Any]:
    lines = "\n".join(fleet_directory.lines_of(chain, since))
    return {"directory": str(chain.head), "since": since, "entries": lines}


def test_a_device_fetches_what_it_lacks_shows_it_and_keeps_a_record(
    home: DeviceStore, tmp_path: Path
):
    said = " ".join(join.join(home, asked(tmp_path, OWN)))
    assert f"{FLEET} has 3 devices, version 3, signed by the key that came with it" in said
    assert OWN.hash.hex() in said
    assert "not in it yet" in said
    newer = grown(OWN, Entry(3, home.identity.public), Entry(0, person(0), removed=True))
    assert fleet.heard(home, offer(newer, 5)) == 3
    assert fleet.heard(home, offer(newer, 3)) == -1
    assert home.chain == newer
    assert home.enrolled == 3
    found = fleet.facts(home)
    assert found is not None
    assert (found["version"], found["head"], found["listed"]) == (5, newer.hash.hex(), True)
    assert found["last"] is not None
    assert found["last"][3] == "client 3 added, client 0 removed; 3 devices are enrolled"
    before = {name: home.vault.version(name) for name in home.vault.names()}
    assert fleet.heard(home, offer(newer, 5)) == -1  # said again, it writes nothing
    assert {name: home.vault.version(name) for name in home.vault.names()} == before


def test_what_is_refused_is_told_recorded_and_said_with_every_decline(
    home: DeviceStore, tmp_path: Path
):
    join.join(home, asked(tmp_path, OWN))
    other = grown(REWRITTEN, Entry(3, person(3)))
    assert fleet.heard(home, offer(other, 4)) == 3
    assert fleet.heard(home, offer(other, 3)) == 0
    assert fleet.heard(home, offer(other, 0)) == -1
    assert home.chain == OWN
    assert "entry 1 of the directory was rewritten: client 1" in str(home.last_note)
    with pytest.raises(
        ProtocolError, match=r"client 3 is not .*refused: entry 1 .* client 1 added"
    ):
        home.directory.admit({3: person(3)})
    assert home.directory.admit({1: person(1)})
    (line,) = fleet.history(home)
    assert (line[1], line[2]) == (3, OWN.hash.hex())
    assert fleet.heard(home, offer(other, 0)) == -1
    assert len(fleet.history(home)) == 1
    assert fleet.heard(home, offer(grown(OWN, Entry(3, person(3))), 3)) == -1
    assert home.directory_refused == ""
    assert len(fleet.history(home)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"since": -1}, {"since": "0"}, {"entries": "0 add 0"}, {"directory": b"head"},
        {"entries": 7}, {"directory": ""},
    ],
)  # fmt: skip
def test_a_malformed_offer_changes_nothing_and_is_told(
    home: DeviceStore, tmp_path: Path, changes: dict[str, Any]
):
    join.join(home, asked(tmp_path, OWN))
    newer = grown(OWN, Entry(3, person(3)))
    assert fleet.heard(home, {**offer(newer, 3), **changes}) == -1
    assert home.chain == OWN
    assert home.directory_refused
    assert fleet.heard(home, {"directory": str(newer.head)}) == -1
    assert "a part of it is missing" in home.directory_refused


def test_a_third_partys_key_is_pinned_with_or_without_a_first_directory(
    home: DeviceStore, tmp_path: Path
):
    with pytest.raises(ConfigError, match="not the directory that you trust"):
        join.join(home, asked(tmp_path, OWN, key=STRANGER.public.hex()))
    for wrong in ("", "zz", "AB" * 32, str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match="expected 64 hexadecimal digits"):
            join.join(home, asked(tmp_path, None, key=wrong))
    plain = Directory({1: person(1)}, closed=True)
    with pytest.raises(ConfigError, match="a list that nobody signed, and --directory-key"):
        join.join(home, asked(tmp_path, plain, key=SIGNER.public.hex()))
    (tmp_path / "key").write_text(SIGNER.public.hex() + "\n")
    said = join.join(home, asked(tmp_path, None, key=str(tmp_path / "key")))
    assert "has not come yet" in said[-1]
    assert home.directory.closed
    assert home.enrolled == 0
    assert fleet.heard(home, offer(chain_of(0, signer=STRANGER), 0)) == -1
    assert "the pinned one is" in home.directory_refused
    assert fleet.heard(home, offer(OWN, 0)) == -1
    assert home.chain == OWN


def test_joining_again_keeps_the_newer_and_refuses_another_history(
    home: DeviceStore, tmp_path: Path
):
    newer = grown(OWN, Entry(3, person(3)))
    for given in (OWN, newer, OWN, None):
        join.join(home, asked(tmp_path, given))
    assert home.chain == newer
    for other in (grown(REWRITTEN), chain_of(0, signer=STRANGER), chain_of(0, fleet="other")):
        with pytest.raises(ConfigError, match=r"differ: .*not taken"):
            join.join(home, asked(tmp_path, other))
    assert home.chain == newer
    with pytest.raises(ConfigError, match="leave --open out"):
        join.join(home, asked(tmp_path, OWN, open=True))
    assert "WITHOUT A DIRECTORY" in join.join(home, asked(tmp_path, None, open=True))[-1]
    assert not home.directory.closed


def test_the_directory_beside_the_certificate_is_taken(tmp_path: Path):
    assert join._beside(tmp_path / "ca.crt") is None
    fleet_directory.write(tmp_path / "directory", OWN)
    assert join._beside(tmp_path / "ca.crt") == tmp_path / "directory"


def test_two_owners_who_compare_find_out_that_they_were_shown_two_directories(
    home: DeviceStore, tmp_path: Path
):
    join.join(home, asked(tmp_path, OWN))
    for other, said in ((OWN, "the same"), (chain_of(0, 1), "is the older one, version 2 of 3")):
        fleet_directory.write(tmp_path / "other", other)
        assert said in fleet.compared(home, tmp_path / "other")
    fleet_directory.write(tmp_path / "other", REWRITTEN.sign(SIGNER))
    with pytest.raises(DataError, match="has shown two devices two directories"):
        fleet.compared(home, tmp_path / "other")
