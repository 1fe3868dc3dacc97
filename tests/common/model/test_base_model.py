"""base_model.py: what is loaded is what is computed, and what cannot be used says so."""

import contextlib
import json
import shutil
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from privet.common.errors import ModelError
from privet.common.model import assets, output_layer
from privet.common.model import base_model as base_models
from privet.common.model.base_model import (
    BaseModel,
    PrefixCache,
    final_states,
    load,
    pad,
    prefix_states,
    resumed_at,
)
from privet.common.model.objective import collate, record_losses

from ...tiny import VOCABULARY, fresh, tiny_tokenizer

IDS = ((6, 7, 8, 9, 10, 11), (12, 13, 14), (15, 16))


@pytest.fixture
def broken(llama_folder, tmp_path):
    """A copy of the decoder, to be damaged."""
    return shutil.copytree(llama_folder, tmp_path / "copy")


def hooks_of(base: BaseModel) -> list[int]:
    return [len(module._forward_pre_hooks) for module in base.network.modules()]


# --- loading ------------------------------------------------------------------------------------


def test_a_decoder_and_an_encoder_are_told_apart(llama, bert):
    assert (llama.kind, bert.kind) == ("decoder", "encoder")
    assert (llama.width, bert.width) == (32, 32)
    assert [name for name, _ in llama.blocks] == [f"model.layers.{i}" for i in range(4)]
    assert [name for name, _ in bert.blocks] == [f"encoder.layer.{i}" for i in range(4)]


def test_everything_is_frozen_and_in_evaluation_mode(base):
    assert not any(p.requires_grad for p in base.network.parameters())
    assert not any(module.training for module in base.network.modules())


def test_a_model_is_loaded_once_per_process(llama_folder):
    assert load(str(llama_folder)) is load(str(llama_folder))


def test_an_encoder_says_that_it_makes_no_text(bert):
    with pytest.raises(ModelError, match=r"is an encoder .* take a decoder"):
        _ = bert.output


def test_another_model_of_the_same_shapes_has_another_fingerprint(llama, broken):
    path = broken / "model.safetensors"
    tensors = load_file(path)
    assert fresh(broken).fingerprint == llama.fingerprint
    tensors["model.layers.2.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    assert fresh(broken).fingerprint != llama.fingerprint


# --- states -------------------------------------------------------------------------------------


def test_the_states_of_a_decoder_give_its_own_scores(llama):
    ids, mask = pad(IDS)
    with torch.no_grad():
        scores = llama.network(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(scores, llama.output.scores(final_states(llama, ids, mask)))


def test_the_padding_of_a_batch_changes_no_record(base):
    ids, mask = pad(IDS)
    with torch.no_grad():
        together = final_states(base, ids, mask)
        for row, record in enumerate(IDS):
            alone = final_states(base, *pad([record]))[0]
            assert torch.allclose(together[row, : len(record)], alone, atol=1e-5)


@pytest.mark.parametrize("block", [0, 1, 3])
def test_resuming_above_a_prefix_gives_exactly_the_full_pass(base, block):
    ids, mask = pad(IDS)
    hooks = hooks_of(base)
    with torch.no_grad():
        full = final_states(base, ids, mask)
        prefix = prefix_states(base, block, ids, mask)
        with resumed_at(base, block, prefix):
            assert torch.equal(final_states(base, ids, mask), full)
        assert torch.equal(final_states(base, ids, mask), full)
    assert hooks_of(base) == hooks


def test_nothing_of_a_resumed_pass_stays_after_an_exception(base):
    ids, mask = pad(IDS)
    hooks = hooks_of(base)
    with torch.no_grad():
        full = final_states(base, ids, mask)
        prefix = torch.zeros_like(prefix_states(base, 2, ids, mask))
        with contextlib.suppress(KeyboardInterrupt), resumed_at(base, 2, prefix):
            assert not torch.equal(final_states(base, ids, mask), full)
            raise KeyboardInterrupt
        with pytest.raises((IndexError, RuntimeError)):
            prefix_states(base, 2, ids + 10_000, mask)
        assert torch.equal(final_states(base, ids, mask), full)
    assert hooks_of(base) == hooks
    assert not any("forward" in vars(block) for _, block in base.blocks)


def test_a_full_and_an_empty_prefix_cache_give_the_same_bits(base):
    roomy, narrow = PrefixCache(base, 2, 1 << 20), PrefixCache(base, 2, 1)
    first = roomy.padded(IDS)
    for cache in (roomy, narrow, narrow):
        assert torch.equal(cache.padded(IDS), first)
    direct = prefix_states(base, 2, *pad(IDS))
    for row, record in enumerate(IDS):
        assert torch.allclose(first[row, : len(record)], direct[row, : len(record)], atol=1e-5)


# --- bad input ----------------------------------------------------------------------------------


def test_a_missing_folder_and_a_missing_gguf_file_are_said(tmp_path):
    with pytest.raises(ModelError, match="no such folder or GGUF file"):
        fresh(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no such GGUF file"):
        fresh(tmp_path / "model.gguf")


def test_an_empty_folder_is_not_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"configuration or tokenizer .* minilm"):
        fresh(tmp_path)


def test_an_unknown_architecture_is_said(broken):
    (broken / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ModelError, match=r"cannot be read .*nonsense"):
        fresh(broken)


def test_a_configuration_that_is_not_json_is_said(broken):
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match="configuration or tokenizer cannot be read"):
        fresh(broken)


def test_a_model_without_a_tokenizer_is_refused(broken):
    for path in broken.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        fresh(broken)


@pytest.mark.parametrize("rows", [VOCABULARY - 20, VOCABULARY + 200])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(tmp_path, rows):
    save_llama(tmp_path, vocab_size=rows)
    with pytest.raises(ModelError, match=rf"has {VOCABULARY} entries but the model has {rows}"):
        fresh(tmp_path)


def test_weights_cut_in_half_are_refused(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match="weights"):
        fresh(broken)


def test_weights_that_are_no_weights_are_refused(broken):
    (broken / "model.safetensors").write_bytes(b"once upon a time")
    with pytest.raises(ModelError, match="weights"):
        fresh(broken)


def test_missing_weights_are_refused(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        fresh(broken)


def test_weights_that_are_not_finite_are_refused(broken):
    path = broken / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        fresh(broken)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def save_llama(folder, **changes):
    config = transformers.LlamaConfig(**SMALL | changes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(folder)


def save_kind(folder, name, **changes):
    network = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SMALL | changes)
    )
    if network.lm_head.bias is not None:
        nn.init.normal_(network.lm_head.bias)
    network.save_pretrained(folder)
    tiny_tokenizer(folder)


CHANGED_SCORES = [
    ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    ("Granite", {"logits_scaling": 4.0}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Phi", {}),
]


@pytest.mark.parametrize(("name", "changes"), CHANGED_SCORES)
def test_losses_are_of_the_models_own_scores(tmp_path, name, changes):
    save_kind(tmp_path, name, **changes)
    base = fresh(tmp_path)
    ids = [[6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]
    with torch.no_grad():
        found = record_losses(base, collate(ids, None), None)
        tokens = torch.tensor(ids)
        own = torch.stack([base.network(row[None], labels=row[None]).loss for row in tokens])
    assert torch.allclose(found, own, atol=1e-5)
    words = torch.tensor([3, 50, 7])
    states = final_states(base, *pad(ids))[0].detach()
    assert torch.allclose(
        base.output.scores(states, words), base.output.scores(states)[:, words], atol=1e-6
    )


@pytest.mark.parametrize(("name", "changes"), CHANGED_SCORES)
def test_a_decoder_whose_scores_would_be_computed_wrongly_is_refused(
    tmp_path, monkeypatch, name, changes
):
    """Faulty: what comes after the product with the weight is forgotten."""
    save_kind(tmp_path, name, **changes)
    monkeypatch.setattr(
        output_layer.OutputLayer,
        "of",
        lambda network: output_layer.OutputLayer(network.get_output_embeddings().weight),
    )
    with pytest.raises(ModelError, match="does more to its scores"):
        fresh(tmp_path)


def test_a_model_that_wants_more_than_token_ids_is_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="cannot be run as a plain encoder"):
        fresh(tmp_path)


def test_a_model_whose_records_influence_each_other_is_refused(bert):
    class Coupled(nn.Module):
        """The faulty version: states centred over the batch."""

        def forward(self, input_ids, attention_mask):
            found = bert.network(input_ids=input_ids, attention_mask=attention_mask)
            found.last_hidden_state = found.last_hidden_state - found.last_hidden_state.mean(0)
            return found

    with pytest.raises(ModelError, match="influence each other"):
        base_models._check_states(
            BaseModel("coupled", "", "encoder", Coupled(), None, "", bert.compute)
        )


# --- GGUF files ---------------------------------------------------------------------------------


def write_gguf(path, seed=0):
    """A random Llama with a byte-pair tokenizer of 60 words, as GGUF."""
    numbers = torch.Generator().manual_seed(seed)
    tokens = ["<s>", "</s>", "<|endoftext|>", *(chr(code) for code in range(97, 123)), "Ġ"]
    tokens += [a + b for a in "bdgkl" for b in "aeiou"]
    merges = [f"{a} {b}" for a in "bdgkl" for b in "aeiou"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes: dict[str, Any] = {
        "token_embd": (len(tokens), 32),
        "output": (len(tokens), 32),
        "output_norm": (32,),
    }
    for block in range(2):
        layers: dict[str, Any] = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
        layers |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32)}
        layers |= {"ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in layers.items()}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=numbers) * 0.2
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_converted_once_and_stays_as_it_was(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "small.gguf")
    before = path.read_bytes()
    first = fresh(path)
    assert first.kind == "decoder"
    assert first.folder.startswith(str(cache / "converted"))
    assert path.read_bytes() == before
    assert len(list((cache / "converted").iterdir())) == 1

    def converted_again(_):
        raise AssertionError

    monkeypatch.setattr(assets, "convert_gguf", converted_again)
    again = fresh(path.rename(tmp_path / "other name.gguf"))
    assert again.fingerprint == first.fingerprint
    ids, mask = pad([[3, 4, 5]])
    assert torch.equal(final_states(again, ids, mask), final_states(first, ids, mask))


def test_a_gguf_file_with_other_content_is_converted_for_itself(tmp_path, cache):
    first = fresh(write_gguf(tmp_path / "small.gguf"))
    other = fresh(write_gguf(tmp_path / "small.gguf", seed=1))
    assert other.fingerprint != first.fingerprint
    assert len(list((cache / "converted").iterdir())) == 2


def test_a_damaged_gguf_file_leaves_nothing_in_the_cache(tmp_path, cache):
    whole = write_gguf(tmp_path / "small.gguf").read_bytes()
    for number, damaged in enumerate((b"", b"GGUF", b"nonsense" * 50, whole[: len(whole) // 2])):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="GGUF file"):
            fresh(path)
    assert list((cache / "converted").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("PRIVET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"not be kept .* PRIVET_CACHE"):
        fresh(write_gguf(tmp_path / "small.gguf"))
