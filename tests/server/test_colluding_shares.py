"""`colluding`, from a share of 0.05 to 0.3 and as a number: a run works to its end, or is refused
at its start with the cohort it would need, and that one works."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.simulated import SimulatedContext
from privet.common.errors import ConfigError, ProtocolError
from privet.common.files import read_lines
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, sized_graph
from privet.common.settings.config import parse
from privet.common.settings.sections import SecureAggregationSettings, quorum
from privet.experiments import engine
from privet.experiments.reports.privacy_facts import privacy_facts
from privet.experiments.simulate import prepare
from privet.server import unmasking as served

from ..tiny import population, tiny_config
from .test_masked_rounds import plan_of, same, sum_of

NEEDED = re.compile(r"it would need rounds\.cohort = (\d+)")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return population(tmp_path_factory.mktemp("people"), 23, 8)


@pytest.fixture
def run(llama_folder: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One masked round with its wire, and what a report says of it; what came of sum and m."""

    def ran(colluding: float, cohort: int) -> dict[str, Any]:
        config = tiny_config(
            llama_folder,
            people,
            data={"clients": 20},
            rounds={"count": 1, "cohort": cohort},
            privacy={"client": {"noise_at": "distributed"}},
            secure_aggregation={"colluding": colluding},
        )
        seen: list[Any] = []
        unmask = served.unmask

        def watched(*given: Any) -> Any:
            seen.append(unmask(*given))
            return seen[-1]

        monkeypatch.setattr(served, "unmask", watched)
        folder = tmp_path / "run"
        engine.run("local", folder, prepare(config, folder, resume=False))
        monkeypatch.setattr(served, "unmask", unmask)
        (outcome,), (line,) = seen, read_lines(folder / "rounds.jsonl")
        bench = SimulatedContext.open(folder)
        plan = plan_of(bench)
        found = [x for one in privacy_facts(folder)["lines"] if (x := one["colluding"])]
        return {
            "answered": line["answered"],
            "void": line["void"],
            "right": same(outcome.total, sum_of(bench, outcome.survivors, plan)),
            "plan": plan.colluders,
            "reports": {(one["agreed"], one["enrolled"]) for one in found},
        }

    return ran


@pytest.mark.parametrize(
    ("colluding", "cohort"),
    [(0.05, 12), (0.1, 12), (0.2, 15), (0.25, 16), (0.3, 20), (5, 12)],
)
def test_a_run_with_so_many_colluders_works_to_its_end_and_its_report_has_their_number(
    run, colluding, cohort
):
    m = math.ceil(colluding * cohort) if colluding < 1 else colluding
    assert run(colluding, cohort) == {
        "answered": cohort,
        "void": False,
        "right": True,
        "plan": m,
        "reports": {(m, 20)},
    }


@pytest.mark.parametrize(
    ("colluding", "cohort", "needed"),
    [(0.3, 9, 10), (11, 12, 13), (0.9, 12, 20)],
)
def test_a_run_that_could_not_work_is_refused_at_its_start_with_a_cohort_that_does(
    run, tmp_path, colluding, cohort, needed
):
    with pytest.raises(ConfigError) as refusal:
        run(colluding, cohort)
    assert not (tmp_path / "run").exists()
    assert NEEDED.findall(str(refusal.value)) == [str(needed)]
    with pytest.raises(ConfigError):
        run(colluding, needed - 1)
    found = run(colluding, needed)
    m = math.ceil(colluding * needed - 1e-9) if colluding < 1 else colluding
    assert (found["plan"], found["reports"]) == (m, {(m, 20)})
    assert (found["right"], found["answered"]) == (True, needed)


@pytest.mark.parametrize("colluding", [0.9999999, 1e7, 1 << 14])
def test_colluders_for_whom_no_cohort_is_enough_are_refused_in_a_sentence(colluding):
    table = {"rounds": {"cohort": 12}, "secure_aggregation": {"colluding": colluding}}
    sentence = r"no cohort of up to 16,384 would do; lower secure_aggregation\.colluding"
    with pytest.raises(ConfigError, match=sentence):
        parse(table)


@given(st.integers(3, 400), st.data())
def test_a_threshold_that_m_breaks_is_taken_by_no_device_and_made_by_no_server(n, data):
    """Two lists could both be opened where 2T - n <= m: all colluders hold shares under both."""
    m = data.draw(st.integers(0, n - 2))
    asked = data.draw(st.integers(1, n))
    policy = MaskingPolicy(min_cohort=3, min_survivors=m + 2, colluders=m)
    graph = Graph(n - 1, asked)
    if 2 * asked - n <= m:
        with pytest.raises(ProtocolError, match=f"threshold {asked} for {n} holders"):
            policy.refuse_cohort(n, m, graph)
    else:
        policy.refuse_cohort(n, m, graph)
    made = sized_graph(SecureAggregationSettings(threshold=asked), m, n)
    assert made.threshold == max(asked, quorum(n, m))
    assert 2 * made.threshold - n > m
    policy.refuse_cohort(n, m, made)
