"""Every kind of model that people bring: attach, one private step, save, plain reload."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from privet.client.training.constant_work import Shape
from privet.client.training.local_training import (
    Randomness,
    Trainer,
    _one_row_a_record,
    losses_of,
    train,
)
from privet.client.training.records import Tokenised
from privet.common.errors import AdapterError, ModelError
from privet.common.model.adapter import Adapter, attach, modules_by_record
from privet.common.model.base_model import BaseModel, final_states, load_anew, pad
from privet.common.model.compute import chosen
from privet.common.privacy.noise import TestSource
from privet.common.settings.sections import AdapterSettings, ComputeSettings

from ...client.training.test_local_training import plan
from ...tiny import VOCABULARY, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 4,
    "eos_token_id": 5,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": GPT2,
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {"new_decoder_architecture": False, "num_kv_heads": 4},
    "mistral": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "olmo2": {},
    "smollm3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "bert": {},
    "roberta": {"type_vocab_size": 1, "max_position_embeddings": 130},
    "modernbert": {"global_attn_every_n_layers": 1},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 32},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
    },
}
ENCODERS = {"bert", "roberta", "modernbert", "distilbert", "electra", "deberta-v2"}
RECORDS = [
    Tokenised((6, 7, 8, 9, 10, 11), 0.0),
    Tokenised((12, 13, 14), 1.0),
    Tokenised((20, 21, 22, 23, 24), 2.0),
]
FLOAT32 = ComputeSettings(device="cpu", dtype="float32")
BFLOAT16 = ComputeSettings(device="cpu", dtype="bfloat16")


SHAPE = Shape(1, 4, 8, spare=0)


def made(kind: str, folder: Path, **changes: Any) -> Path:
    """A random model of this kind; `changes` go into its configuration."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | MORE[kind] | changes)
    loader = transformers.AutoModel if kind in ENCODERS else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loader.from_config(config).save_pretrained(folder)
    tiny_tokenizer(folder, encoder=kind in ENCODERS)
    return folder


@pytest.fixture(scope="module", params=sorted(MORE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(kind, tmp_path_factory.mktemp(kind))


def opened(folder: Path, compute: ComputeSettings) -> BaseModel:
    return load_anew(str(folder), compute)


def moved(adapter: Adapter) -> np.ndarray[Any, np.dtype[np.float32]]:
    noise = np.random.default_rng(5).normal(size=len(adapter.start)) * 0.1
    return (adapter.start + noise).astype(np.float32)


def attached(base: BaseModel) -> Adapter:
    settings = AdapterSettings(family="ffa", rank=2, last_blocks=2)
    adapter = attach(base, settings, 3 if base.kind == "encoder" else 0)
    adapter.write(moved(adapter))
    return adapter


def gradients(adapter: Adapter, records: list[Tokenised], shape: Shape | None) -> torch.Tensor:
    """One record's gradient a row, as the private step has it before it clips."""
    trainer = Trainer.of(adapter)
    trained = adapter.train_only(1)
    trainer.hooked.train()
    losses = losses_of(trainer, records, shape)
    losses[: len(records)].sum().backward()
    _one_row_a_record(trainer, trained, len(losses))
    rows = [getattr(p, "grad_sample")[: len(records)].flatten(1) for _, p in trained]  # noqa: B009
    trainer.hooked.zero_grad(set_to_none=True)
    return torch.cat(rows, 1).double()


def alone(adapter: Adapter, record: Tokenised) -> torch.Tensor:
    """The gradient of one record by autograd, without Opacus."""
    trainer = Trainer.of(adapter)
    trained = adapter.train_only(1)
    trainer.hooked.hooks_enabled = False
    grads = torch.autograd.grad(losses_of(trainer, [record]).sum(), [p for _, p in trained])
    trainer.hooked.hooks_enabled = True
    return torch.cat([one.flatten() for one in grads]).double()


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_each_record_has_the_gradient_of_a_loop_over_records(folder):
    adapter = attached(opened(folder, FLOAT32))
    rows = gradients(adapter, RECORDS, None)
    for row, record in zip(rows, RECORDS, strict=True):
        assert far(row, alone(adapter, record)) < 1e-5


def test_in_bfloat16_too_and_to_the_bit_whoever_the_neighbours_are(folder):
    adapter = attached(opened(folder, BFLOAT16))
    if adapter.base.routed:
        pytest.skip("a mixture of experts trains privately in float32 alone")
    exact = attached(opened(folder, FLOAT32))
    rows = gradients(adapter, RECORDS, SHAPE)
    for number, record in enumerate(RECORDS):
        others = [one for one in RECORDS if one is not record]
        again = gradients(adapter, [*others, record], SHAPE)[-1]
        assert far(again, rows[number]) == 0
    together = gradients(exact, RECORDS, SHAPE)
    assert far(rows, together) < 0.1  # the model's own rounding, not the step's


def test_the_adapter_is_read_by_plain_peft_with_equal_outputs(folder, tmp_path):
    base = opened(folder, FLOAT32)
    adapter = attached(base)
    ids, mask = pad([record.ids for record in RECORDS])
    with torch.no_grad():
        states = final_states(base, ids, mask)
        expected = states if base.kind == "encoder" else base.output.scores(states)
    adapter.save(tmp_path / "adapter")
    loader = transformers.AutoModel if base.kind == "encoder" else transformers.AutoModelForCausalLM
    plain = loader.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask)
    found = out.last_hidden_state if base.kind == "encoder" else out.logits
    real = mask.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)


def test_the_layers_of_the_default_see_a_record_as_a_row(folder):
    base = opened(folder, FLOAT32)
    adapter = attached(base)
    inside = {name.partition(".")[2] for name in adapter.modules}
    assert all(any(name.endswith(fit) for fit in modules_by_record(base)) for name in inside)


@pytest.mark.parametrize(("kind", "modules"), [("opt", "fc1"), ("deberta-v2", "query_proj")])
def test_a_layer_that_sees_other_rows_is_named_with_those_that_would_do(kind, modules, tmp_path):
    base = opened(made(kind, tmp_path), FLOAT32)
    settings = AdapterSettings(family="ffa", rank=2, last_blocks=2, modules=(modules,))
    adapter = attach(base, settings, 3 if base.kind == "encoder" else 0)
    adapter.write(moved(adapter))
    with pytest.raises(
        AdapterError, match=r"set adapter\.modules to layers that would do"
    ) as refused:
        gradients(adapter, RECORDS, None)
    assert modules not in str(refused.value).partition("would do (")[2]


def test_a_mixture_of_experts_trains_privately_in_float32_alone(tmp_path):
    base = opened(made("mixtral", tmp_path), BFLOAT16)
    adapter = attached(base)
    public = plan(rate=1.0, batch_size=4, record_clip=1.0)
    randomness = Randomness(np.random.default_rng(1), TestSource(1, "noise"))
    with pytest.raises(AdapterError, match="is a mixture of experts"):
        train(Trainer.of(adapter), adapter.start, RECORDS, public, randomness, shape=SHAPE)
    assert chosen(ComputeSettings(device="cpu"), 4096, routed=True).dtype == torch.float32


def test_a_row_one_longer_than_any_record_fits_the_models_positions(folder):
    """RoBERTa's positions begin behind its padding's, so the last two of 130 are never met."""
    base = opened(folder, FLOAT32)
    longest = min(base.positions, 140)
    with torch.no_grad():
        states = final_states(base, *pad([[7] * longest, [8]]))
    assert states.isfinite().all()


@pytest.mark.parametrize("kind", ["mamba", "t5"])
def test_other_kinds_are_refused_in_a_sentence_that_says_what_is_possible(kind, tmp_path):
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, num_layers=2)
    loader = (
        transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    )
    loader.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="take a decoder") as refused:
        opened(tmp_path, FLOAT32)
    assert len(str(refused.value).splitlines()) == 1


def test_an_adapter_of_a_rounded_model_starts_where_that_of_the_exact_one_does(tmp_path):
    folder = made("llama", tmp_path)
    settings = AdapterSettings(family="lora_xs", rank=2, last_blocks=2)
    one, other = (attach(opened(folder, where), settings) for where in (FLOAT32, BFLOAT16))
    assert one.layout.digest == other.layout.digest
    for name in one.modules:
        for factor in ("lora_A", "lora_B"):
            frozen = [
                getattr(adapter.base.network.get_submodule(name), factor)["default"]
                for adapter in (one, other)
            ]
            weights = [m.frozen.weight if factor == "lora_B" else m.weight for m in frozen]
            assert torch.equal(*weights)
