"""benchmarks/simulators: privet's part runs, and what is missing is said."""

import json
import sys

import pytest

from privet.common.errors import ConfigError
from privet.experiments.benchmarks.simulators import __main__ as simulators
from privet.experiments.benchmarks.simulators import privet_peer, work


def test_privets_part_trains_everybody_in_every_round(tmp_path, capsys):
    work.save_model(tmp_path / "model")
    privet_peer.main(tmp_path / "model", cohort=10, rounds=1, processes=1)
    out, told = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["clients_per_s"] > 0
    assert told.count("10 answered") == 2


def test_a_peer_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"--pfl /nowhere/python: no such interpreter"):
        simulators.measure(pfl="/nowhere/python")


def test_a_simulator_that_fails_ends_the_benchmark_with_what_it_said():
    with pytest.raises(ConfigError, match=r"failed:\n.*no such thing"):
        simulators._run([sys.executable, "-c", "raise SystemExit('no such thing')"])
