"""Whole masked rounds of a fleet that grows: devices that joined before others were enrolled."""

from pathlib import Path

import pytest

from privet.client.enrolled import pinned_directory
from privet.client.enrolled.participant import EnrolledParticipant
from privet.client.store.device_store import ME, DeviceStore, Joined
from privet.common.errors import PrivacyError, StateError
from privet.common.secure_aggregation import fleet_directory
from privet.common.secure_aggregation.fleet_directory import Chain, Entry
from privet.common.secure_aggregation.keys import Identity
from privet.common.settings.config import parse, to_toml

from ..client.enrolled import test_participant
from ..client.enrolled.test_participant import PEOPLE, RUN, SERVER, World, allow, config_of

cheap, homes_of_four = test_participant.cheap, test_participant.homes_of_four
SIGNER = Identity.of(bytes([200]) * 32)
FLEET = "fl.example.org-1"


def chain_of(homes: list[DeviceStore]) -> Chain:
    entries = tuple(Entry(n, home.identity.public) for n, home in enumerate(homes))
    return Chain(FLEET, SIGNER.public, entries).sign(SIGNER)


@pytest.fixture
def early(homes_of_four: list[DeviceStore]) -> list[DeviceStore]:
    """Four homes that joined under the signed directory when only two were enrolled."""
    listed = chain_of(homes_of_four[:2])
    joined = Joined(SERVER, "PEM", closed=True, key=SIGNER.public.hex(), fleet=FLEET)
    for home in homes_of_four:
        home.join(joined, listed)
    return homes_of_four


@pytest.fixture
def world(tmp_path: Path, llama_folder: Path, early: list[DeviceStore]) -> World:
    """A run in the server's `runs`, begun with three devices; the fourth was enrolled since."""
    config = config_of(llama_folder, rounds={"count": 2})
    (tmp_path / "server" / "runs").mkdir(parents=True)
    made = World(
        tmp_path / "server" / "runs" / "run", config, [EnrolledParticipant(home) for home in early]
    )
    fleet_directory.write(made.folder / "directory", chain_of(early[:3]))
    fleet_directory.write(tmp_path / "server" / "directory", chain_of(early))
    for home in early:
        allow(home, "ask = true", "ask = false")
    return made


def test_devices_that_joined_early_take_part_with_those_enrolled_later(
    world: World, early: list[DeviceStore]
):
    shown = world.serve()
    assert [(one["answered"], one["declined"], one["void"]) for one in shown] == [(4, 0, False)] * 2
    for home in early:
        assert home.ledger.participations(ME) == 2
        assert home.enrolled == PEOPLE
        assert [said for *_, said in pinned_directory.history(home)] == [
            "client 2 added, client 3 added; 4 devices are enrolled"
        ]


def test_a_directory_that_does_not_continue_the_runs_own_ends_it_in_a_sentence(
    world: World, early: list[DeviceStore]
):
    other = chain_of([early[0], early[3], early[2]])
    fleet_directory.write(world.folder.parent.parent / "directory", other)
    with pytest.raises(StateError, match=r"does not continue .*entry 1 .* was rewritten"):
        world.serve()
    assert all(home.outbox() == [] for home in early)


def test_a_device_shown_another_history_declines_and_says_what_happened(
    world: World, early: list[DeviceStore]
):
    """Client 0 was shown another client 2 than the run's server shows now."""
    stranger = Entry(2, Identity.of(bytes([77]) * 32).public)
    held = chain_of(early[:2]).with_entries([stranger]).sign(SIGNER)
    early[0].keep_chain(held, b"[]")
    shown = world.serve()
    assert [(one["answered"], one["void"]) for one in shown] == [(3, False)] * 2
    assert "entry 2 of the directory was rewritten: client 2" in early[0].directory_refused
    reasons = [one.reason for one in early[0].ledger.declined(ME)]
    assert all("refused: entry 2 of the directory was rewritten" in one for one in reasons)
    assert len(reasons) == 2


def test_more_colluders_than_leave_two_honest_devices_are_refused_in_a_sentence(
    early: list[DeviceStore], llama_folder: Path
):
    secure_aggregation = {"min_cohort": 3, "survivors": 1.0, "colluding": 2}
    config = config_of(llama_folder, secure_aggregation=secure_aggregation)
    fleet_directory.refuse_colluders(config, 4)
    fleet_directory.refuse_colluders(config, None)
    sentence = "reckons with 2 colluding devices .* 3 devices are enrolled: .* at most 1 may"
    with pytest.raises(PrivacyError, match=sentence):
        fleet_directory.refuse_colluders(config, 3)
    unmasked = config.model_dump(exclude_none=True)
    unmasked["privacy"]["client"]["noise_at"] = "device"
    fleet_directory.refuse_colluders(parse(unmasked), 1)
    home = early[0]
    assert home.enrolled == 2
    home.receive(RUN, to_toml(config))
    with pytest.raises(PrivacyError, match="2 devices are enrolled"):
        home.agree(home.run(RUN)[0], "owner")
