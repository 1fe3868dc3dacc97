"""Where a base model computes: what is chosen, what is refused, and quantised weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from privet.client.training.local_training import Randomness, Trainer, begin, train
from privet.common.errors import AdapterError, ConfigError, ModelError
from privet.common.model import compute
from privet.common.model.adapter import Adapter, attach
from privet.common.model.base_model import BaseModel, final_states, load_anew, pad
from privet.common.model.compute import Compute, chosen
from privet.common.privacy.noise import TestSource
from privet.common.settings.sections import AdapterSettings, ComputeSettings

from ...client.training.test_local_training import plan
from ...tiny import needs_bitsandbytes
from .test_architectures import MORE, RECORDS, SHAPE, alone, far, gradients, made, moved

WIDTH: dict[str, dict[str, int]] = {  # what is quantised to nf4 is a multiple of 64
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64, "hidden_size": 64},
}
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(request.param, tmp_path_factory.mktemp(request.param), **WIDTH[request.param])


@pytest.fixture(params=["int8", "nf4"])
def quantization(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(folder: Path, **settings: Any) -> BaseModel:
    return load_anew(str(folder), ComputeSettings(**CPU | settings))


def attached(base: BaseModel, family: str = "ffa") -> Adapter:
    settings = AdapterSettings(family=family, rank=2, last_blocks=2)
    adapter = attach(base, settings, 3 if base.kind == "encoder" else 0)
    adapter.write(moved(adapter))
    return adapter


def layers(base: BaseModel) -> list[Any]:
    return [one for one in base.network.modules() if hasattr(one, "source_cls")]


def scores(network: Any) -> torch.Tensor:
    ids, mask = pad([record.ids for record in RECORDS])
    with torch.no_grad():
        found: torch.Tensor = network(input_ids=ids, attention_mask=mask).logits
    return found[mask.bool()]


def kept_quantised(folder: Path, to: Path, **how: Any) -> Path:
    """The model as somebody else has quantised and saved it."""
    asked = transformers.BitsAndBytesConfig(**how)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    network.save_pretrained(to)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_record_on_quantised_weights_has_the_gradient_of_a_loop(folder, quantization, dtype):
    adapter = attached(opened(folder, quantization=quantization, dtype=dtype))
    assert adapter.base.by_shape
    rows = gradients(adapter, RECORDS, None)
    for row, record in zip(rows, RECORDS, strict=True):
        assert far(row, alone(adapter, record)) < (1e-5 if dtype == "float32" else 5e-2)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_same_to_the_bit_whoever_the_neighbours_are(folder, quantization, dtype):
    adapter = attached(opened(folder, quantization=quantization, dtype=dtype))
    rows = gradients(adapter, RECORDS, SHAPE)
    for number, record in enumerate(RECORDS):
        others = [one for one in RECORDS if one is not record]
        assert torch.equal(gradients(adapter, [*others, record], SHAPE)[-1], rows[number])


@needs_bitsandbytes
@pytest.mark.parametrize("kind", sorted(MORE))
def test_records_of_every_kind_are_apart_or_it_is_said_why_it_is_not_quantised(kind, tmp_path):
    folder = made(kind, tmp_path)
    refused = {"falcon": "no layer that is quantised", "mixtral": "a mixture of experts"}
    if kind in refused:
        with pytest.raises((ConfigError, ModelError), match=refused[kind]):
            opened(folder, quantization="int8")
        return
    adapter = attached(opened(folder, quantization="int8"))
    rows = gradients(adapter, RECORDS, SHAPE)
    for number, record in enumerate(RECORDS):
        others = [one for one in RECORDS if one is not record]
        assert torch.equal(gradients(adapter, [*others, record], SHAPE)[-1], rows[number])
        assert far(rows[number], alone(adapter, record)) < 1e-5


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["lora_xs", "ffa", "fedsvd", "rolora", "lora"])
def test_a_private_step_on_quantised_weights_moves_every_family(folder, quantization, family):
    adapter = attached(opened(folder, quantization=quantization), family)
    public = plan(rate=1.0, batch_size=4, record_clip=1.0)
    randomness = Randomness(np.random.default_rng(1), TestSource(1, "noise"))
    trained = train(Trainer.of(adapter), moved(adapter), RECORDS, public, randomness, shape=SHAPE)
    assert 0 < np.abs(trained.delta).sum() < np.inf


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_bitsandbytes_own_int8_couples_records_and_the_trial_sees_it(tmp_path):
    """LLM.int8 with its threshold, as transformers loads it where nothing is said."""
    base = opened(made("llama", tmp_path, **WIDTH["llama"]), quantization="int8")
    adapter = attached(base)
    trainer = Trainer.of(adapter)
    begin(trainer, adapter.start, plan(), SHAPE)
    for layer in layers(base):
        del layer.forward
        layer.state.threshold = 6.0
    with torch.no_grad():  # a model in which few states are large: outliers of some tokens
        base.network.get_input_embeddings().weight[::7] *= 8
    trainer.tried.clear()
    with pytest.raises(AdapterError, match=r"int8 multiplied in float32 .* depends on its neigh"):
        begin(trainer, adapter.start, plan(), SHAPE)


@needs_bitsandbytes
def test_quantised_weights_take_less_memory_and_are_near_the_folders(folder, quantization):
    base, exact = opened(folder, quantization=quantization), opened(folder)
    assert base.fingerprint == exact.fingerprint
    most = {"int8": 0.27, "nf4": 0.15}[quantization]
    for layer in layers(base):
        name = next(n for n, one in base.network.named_modules() if one is layer)
        full = exact.exact_weights()(name)
        assert layer.weight.nbytes < most * full.nbytes
        near = compute._full(layer, torch.float32)
        assert float((near - full).norm() / full.norm()) < {"int8": 0.02, "nf4": 0.15}[quantization]
    assert len(layers(base)) == len(base.blocks) * (4 if "gpt2" in str(folder) else 7)
    assert base.network.get_output_embeddings().weight.dtype == torch.float32


@needs_bitsandbytes
def test_an_adapter_starts_from_the_folders_weights_and_is_read_by_plain_peft(
    folder, quantization, tmp_path
):
    adapter = attached(opened(folder, quantization=quantization), "lora_xs")
    assert adapter.layout.digest == attached(opened(folder), "lora_xs").layout.digest
    expected = scores(adapter.base.network)
    adapter.save(tmp_path)
    again = opened(folder, quantization=quantization).network
    assert torch.allclose(scores(PeftModel.from_pretrained(again, tmp_path)), expected, atol=1e-5)


@needs_bitsandbytes
def test_without_privet_the_reloaded_model_says_the_same(folder, quantization, tmp_path):
    adapter = attached(opened(folder, quantization=quantization))
    expected = scores(adapter.base.network)
    adapter.save(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=compute.quantizer(quantization)
    )
    model = PeftModel.from_pretrained(plain, tmp_path).eval()
    for module in model.modules():
        if hasattr(module, "source_cls"):
            module.train()  # in evaluation bitsandbytes rounds states as well on a CPU
    assert torch.allclose(scores(model), expected, atol=1e-4)


@needs_bitsandbytes
def test_a_pass_without_a_gradient_does_not_take_it_from_the_next(folder):
    """bitsandbytes packs a layer for its 4-bit product without one, and it never has one again."""
    adapter = attached(opened(folder, quantization="nf4"))
    before = gradients(adapter, RECORDS, SHAPE)
    with torch.no_grad():
        final_states(adapter.base, *pad([record.ids for record in RECORDS]))
    assert torch.equal(gradients(adapter, RECORDS, SHAPE), before)
    assert before.norm() > 0


@needs_bitsandbytes
def test_a_folder_of_quantised_weights_is_read_as_it_is_or_in_full_numbers(folder, tmp_path):
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    kept = kept_quantised(folder, tmp_path / "kept", **how)
    small, full = opened(kept, quantization="nf4"), opened(kept)
    assert layers(small)
    assert not layers(full)
    assert not full.by_shape
    assert torch.allclose(scores(small.network), scores(full.network), atol=1e-4)
    assert attached(small, "lora_xs").layout.digest == attached(full, "lora_xs").layout.digest
    with pytest.raises(ConfigError, match=r'are nf4 already; set compute\.quantization = "nf4"'):
        opened(kept, quantization="int8")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"quant_method": "gptq", "bits": 4}, "are gptq already, which privet does not read"),
        ({"quant_method": "fp8"}, "are fp8 already, which privet does not read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "are fp4 already, which privet"),
    ],
)
def test_weights_quantised_otherwise_are_named_with_what_would_do(tmp_path, how, sentence):
    folder = made("llama", tmp_path, **WIDTH["llama"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(ModelError, match=sentence) as refused:
        opened(folder)
    assert "take the model as it was before" in str(refused.value)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "_installed", lambda: False)
    folder = made("llama", tmp_path, **WIDTH["llama"])
    with pytest.raises(ConfigError, match=r"pip install 'privet\[quantised\]', or set"):
        opened(folder, quantization="nf4")
    how = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(ModelError, match=r"int8 already, .* pip install 'privet\[quantised\]'"):
        opened(folder)


def test_a_mixture_of_experts_and_a_device_that_cannot_are_refused(monkeypatch):
    with pytest.raises(
        ConfigError, match=r'a mixture of experts .* set compute\.quantization = "no'
    ):
        chosen(ComputeSettings(**CPU, quantization="nf4"), 32, routed=True)

    monkeypatch.setattr(compute, "_installed", lambda: True)
    monkeypatch.setattr(compute, "_known_devices", lambda: {"cuda"})
    with pytest.raises(ConfigError, match="bitsandbytes does not know cpu"):
        chosen(ComputeSettings(**CPU, quantization="int8"), 32)


@needs_bitsandbytes
def test_a_shared_head_is_refused_on_quantised_weights_with_the_settings_that_would_do(tmp_path):
    base = opened(made("llama", tmp_path, **WIDTH["llama"]), quantization="nf4")
    adapter = attach(base, AdapterSettings(family="ffa", rank=2, last_blocks=2), 3)
    public = plan(rate=1.0, batch_size=4, record_clip=1.0)
    randomness = Randomness(np.random.default_rng(1), TestSource(1, "noise"))
    with pytest.raises(
        AdapterError, match=r'set compute\.quantization = "none" and compute\.dtype'
    ):
        train(Trainer.of(adapter), adapter.start, RECORDS, public, randomness, shape=SHAPE)


@needs_bitsandbytes
def test_layers_whose_nf4_weights_would_be_read_back_wrongly_are_refused(tmp_path):
    """bitsandbytes 0.50.2 on a CPU takes the scale of another block in rows of 32."""
    folder = made("llama", tmp_path)
    with pytest.raises(ModelError, match=r"q_proj has 32 inputs, .* no multiple of 64; set") as one:
        opened(folder, quantization="nf4")
    assert len(str(one.value).splitlines()) == 1
    assert opened(folder, quantization="int8").by_shape


@needs_bitsandbytes
@pytest.mark.parametrize("rank", [64, 65])
def test_the_rank_is_held_to_a_quantised_layers_sides_not_to_its_bytes(tmp_path, rank):
    base = opened(made("llama", tmp_path, **WIDTH["llama"]), quantization="nf4")
    settings = AdapterSettings(family="ffa", rank=rank, last_blocks=1, modules=("up_proj",))
    if rank == 64:
        assert attach(base, settings).modules
        return
    with pytest.raises(AdapterError, match=r"up_proj allows \(64\)"):
        attach(base, settings)


def test_what_was_chosen_is_settings_that_leave_nothing_to_choose_and_a_line():
    cpu = torch.device("cpu")
    where = Compute(cpu, torch.bfloat16, "it multiplies it", "nf4", gradient_checkpointing=True)
    assert where.settings == ComputeSettings(
        device="cpu", dtype="bfloat16", quantization="nf4", gradient_checkpointing=True
    )
    assert where.line == (
        "nf4 multiplied in bfloat16 on cpu, each block computed twice: it multiplies it"
    )
    assert Compute(cpu, torch.float32, "so").line == "float32 on cpu: so"
