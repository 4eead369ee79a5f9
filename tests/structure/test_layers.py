"""layer_replication: the unmerged PEFT model is the judge; PEFT's own merge adds the updates of all copies to
one shared tensor."""

import json
from contextlib import closing

import pytest
import torch
from build import CONFIG as LLAMA
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from oracle import config, decode, read_tensors
from peft.tuners.lora.config import KasaConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from unmerged import dense_model, largest_difference, small, train

import lorafuse
from lorafuse.adapters import open_adapter
from lorafuse.errors import AdapterError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.plan import STORED_TENSOR_NBYTES
from lorafuse.settings import Settings
from lorafuse.structure.models import load_table

FIVE = [[0, 2], [0, 1], [1, 2], [1, 2]]  # layers 0 1 0 1 1 of two


def merge(ckpt, lora, out, **settings):
    warnings = []
    receipt = lorafuse.convert(
        ckpt,
        lora,
        out,
        on_event=lambda e: warnings.append(e["message"]) if e["event"] == "warning" else None,
        **settings,
    )
    return receipt, warnings


@pytest.mark.parametrize("kind", ["fp32", "fp32_tied", "nf4_dq", "int8"])
def test_each_copy_of_a_layer_gets_its_own_update(kind, base, tmp_path):
    """The copies differ in their updates, and what no update touches is the checkpoint's to the bit."""
    peft = train(
        dense_model(base(kind), AutoModelForCausalLM), tmp_path / "lora", layer_replication=FIVE,
        target_modules=["q_proj", "down_proj"], modules_to_save=["post_attention_layernorm"],
    )  # fmt: skip
    receipt, warnings = merge(base(kind), tmp_path / "lora", tmp_path / "out", dtype="float32")
    assert warnings == [
        f"{tmp_path}/lora/adapter_config.json: layer_replication makes 5 layers from the checkpoint's 2."
    ]
    assert config(tmp_path / "out")["num_hidden_layers"] == 5
    assert largest_difference(tmp_path / "out", AutoModelForCausalLM, peft) < 1e-4
    found, stored = read_tensors(tmp_path / "out"), decode(base(kind))
    for new, old in enumerate([0, 1, 0, 1, 1]):
        name = "model.layers.{}.self_attn.v_proj.weight"
        assert torch.equal(found[name.format(new)], stored[name.format(old)][0].float())
        assert receipt["tensors"][name.format(new).replace("v_proj", "q_proj")]["action"] == "merged"


@pytest.mark.parametrize(
    ("kind", "auto", "targets", "settings"),
    [
        ("gpt2", AutoModel, ["c_attn", "c_proj"], {"n_embd": 32, "n_layer": 3, "n_head": 4}),
        ("falcon", AutoModel, ["query_key_value"], {"new_decoder_architecture": False, "multi_query": True}),
        ("bert", AutoModelForMaskedLM, ["query", "dense"], {}),
        ("roberta", AutoModel, ["query"], {}),
        ("qwen2", AutoModelForCausalLM, ["q_proj"], {"num_key_value_heads": 2}),
    ],
)
def test_every_list_of_layers_that_peft_knows(kind, auto, targets, settings, tmp_path):
    ckpt = small(kind, auto, tmp_path / "ckpt", **settings)
    # Fewer layers than before as well, since transformers 5 cannot run more where a model asks its config for
    # each layer.
    for pairs in ([[1, 3], [0, 1]], [[0, 3], [1, 2]] if kind != "qwen2" else [[2, 3]]):
        lora, out = tmp_path / f"lora{len(pairs[0])}{pairs[0]}", tmp_path / f"out{pairs}"
        peft = train(dense_model(ckpt, auto), lora, layer_replication=pairs, target_modules=targets)
        merge(ckpt, lora, out)
        assert largest_difference(out, auto, peft) < 1e-4


def test_lists_with_an_entry_for_each_layer_follow_it(tmp_path):
    """SmolLM3's no_rope_layers: a layer keeps its kind wherever it goes."""
    ckpt = small(
        "smollm3",
        AutoModelForCausalLM,
        tmp_path / "ckpt",
        num_hidden_layers=4,
        num_key_value_heads=2,
        no_rope_layers=[1, 1, 0, 0],
    )
    peft = train(
        dense_model(ckpt, AutoModelForCausalLM),
        tmp_path / "lora",
        layer_replication=[[2, 4], [0, 1]],
        target_modules=["q_proj"],
    )
    _, warnings = merge(ckpt, tmp_path / "lora", tmp_path / "out")
    assert warnings == [
        f"{tmp_path}/lora/adapter_config.json: layer_replication makes 3 layers from the checkpoint's 4; 1 "
        "is not used."
    ]
    assert config(tmp_path / "out")["no_rope_layers"] == [0, 0, 1]
    assert largest_difference(tmp_path / "out", AutoModelForCausalLM, peft) < 1e-4


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"kasa_config": KasaConfig()}], ids=str
)
def test_variants_of_lora_on_copies(settings, tmp_path):
    ckpt = small("llama", AutoModelForCausalLM, tmp_path / "ckpt", num_key_value_heads=2, attention_bias=True)
    pairs = [[0, 2], [1, 3]]
    peft = train(
        dense_model(ckpt, AutoModelForCausalLM), tmp_path / "lora", layer_replication=pairs,
        target_modules=["q_proj", "down_proj"],
        **settings,
    )  # fmt: skip
    merge(ckpt, tmp_path / "lora", tmp_path / "out")
    assert largest_difference(tmp_path / "out", AutoModelForCausalLM, peft) < 1e-5


def test_a_base_that_changes_with_each_copy_is_refused(tmp_path):
    ckpt = write_checkpoint(tmp_path / "ckpt")
    merge(
        ckpt,
        write_adapter(tmp_path / "once", layer_replication=[[0, 2]], init_lora_weights="PiSSA"),
        tmp_path / "out",
    )
    lora = write_adapter(tmp_path / "lora", layer_replication=[[0, 2], [1, 2]], init_lora_weights="PiSSA")
    with pytest.raises(AdapterError) as caught:
        merge(ckpt, lora, tmp_path / "work/out")
    assert str(caught.value) == (
        f"{lora}/adapter_config.json: layer_replication repeats layers, and init_lora_weights is pissa, "
        "which then changes the weight that the copies share once for each copy; that is not supported."
    )


def test_copies_are_sharded_in_the_order_of_execution(tmp_path):
    ckpt = write_checkpoint(tmp_path / "ckpt", n_shards=3)
    lora = write_adapter(tmp_path / "lora", layer_replication=[[0, 2]] * 6)
    merge(ckpt, lora, tmp_path / "out", max_shard_size=5000)
    weight_map = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    files = [weight_map[f"model.layers.{i}.mlp.gate_proj.weight"] for i in range(12)]
    assert files == sorted(files) and len(set(files)) > 6
    assert len(weight_map) == 12 * 9 + 3


REFUSALS = {
    "no pairs": (
        "two",
        {},
        "layer_replication has two; expected a list of pairs [first layer, layer after the last].",
    ),
    "a number": (
        [1],
        {},
        "layer_replication has 1; expected a list of pairs [first layer, layer after the last].",
    ),
    "truth": (
        [[False, True]],
        {},
        "layer_replication has [False, True]; expected a list of pairs [first layer, layer after the last].",
    ),
    "too far": (
        [[0, 1], [1, 3]],
        {},
        "layer_replication has [1, 3], but the checkpoint has 2 layers, 0 to 1.",
    ),
    "negative": ([[-1, 1]], {}, "layer_replication has [-1, 1], but the checkpoint has 2 layers, 0 to 1."),
    "empty": ([[1, 1]], {}, "layer_replication has [1, 1], but the checkpoint has 2 layers, 0 to 1."),
    "too many": ([[0, 2]] * 6000, {"moe_layers": 1}, "layer_replication makes more than 10000 layers."),
    "no count": (
        [[0, 2]],
        {"num_hidden_layers": None},
        "layer_replication is set, but the checkpoint's config.json has none of num_hidden_layers, n_layer, "
        "n_layers, num_layers.",
    ),
    "another count": (
        [[0, 2]],
        {"num_hidden_layers": 3},
        "layer_replication is set, which PEFT knows for one list of layers (layers, encoder.layer or h) with "
        "as many as num_hidden_layers says, 3; the checkpoint has model.layers with 2.",
    ),
    "an unknown list": (
        [[0, 2]],
        {"mystery": [1, 2]},
        "layer_replication is set, and mystery of the checkpoint's config.json has as many entries as there "
        "are layers; whether each belongs to a layer is not known.",
    ),
    "windows": (
        [[0, 2]],
        {"model_type": "gemma2"},
        "layer_replication is set, but the checkpoint's config.json has no layer_types, so that a layer's "
        "kind follows from its number. Save the config with a transformers that writes the list.",
    ),
    "windows by a switch": (
        [[0, 2]],
        {"use_sliding_window": True},
        "layer_replication is set, but the checkpoint's config.json has no layer_types, so that a layer's "
        "kind follows from its number. Save the config with a transformers that writes the list.",
    ),
    "its own number": (
        [[0, 2]],
        {"scale_attn_by_inverse_layer_idx": True},
        "layer_replication is set, but layers of llama with scale_attn_by_inverse_layer_idx compute with "
        "their own number, which PEFT's copies keep; that is not supported.",
    ),
    "a type of its own": (
        [[0, 2]],
        {"model_type": "diffllama"},
        "layer_replication is set, but layers of diffllama compute with their own number, which PEFT's "
        "copies keep; that is not supported.",
    ),
    "other masks": (
        [[1, 2]],
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_replication puts layer 1 (sliding_attention) in the place of layer 0 (full_attention); "
        "transformers 5 masks its attention by the place and transformers 4 by the layer, so what was "
        "trained is not known.",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_replicated_is_refused(case, tmp_path):
    pairs, changes, message = REFUSALS[case]
    ckpt = write_checkpoint(tmp_path / "ckpt", config=LLAMA | changes)
    lora = write_adapter(tmp_path / "lora", layer_replication=pairs)
    with pytest.raises(AdapterError) as caught:
        merge(ckpt, lora, tmp_path / "work/out")
    assert str(caught.value) == f"{lora}/adapter_config.json: {message}"
    assert not (tmp_path / "work").exists()


def test_layers_of_several_kinds_need_a_list_that_says_so(tmp_path):
    tensors = checkpoint_tensors()
    tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(4, 16)
    lora = write_adapter(tmp_path / "lora", layer_replication=[[0, 2], [1, 2]])
    # Lists that say the same of both do not say it.
    ckpt = write_checkpoint(
        tmp_path / "ckpt",
        tensors,
        config=LLAMA | {"mlp_only_layers": [], "layer_types": ["full_attention"] * 2},
    )
    with pytest.raises(AdapterError) as caught:
        merge(ckpt, lora, tmp_path / "work/out")
    assert str(caught.value) == (
        f"{lora}/adapter_config.json: layer_replication is set, and layers 0 and 1 hold different tensors, "
        "but no list of the checkpoint's config.json tells one from the other, so that a layer's kind "
        "follows from its number. Save the config with a transformers that writes the list."
    )
    other = write_checkpoint(
        tmp_path / "other", tensors, config=LLAMA | {"mlp_only_layers": [0], "eos_token_id": [1, 2]}
    )
    lora = write_adapter(
        tmp_path / "lora2",
        adapter_tensors({name: tensors[name] for name in tensors if "layers.0" in name}),
        layer_replication=[[0, 2], [0, 1]],
    )
    merge(other, lora, tmp_path / "out")
    written = config(tmp_path / "out")
    assert (written["mlp_only_layers"], written["num_hidden_layers"], written["eos_token_id"]) == (
        [0, 2],
        3,
        [1, 2],
    )


@pytest.mark.parametrize("kind", ["gemma2", "smollm3", "llama", "qwen2", "gpt_neo"])
def test_the_table_of_lists_is_that_of_transformers(kind):
    """The lists that a default config makes, not all of one value; fixtures/make_structure.py makes the table
    for all types."""
    from transformers import CONFIG_MAPPING

    fields = CONFIG_MAPPING[kind]().to_dict()
    n_layers = fields.get("num_hidden_layers") or fields["num_layers"]
    made = {
        name
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == n_layers and value[1:] != value[:-1]
    }
    assert made == set(load_table()["layers"].get(kind, ()))


def test_the_plan_counts_the_names_of_copies(tmp_path):
    """Tables of names are part of the memory limit, and copies have names like any weight."""
    ckpt = write_checkpoint(tmp_path / "ckpt")
    budgets = {}
    for n_times in (1, 6):
        lora = write_adapter(tmp_path / f"lora{n_times}", layer_replication=[[0, 2]] * n_times)
        with (
            closing(Checkpoint(LocalFolder(ckpt))) as base,
            closing(open_adapter(LocalFolder(lora))) as adapter,
        ):
            settings = Settings(memory_nbytes=100_000_000, max_shard_nbytes=10**9)
            budgets[n_times] = make_plan(
                base, [WeightedAdapter(adapter, 1.0)], settings
            ).memory.resident_nbytes
    assert budgets[1] - budgets[6] == 10 * 9 * STORED_TENSOR_NBYTES
