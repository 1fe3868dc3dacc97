"""Cards are checked strictly; numbers belong to one device for ever."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ConfigError, DataError, StateError
from privet.common.secure_aggregation import fleet_directory
from privet.common.secure_aggregation.keys import Identity, write_directory
from privet.server.operations import directory_commands, enrolment, setup
from privet.server.operations.enrolment import enrol, read_card, remove
from privet.server.operations.server_folder import Server

PEM = serialization.Encoding.PEM
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


def node_key(curve: ec.EllipticCurve | None = None) -> Any:
    return ec.generate_private_key(curve or ec.SECP384R1())


def pem(key: Any) -> str:
    return str(key.public_key().public_bytes(PEM, SPKI).decode())


def fields(number: int = 1, **other: Any) -> dict[str, Any]:
    identity = Identity.of(bytes([number]) * 32).public.hex()
    own = {"privet": version("privet"), "identity": identity, "node": pem(node_key()), "name": ""}
    return {**own, **other}


@pytest.fixture
def card(tmp_path: Path) -> Any:
    """Writes a card's file: `card("a", fields(1))`."""

    def write(name: str, content: Any = None) -> Path:
        path = tmp_path / f"{name}.json"
        content = fields(ord(name[0])) if content is None else content
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


class Superlink:
    """What the Control API keeps of nodes."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, Any] = {}

    def ListNodes(self, _: Any) -> Any:
        return SimpleNamespace(nodes_info=list(self.nodes.values()))

    def RegisterNode(self, request: Any) -> None:
        if request.public_key in self.nodes:
            raise StateError("the SuperLink refused: this key is in use")
        number, key = len(self.nodes) + 1, request.public_key
        self.nodes[key] = SimpleNamespace(
            node_id=number,
            public_key=key,
            status="registered",
            last_deactivated_at="",
            online_until="",
        )

    def UnregisterNode(self, request: Any) -> None:
        (node,) = (n for n in self.nodes.values() if n.node_id == request.node_id)
        node.status = "unregistered"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    # port 1: nothing answers there
    return setup.init(tmp_path / "server", ["a.org"], port=2, inner_port=1)


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> Superlink:
    fake = Superlink()

    @contextmanager
    def control(_: Server) -> Iterator[Superlink]:
        yield fake

    monkeypatch.setattr(enrolment, "control", control)
    return fake


def quiet(_: str) -> None:
    pass


def listed(server: Server) -> dict[int, str]:
    known = fleet_directory.listed(server.folder / "directory").known
    return {number: identity.hex() for number, identity in known.items()}


def test_a_card_is_read_whether_its_node_key_is_pem_or_openssh(card: Any) -> None:
    key = node_key()
    ssh = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    for text in (pem(key), f"{ssh.decode()} ann@laptop\n"):
        found = read_card(card("a", fields(7, node=text, name="Ann's laptop")))
        assert found.node == pem(key)
        assert found.name == "Ann's laptop"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no card"),
        ("[]", "expected the keys"),
        ("{}", "expected the keys"),
        ("[" * 10000, "no card"),
        ('{"name": "", "name": ""}', "twice"),
        (fields(more=1), "more"),
        (fields(privet="9.9"), "'9.9', this server"),
        (fields(identity=7), "identity should be a text"),
        (fields(identity="ab"), "64 hexadecimal"),
        (fields(identity="AB" * 32), "small letters"),
        (fields(name="x" * 65), "name should"),
        (fields(name="\x1b[2J"), "name should"),
        (fields(name="\u202etxt"), "name should"),
        (fields(node="nonsense"), "P-384"),
        (fields(node=pem(node_key(ec.SECP256R1()))), "P-384"),
        (fields(node=pem(rsa.generate_private_key(65537, 2048))), "P-384"),
        (" " * 20000, "larger than a card"),
    ],
)
def test_a_card_that_is_not_right_is_refused_with_what_is_wrong(
    card: Any, content: Any, told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read_card(card("a", content))


def test_a_private_key_in_a_card_is_refused(card: Any) -> None:
    secret = node_key().private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(DataError, match="public ECDSA key"):
        read_card(card("a", fields(node=secret.decode())))


def test_a_card_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the card"):
        read_card(tmp_path / "nowhere.json")


# The eight points of small order of Ed25519 (four of them twice, by the sign of x).
LOW_ORDER = (
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
)


@pytest.mark.parametrize("identity", LOW_ORDER)
def test_an_identity_of_low_order_is_refused_though_the_library_takes_it(
    card: Any, identity: str
) -> None:
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity))  # the faulty check: no complaint
    with pytest.raises(DataError, match="full order"):
        read_card(card("a", fields(identity=identity)))


def test_an_identity_in_a_second_spelling_is_refused() -> None:
    again = (2**255 - 19 + 1).to_bytes(32, "little")  # y = 1 + p
    assert not enrolment._of_prime_order(again)


@given(st.binary(min_size=32, max_size=32))
def test_every_honest_identity_passes_and_its_sum_with_a_low_order_point_does_not(
    seed: bytes,
) -> None:
    public = Identity.of(seed).public
    assert enrolment._of_prime_order(public)
    # plus the point (0, -1) of order two: (x, y) -> (-x, -y)
    y = int.from_bytes(public, "little") & (2**255 - 1)
    sign = 1 - (public[-1] >> 7)
    mixed = ((2**255 - 19 - y) | sign << 255).to_bytes(32, "little")
    assert not enrolment._of_prime_order(mixed)


def test_enrolled_devices_get_the_next_numbers(
    card: Any, server: Server, superlink: Superlink
) -> None:
    enrol(server, [card("a"), card("b")], quiet)
    enrol(server, [card("c")], quiet)
    expected = [Identity.of(letter * 32).public.hex() for letter in (b"a", b"b", b"c")]
    assert listed(server) == dict(enumerate(expected))
    assert len(superlink.nodes) == 3


def test_one_bad_card_enrols_nobody(card: Any, server: Server, superlink: Superlink) -> None:
    with pytest.raises(DataError):
        enrol(server, [card("a"), card("b", fields(name="\n"))], quiet)
    assert not listed(server)
    assert not superlink.nodes


def test_a_card_enrolled_twice_changes_nothing_and_says_so(
    card: Any, server: Server, superlink: Superlink
) -> None:
    path = card("a")
    enrol(server, [path, path], quiet)
    before = (server.folder / "directory").read_bytes(), dict(superlink.nodes)
    said: list[str] = []
    enrol(server, [path], said.append)
    assert said == ["client 0 is enrolled already"]
    assert before == ((server.folder / "directory").read_bytes(), superlink.nodes)


def test_two_devices_never_share_a_key(card: Any, server: Server, superlink: Superlink) -> None:
    first, second = fields(1), fields(2)
    enrol(server, [card("a", first)], quiet)
    for name, shared in (("identity", "identity"), ("node", "node key")):
        twin = card("b", {**second, name: first[name]})
        with pytest.raises(DataError, match=f"the {shared} is that of client 0"):
            enrol(server, [twin], quiet)
    with pytest.raises(DataError, match="client 1"):  # both in one call
        enrol(server, [card("b", second), card("c", {**fields(3), "node": second["node"]})], quiet)
    assert len(superlink.nodes) == len(listed(server)) == 1


def test_a_crash_after_registering_is_gone_on_from_with_the_same_number(
    card: Any, server: Server, superlink: Superlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = card("a")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for place, step in ((enrolment, "write_json_atomic"), (fleet_directory, "write")):
        with monkeypatch.context() as broken:
            broken.setattr(place, step, killed)
            with pytest.raises(KeyboardInterrupt):
                enrol(server, [path], quiet)
        assert len(superlink.nodes) == 1
        assert not listed(server)
    enrol(server, [path], quiet)
    assert listed(server) == {0: Identity.of(b"a" * 32).public.hex()}


def test_a_superlink_that_lost_its_database_gets_the_node_keys_back(
    card: Any, server: Server, superlink: Superlink
) -> None:
    path, said = card("a"), list[str]()
    enrol(server, [path], quiet)
    superlink.nodes.clear()
    enrol(server, [path], said.append)
    assert said == ["client 0 is enrolled already; the SuperLink had lost its node key"]
    assert len(superlink.nodes) == 1


def test_a_removed_device_is_gone_and_its_number_is_not_given_out_again(
    card: Any, server: Server, superlink: Superlink
) -> None:
    paths = [card("a"), card("b"), card("c")]
    enrol(server, paths, quiet)
    remove(server, [str(paths[0]), "2"], quiet)
    assert listed(server).keys() == {1}
    assert [n.status for n in superlink.nodes.values()] == [
        "unregistered", "registered", "unregistered",
    ]  # fmt: skip
    enrol(server, [card("d")], quiet)
    assert listed(server).keys() == {1, 3}
    with pytest.raises(DataError, match="keys do not come back"):
        enrol(server, [paths[0]], quiet)
    for name in ("0", "99", str(card("e"))):
        with pytest.raises(DataError, match=r"removed already|nobody"):
            remove(server, [name], quiet)


def test_a_removal_that_is_cut_short_is_finished_by_the_same_command(
    card: Any, server: Server, superlink: Superlink, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(server, [card("a")], quiet)
    with monkeypatch.context() as broken:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        broken.setattr(enrolment, "unregister", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(server, ["0"], quiet)
    assert not listed(server)
    remove(server, ["0"], quiet)
    assert [node.status for node in superlink.nodes.values()] == ["unregistered"]


@pytest.mark.usefixtures("superlink")
def test_enrolments_at_the_same_time_never_give_one_number_twice(card: Any, server: Server) -> None:
    paths = [card(letter) for letter in "abcdefgh"]
    threads = [threading.Thread(target=enrol, args=(server, [path], quiet)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(listed(server)) == list(range(8))


def test_without_a_superlink_nothing_changes_and_the_sentence_says_how_to_start_it(
    card: Any, server: Server
) -> None:
    with pytest.raises(StateError, match="privet server up"):
        enrol(server, [card("a")], quiet)
    assert not listed(server)
    assert not (server.folder / "devices.json").exists()


@pytest.mark.usefixtures("superlink")
def test_a_folder_of_an_earlier_privet_gets_a_key_and_a_signature(
    card: Any, server: Server
) -> None:
    enrol(server, [card("a"), card("b")], quiet)
    remove(server, ["0"], quiet)
    known = fleet_directory.listed(server.folder / "directory")
    (server.folder / "directory.key").unlink()
    write_directory(server.folder / "directory", known)  # as it was kept before
    found = enrolment.current(server)
    assert found is not None
    assert [str(one) for one in found.entries] == [
        "client 0 added", "client 0 removed", "client 1 added",
    ]  # fmt: skip
    assert found.head.signed
    assert (server.folder / "directory.key").stat().st_mode & 0o777 == 0o600
    assert enrolment.current(server) == found
    enrol(server, [card("c")], quiet)
    after = enrolment.current(server)
    assert after is not None
    assert after.entries[:3] == found.entries
    assert listed(server).keys() == {1, 2}


@pytest.mark.usefixtures("superlink")
def test_somebody_else_signs_on_a_machine_of_their_own(card: Any, tmp_path: Path) -> None:
    signer = Identity.of(b"s" * 32)
    key = tmp_path / "my.key"
    key.write_text(signer.seed.value.hex() + "\n")
    server = setup.init(
        tmp_path / "other", ["a.org"], port=2, inner_port=1, directory_key=signer.public
    )
    assert not (server.folder / "directory.key").exists()
    said = list[str]()
    enrol(server, [card("a")], said.append)
    assert "version 1 of the directory waits for its signature" in said[-1]
    assert enrolment.current(server) is None
    unsigned, sent = server.folder / "directory.unsigned", tmp_path / "sent"
    sent.write_bytes(unsigned.read_bytes())
    with pytest.raises(StateError, match="not signed by the key"):
        enrolment.take(server, sent)
    directory_commands.sign(sent, key)
    taken = enrolment.take(server, sent)
    assert (taken.version, enrolment.current(server), enrolment.pending(server)) == (1, taken, None)
    with pytest.raises(DataError, match="no directory waits"):
        enrolment.take(server, sent)
    enrol(server, [card("b")], quiet)
    assert enrolment.current(server) == taken  # until it is signed
    with pytest.raises(DataError, match="is not the directory that waits"):
        enrolment.take(server, sent)
    rewritten = fleet_directory.Chain(
        taken.fleet, taken.key, (fleet_directory.Entry(0, bytes(32)),)
    )
    fleet_directory.write(sent, rewritten)
    with pytest.raises(DataError, match=r"does not continue .* entry 0 .* was rewritten"):
        directory_commands.sign(sent, key)
    key.write_text("00" * 32)
    with pytest.raises(ConfigError, match="was to be signed with"):
        directory_commands.sign(unsigned, key)


def test_a_damaged_list_of_devices_is_named(server: Server) -> None:
    for content in ("{", "[{}]", "[1]"):
        (server.folder / "devices.json").write_text(content)
        with pytest.raises(StateError, match=r"devices\.json is damaged"):
            enrolment.devices(server)
