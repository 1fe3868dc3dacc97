"""The GPU benchmark, tried where there is no GPU: all of it runs, on tiny models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from privet.client.training.constant_work import Shape
from privet.client.training.local_training import Trainer
from privet.common.model.adapter import attach
from privet.common.model.compute import Compute, chosen
from privet.common.model.objective import record_losses
from privet.common.settings.sections import ComputeSettings
from privet.experiments.benchmarks.gpu import __main__ as script
from privet.experiments.benchmarks.gpu import conformance
from privet.experiments.benchmarks.gpu.page import page
from privet.experiments.benchmarks.gpu.published import PUBLISHED, Published, built, copied
from privet.experiments.benchmarks.gpu.workload import Work, adapter_settings, public_shape

from ...fake_device import DEVICE, fake_device

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
ROOT = Path(__file__).parents[3]
ROWS, TOKENS = 4, 12


@pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: shape.name)
def test_a_shape_has_as_many_numbers_as_the_published_model(shape: Published):
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(shape.config).num_parameters() == shape.parameters


def test_everything_is_tried_and_timed_on_tiny_models(tmp_path):
    figures = script.measure(tmp_path, device="cpu", tiny=True, models="SmolLM2-135M,Qwen2.5-0.5B")
    assert figures == json.loads((tmp_path / "gpu.json").read_text())
    assert not figures["ran"]  # on a GPU
    assert figures["passed"]
    assert [model["name"] for model in figures["models"]] == [
        "SmolLM2-135M (tiny)",
        "Qwen2.5-0.5B (tiny)",
    ]
    for model in figures["models"]:
        assert len(model["conformance"]) == 9
        assert model["clients_per_s"] > 0
        assert model["throughput"][0]["tokens_per_s"] > 0
        assert model["throughput"][0]["rows_at_once"] == model["throughput"][0]["rows"]
        assert model["left_out"] == []
    written = (tmp_path / "gpu.md").read_text()
    assert "A rehearsal without a GPU" in written
    assert "failed" not in written.replace("`failed`", "")


def test_where_there_is_no_gpu_the_page_says_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    figures = script.measure(tmp_path)
    assert (figures["ran"], figures["passed"]) == (False, False)
    assert "## Not run" in (tmp_path / "gpu.md").read_text()


def test_what_there_is_no_time_for_is_named(tmp_path):
    figures = script.measure(tmp_path, device="cpu", tiny=True, models="SmolLM2-135M", minutes=-1)
    assert figures["models"][0]["left_out"] == ["all of it"]
    assert "SmolLM2-135M (tiny) (all of it)" in (tmp_path / "gpu.md").read_text()


def test_the_page_of_the_documentation_is_the_scripts_own():
    head, rest = "\n## Not run\n", (ROOT / "docs" / "gpu.md").read_text()
    assert rest.startswith(page({"models": [], "why": ""}).partition(head)[0])


def small() -> tuple[Trainer, Work, torch.Tensor]:
    exact = chosen(ComputeSettings(device="cpu", dtype="float32"), 32)
    base = copied(built(PUBLISHED[0].tiny, exact), exact)
    adapter = attach(base, adapter_settings(2))
    work = Work.of(adapter, ROWS, TOKENS, shortest=4)
    adapter.write(work.start)
    expected = conformance.loop_over_records(adapter, work.records)
    return Trainer.of(adapter), work, expected


def failed(trainer: Trainer, work: Work, expected: torch.Tensor, shape: Shape) -> list[str]:
    return [
        each.name for each in conformance.checks(trainer, expected, work, shape) if not each.passed
    ]


def test_a_record_that_moves_with_its_neighbours_fails_the_check(monkeypatch):
    trainer, work, expected = small()
    monkeypatch.setattr(conformance, "BATCHES", 5)
    shape = public_shape(ROWS, TOKENS)
    assert failed(trainer, work, expected, shape) == []

    def coupled(*given):
        losses = record_losses(*given)
        return losses * (1 + 1e-6 * losses.detach().sum())

    monkeypatch.setattr(conformance, "record_losses", coupled)
    assert "a record's gradient in 5 batches, at each place" in failed(
        trainer, work, expected, shape
    )


def test_a_step_that_cannot_be_tried_is_a_figure_and_no_traceback(monkeypatch):
    trainer, work, expected = small()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(conformance, "record_losses", full)
    tried = conformance.checks(trainer, expected, work, public_shape(ROWS, TOKENS))
    assert [check.why for check in tried[:3]] == ["CUDA out of memory"] * 3
    assert tried[3].passed


def test_the_script_leaves_no_tensor_on_the_wrong_side(tmp_path, monkeypatch):
    """On a fake device beside the CPU, as on a GPU, it would fail at the first."""

    def somewhere(settings: ComputeSettings, width: int) -> Compute:
        on_cpu = chosen(settings.model_copy(update={"device": "cpu"}), width)
        return on_cpu if settings.device == "cpu" else replace(on_cpu, device=DEVICE)

    monkeypatch.setattr(script, "chosen", somewhere)
    monkeypatch.setattr(Compute, "settings", ComputeSettings())  # no setting has the fake's name
    monkeypatch.setattr(conformance, "BATCHES", 2)
    with fake_device(monkeypatch, torch.bfloat16):
        figures = script.measure(tmp_path, tiny=True, models="SmolLM2-135M")
    (model,) = figures["models"]
    assert figures["device"] == str(DEVICE)
    assert [each["why"] for each in model["conformance"]] == [""] * 9
    assert "failed" not in model["throughput"][0]
