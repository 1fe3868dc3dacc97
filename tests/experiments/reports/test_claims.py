"""claims.py, client/consent/offer_description.py: what is said beside a figure is what is done."""

import re
from pathlib import Path

import pytest

from privet.client.consent import offer_description, run_offers
from privet.client.consent.policy_settings import Policy
from privet.common.settings.config import Config, parse, read, to_toml
from privet.experiments.reports import claims

CONFIGS = sorted((Path(claims.__file__).parents[1] / "configs").glob("*.toml"))
COST = offer_description.release_cost(Config())


def looked(**privacy: object) -> Config:
    return parse({"privacy": {"clip_chosen": "looked", **privacy}})


def test_clips_that_were_chosen_by_looking_at_these_people_are_said_to_be_so_in_their_line():
    said = claims.assumptions(Config(), COST, True, "distributed")
    assert any(line.startswith("clips and denominators are public constants") for line in said)
    said = claims.assumptions(looked(), COST, True, "distributed")
    assert not any("clips and denominators are public" in line for line in said)
    assert (
        "the clips were chosen by looking at the norms of contributions and gradients of some of "
        "these 256 people, which this epsilon does not cover"
    ) in said
    alone = looked(example={"enabled": False})
    assert claims.looked(alone).startswith("the clip was chosen by looking at the norms of contr")


def test_an_owner_reads_that_clips_were_chosen_by_looking_before_agreeing():
    for config, there in ((looked(), True), (Config(), False)):
        offer = run_offers.Offer("run", "fl.example.org:9092", 0.0, to_toml(config))
        noise = dict(offer_description.describe(offer, Policy()))["noise"]
        assert ("chosen by looking at norms of some of the 256 people" in noise) == there


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_whose_clip_is_near_a_median_says_that_somebody_looked(path):
    near = re.search(r"^clip = .*# near the median", path.read_text("utf-8"), re.M) is not None
    assert (read(path).privacy.clip_chosen == "looked") == near


def test_public_clips_leave_the_digest_of_a_run_as_it_was_and_others_are_another_run():
    assert parse({"privacy": {"clip_chosen": "public"}}).digest == Config().digest
    assert "clip_chosen" in Config().privacy.model_dump()
    assert looked().digest != Config().digest


def test_a_person_is_said_to_be_one_devices_home_wherever_a_budget_is_promised():
    config = Config()
    assert any("several homes" in line for line in claims.not_covered(config))
    assert any("one device's home" in line for line in claims.promised(config)["sentences"])
    assert any("one device's home" in line for line in claims.assumptions(config, COST, True))
    offer = run_offers.Offer("run", "fl.example.org:9092", 0.0, to_toml(config))
    assert (
        "another device with your records"
        in dict(offer_description.describe(offer, Policy()))["budget of"]
    )


def test_what_overflows_is_not_said_to_keep_a_device_from_answering():
    """It counts as nothing, is noised and paid for (docs/decisions.md, 22)."""
    said = " ".join(claims.not_covered(Config()))
    assert "does not answer" not in said
    assert "what overflows in training counts as nothing" in said
