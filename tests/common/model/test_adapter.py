"""common/model/adapter.py: a family trains what it names, is one vector, and plain PEFT on disk."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from privet.common.errors import AdapterError, ModelError
from privet.common.model import adapter as adapters
from privet.common.model.adapter import Layout, attach, shared, usual_modules
from privet.common.model.base_model import final_states, pad
from privet.common.model.exchange_layout import Exchange
from privet.common.settings.sections import AdapterSettings, ClusterSettings

from ...tiny import fresh, tiny_config

FAMILIES = ("lora_xs", "ffa", "fedsvd", "rolora", "fedsa", "lora")
IDS = ((6, 7, 8, 9, 10), (12, 13, 14))


def settings(family="lora_xs", **changes):
    return AdapterSettings(family=family, **{"rank": 2, "last_blocks": 2} | changes)


def states(base):
    with torch.no_grad():
        return final_states(base, *pad(IDS))


def random_vector(adapter, seed=0):
    drawn = np.random.default_rng(seed).normal(size=adapter.layout.dimension)
    return (0.3 * drawn).astype(np.float32)


def random_own(adapter, seed=1):
    drawn = np.random.default_rng(seed).normal(size=adapter.local_factor.dimension)
    return (0.3 * drawn).astype(np.float32)


# --- what is trained ----------------------------------------------------------------------------

ENDS = {
    "lora_xs": {"lora_B.default.trained.weight"},
    "ffa": {"lora_B.default.weight"},
    "fedsvd": {"lora_B.default.weight"},
    "rolora": {"lora_A.default.weight", "lora_B.default.weight"},  # by turns
    "fedsa": {"lora_A.default.weight", "lora_B.default.weight"},
    "lora": {"lora_A.default.weight", "lora_B.default.weight"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_exactly_the_parameters_it_names(base, family):
    adapter = attach(base, settings(family))
    trained = {name for name, p in base.network.named_parameters() if p.requires_grad}
    assert trained == {f"{module}.{end}" for module in adapter.modules for end in ENDS[family]}
    assert len(adapter.modules) == 8
    first = f"{base.blocks[2][0]}.", f"{base.blocks[3][0]}."
    assert all(module.startswith(first) for module in adapter.modules)
    assert adapter.first_block == 2
    seen = {id(p) for _, p in adapter.train_only(None)}
    assert seen == {id(p) for p in base.network.parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_nothing_but_what_is_named(llama_folder, family):
    base = fresh(llama_folder)
    adapter = attach(base, settings(family))
    before = {name: p.detach().clone() for name, p in base.network.named_parameters()}
    every = torch.optim.SGD(base.network.parameters(), lr=1.0)
    for _ in range(2):  # at B = 0 lora's A has no gradient
        every.zero_grad()
        final_states(base, *pad(IDS)).sum().backward()
        every.step()
    moved = {n for n, p in base.network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"{module}.{end}" for module in adapter.modules for end in ENDS[family]}


def test_a_family_that_would_train_more_is_caught(llama_folder, monkeypatch):
    """The faulty version: ffa with A in the place of B."""
    monkeypatch.setattr(adapters, "_factors", lambda layer: {"lora_B": layer.lora_A["default"]})
    with pytest.raises(AdapterError, match=r"lora_A.*would be trained, but the family ffa"):
        attach(fresh(llama_folder), settings("ffa"))


def test_a_shared_head_is_trained_with_its_bias_and_starts_at_zero(bert):
    adapter = attach(bert, settings(), outputs=3)
    assert [name for name, _ in adapter.parameters][-2:] == ["head.weight", "head.bias"]
    assert adapter.layout.pieces[-2:] == (("head.weight", (3, 32)), ("head.bias", (3,)))
    assert not adapter.start[-99:].any()


# --- one vector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("outputs", [0, 3])
def test_what_is_written_is_what_is_read(bert, family, outputs):
    adapter = attach(bert, settings(family), outputs)
    assert np.array_equal(adapter.read(), adapter.start)
    vector = random_vector(adapter)
    adapter.write(vector)
    assert np.array_equal(adapter.read(), vector)
    assert adapter.read().dtype == np.float32
    adapter.write(adapter.start)
    assert np.array_equal(adapter.read(), adapter.start)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_of_the_layout_cut_the_vector(llama, family):
    adapter = attach(llama, settings(family))
    vector = random_vector(adapter)
    adapter.write(vector)
    place = 0
    for (name, shape), (same, parameter) in zip(
        adapter.layout.pieces, adapter.parameters, strict=True
    ):
        assert name == same
        size = int(np.prod(shape))
        piece = vector[place : place + size].reshape(shape)
        assert np.array_equal(parameter.detach().numpy(), piece)
        place += size
    assert place == adapter.layout.dimension == len(vector)


@pytest.mark.parametrize(
    "vector", [np.zeros(3, np.float32), np.zeros(32), np.zeros((1, 32), np.float32)]
)
def test_a_vector_of_another_shape_or_type_is_refused(llama, vector):
    adapter = attach(llama, settings())
    assert adapter.layout.dimension == 32
    with pytest.raises(AdapterError, match="expected an adapter vector of 32 float32 numbers"):
        adapter.write(vector)


def test_the_layout_tells_apart_whatever_would_be_read_wrongly(llama, bert):
    kinds = [attach(llama, settings(family)).layout for family in FAMILIES]
    kinds += [attach(llama, settings(rank=3)).layout, attach(llama, settings(), 1).layout]
    kinds += [attach(llama, settings(last_blocks=1)).layout, attach(bert, settings()).layout]
    kinds += [dataclasses.replace(kinds[0], base="another model")]
    kinds += [dataclasses.replace(kinds[0], pieces=kinds[0].pieces[::-1])]
    assert len({layout.digest for layout in kinds}) == len(kinds)
    assert attach(llama, settings()).layout.digest == kinds[0].digest


@given(st.lists(st.tuples(st.text(), st.tuples(st.integers(1, 9), st.integers(1, 9)))))
def test_the_dimension_is_the_sum_of_the_pieces(pieces):
    layout = Layout("tiny", "base", tuple(pieces))
    assert layout.dimension == sum(a * b for _, (a, b) in pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_start_from_the_same_bits(llama_folder, family):
    first, second = (attach(fresh(llama_folder), settings(family)) for _ in range(2))
    assert np.array_equal(first.start, second.start)
    for vector in (random_vector(first),):
        first.write(vector)
        second.write(vector)
    assert torch.equal(states(first.base), states(second.base))
    third = attach(fresh(llama_folder), settings(family, seed=8))
    seeded = family in ("lora", "rolora", "fedsvd", "fedsa")  # A is in the vector
    assert seeded == (not np.array_equal(third.start, first.start))


# --- in the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_starting_vector_leaves_the_base_model_as_it_is(bert_folder, llama_folder, family):
    for folder in (bert_folder, llama_folder):
        base = fresh(folder)
        before = states(base)
        adapter = attach(base, settings(family))
        assert torch.equal(states(base), before)
        adapter.write(random_vector(adapter), random_own(adapter))
        assert not torch.allclose(states(base), before, atol=1e-3)
        adapter.write(adapter.start)
        assert torch.equal(states(base), before)


def test_another_family_leaves_no_residue(base):
    before = states(attach(base, settings()).base)
    names: dict[str, list[str]] = {}
    for family in (*FAMILIES, *FAMILIES[::-1]):
        adapter = attach(base, settings(family))
        assert torch.equal(states(base), before)
        found = [name for name, _ in base.network.named_parameters()]
        assert names.setdefault(family, found) == found
        adapter.write(random_vector(adapter))
    one = attach(base, settings(last_blocks=1))
    assert len(one.modules) == 4
    assert sum("lora_A" in name for name, _ in base.network.named_parameters()) == 4
    assert torch.equal(states(base), before)


def test_tiny_freezes_the_leading_singular_vectors_of_the_weight_itself(llama):
    adapter = attach(llama, settings(rank=3))
    layer = llama.network.get_submodule(adapter.modules[0])
    left, _, right = np.linalg.svd(layer.base_layer.weight.numpy().astype(np.float64))
    up, down = layer.lora_B["default"].frozen.weight.numpy(), layer.lora_A["default"].weight.numpy()
    assert np.allclose(np.abs(up.T @ left[:, :3]), np.eye(3), atol=1e-4)
    assert np.allclose(np.abs(down @ right[:3].T), np.eye(3), atol=1e-4)


# --- bad settings -------------------------------------------------------------------------------


def test_a_rank_larger_than_a_layer_allows_is_refused(llama):
    with pytest.raises(AdapterError, match=r"rank = 17 .*v_proj allows \(16\)"):
        attach(llama, settings(rank=17))
    assert attach(llama, settings(rank=16)).layout.dimension == 8 * 16 * 16


def test_unknown_modules_are_refused_and_the_known_ones_named(llama):
    with pytest.raises(AdapterError, match=r": query; its blocks have self_attn\.q_proj"):
        attach(llama, settings(modules=("query",)))
    with pytest.raises(AdapterError, match=r"no such linear layer in .*: nonsense; its"):
        attach(llama, settings(modules=("q_proj", "nonsense")))


def test_named_modules_are_taken_whole_words_only(llama):
    adapter = attach(llama, settings(modules=("mlp.up_proj",)))
    assert {m.rpartition("layers.")[2] for m in adapter.modules} == {
        "2.mlp.up_proj",
        "3.mlp.up_proj",
    }
    with pytest.raises(AdapterError, match=": proj; its blocks have"):
        attach(llama, settings(modules=("proj",)))


def test_more_blocks_than_there_are_means_all_of_them(llama):
    adapter = attach(llama, settings(last_blocks=100))
    assert (len(adapter.modules), adapter.first_block) == (16, 0)


def test_the_usual_modules_are_those_of_the_architecture(llama, bert):
    attach(llama, settings())
    assert usual_modules(llama) == ("q_proj", "v_proj", "o_proj", "down_proj")
    assert usual_modules(bert)[:2] == ("query", "value")


def test_text_from_an_encoder_is_refused_before_anything_is_trained(bert_folder):
    with pytest.raises(ModelError, match="is an encoder"):
        shared(tiny_config(bert_folder))


# --- on disk ------------------------------------------------------------------------------------

READER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM
ids, mask = torch.tensor([[6, 7, 8, 9], [12, 13, 0, 0]]), torch.tensor([[1] * 4, [1, 1, 0, 0]])
for pair in sys.argv[1:]:
    base, folder = pair.split("=")
    loader = AutoModel if "encoder" in folder else AutoModelForCausalLM
    model = PeftModel.from_pretrained(loader.from_pretrained(base), folder).eval()
    out = model(input_ids=ids, attention_mask=mask)
    found = out.last_hidden_state if "encoder" in folder else out.logits
    torch.save(found.detach(), folder + "/found.pt")
assert not any(name.startswith("privet") for name in sys.modules)
"""


def test_plain_peft_reads_every_family_without_privet(llama, bert, tmp_path):
    mask = torch.tensor([[1] * 4, [1, 1, 0, 0]])
    expected, pairs = {}, []
    for base in (llama, bert):
        for family in FAMILIES:
            adapter = attach(base, settings(family), 3 if base is bert else 0)
            adapter.write(random_vector(adapter), random_own(adapter))
            with torch.no_grad():
                found = final_states(base, torch.tensor([[6, 7, 8, 9], [12, 13, 0, 0]]), mask)
            folder = tmp_path / f"{base.kind} {family}"
            expected[folder] = found if base is bert else base.output.scores(found)
            adapter.save(folder)
            pairs.append(f"{base.folder}={folder}")
            assert (folder / "head.safetensors").exists() == (base is bert)
            if adapter.head is not None:
                kept = load_file(folder / "head.safetensors")
                assert torch.equal(kept["weight"], adapter.head.weight)
                assert torch.equal(kept["bias"], adapter.head.bias)
    subprocess.run([sys.executable, "-c", READER, *pairs], check=True)
    for folder, scores in expected.items():
        read = torch.load(folder / "found.pt")
        assert torch.allclose(read[mask.bool()], scores[mask.bool()], atol=1e-5)


def test_the_saved_configuration_is_an_ordinary_one(llama, tmp_path):
    adapter = attach(llama, settings(rank=3))
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 3, "none")
    assert sorted(config["target_modules"]) == sorted(adapter.modules)


# --- the trap of averaging ----------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("family", ["lora_xs", "ffa", "fedsvd", "rolora", "lora"])
def test_only_lora_loses_something_when_vectors_are_averaged(llama, family, turn):
    """mean(BA) - mean(B) mean(A) is zero where all clients share one factor (docs/privacy.md,
    LoRA)."""
    adapter = attach(llama, settings(family))
    exchange = Exchange(adapter.layout, adapter.start, ClusterSettings())
    places = adapter.layout.places(exchange.released(turn))
    sent = adapter.start + random_vector(adapter, 9)
    vectors = [sent.copy() for _ in range(5)]
    for seed, vector in enumerate(vectors):
        vector[places] += random_vector(adapter, seed)[places]

    def products(vector):
        adapter.write(vector.astype(np.float32))
        found = []
        for name in adapter.modules:
            layer = llama.network.get_submodule(name)
            up, down = layer.lora_B["default"], layer.lora_A["default"].weight
            weight = up.frozen.weight @ up.trained.weight if family == "lora_xs" else up.weight
            found.append((weight @ down).detach().double())
        return torch.stack([product.ravel()[:512] for product in found])

    wanted = torch.stack([products(vector) for vector in vectors]).mean(0)
    got = products(np.mean(vectors, axis=0))
    error = float((got - wanted).norm() / wanted.norm())
    assert error > 0.1 if family == "lora" else error < 1e-5


def test_an_adapter_that_another_one_has_pushed_out_is_made_anew(llama_folder):
    config = tiny_config(llama_folder)
    first = shared(config)
    assert shared(config) is first
    attach(first.base, AdapterSettings(rank=1, last_blocks=1))
    again = shared(config)
    assert again is not first
    assert again.layout == first.layout
    assert again.attached
    assert not first.attached


def test_the_name_of_before_is_the_same_family_to_settings_and_digests(llama_folder):
    before, now = (attach(fresh(llama_folder), settings(name)) for name in ("tiny", "lora_xs"))
    assert before.settings == now.settings
    assert before.layout.digest == now.layout.digest
