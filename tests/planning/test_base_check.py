"""Is this the base that the adapter was trained on? What is said about it, and that nothing is said where
nothing is known."""

import json
import shutil

import pytest
import torch
from build import CONFIG, checkpoint_tensors, files_of, write_adapter, write_checkpoint, write_json
from oracle import read_adapter, read_tensors
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.errors import AdapterError
from lorafuse.trained_base.model_names import quantized_by_name

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

NAMES = {
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": "nf4",
    "unsloth/qwen2.5-1.5b-instruct-unsloth-bnb-4bit": "nf4",
    "unsloth/llama-3-8b-bnb-4bit@main": "nf4",
    "/data/models/gemma-3-4b-it-bnb-4bit/": "nf4",
    "C:\\models\\mistral-7b-bnb-4bit": "nf4",
    "somebody/Mistral-7B-Instruct-v0.2-4bit-20250716": "nf4",
    "somebody/model-4bits": "nf4",
    "somebody/model.4-bit": "nf4",
    "hugging-quants/Meta-Llama-3.1-405B-BNB-NF4-BF16": "nf4",
    "OpenRAL/rskill-robometer-4b-nf4": "nf4",
    "somebody/model-bnb-int4": "nf4",
    "somebody/model-bnb-fp4": "fp4",
    "hugging-quants/Meta-Llama-3.1-405B-Instruct-BNB-INT8": "int8",
    "somebody/model-bnb-8bit": "int8",
    "ybelkada/opt-350m-8bit": "int8",
    "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ": "GPTQ",
    "somebody/model-4bit-gptq": "GPTQ",
    "somebody/Model-AWQ-4bit": "AWQ",
    "mlx-community/Qwen3-4B-4bit": "MLX",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "FP8",
    "nvidia/Llama-3.1-8B-Instruct-NVFP4": "NVFP4",
    "meta-llama/Llama-3.1-8B": None,
    "google/gemma-3n-E4B-it": None,
    "somebody-4bit/model": None,
    "microsoft/Phi-4": None,
    "somebody/model-14bit": None,
    "somebody/orbit-4bitten": None,
    "Qwen/Qwen1.5-0.5B-Chat-Int8": None,
    "": None,
    None: None,
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_says(name):
    assert quantized_by_name(name) == NAMES[name]


def warnings(ckpt, adapter, out, **settings):
    """What is said during a merge."""
    said = []
    lorafuse.convert(ckpt, adapter, out, on_event=said.append, **settings)
    return [event["message"] for event in said if event["event"] == "warning"]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"), [("a/b-bnb-4bit", "nf4"), ("a/b-fp4", "fp4"), ("a/b-8bit", "int8")]
)
def test_an_adapter_of_a_quantized_base(tmp_path, name, kind, dry_run):
    ckpt, lora = (
        write_checkpoint(tmp_path / "ckpt"),
        write_adapter(tmp_path / "lora", base_model_name_or_path=name),
    )
    assert warnings(ckpt, lora, tmp_path / "out", dry_run=dry_run) == [
        f"{lora}/adapter_model.safetensors: was trained on {name}, whose weights are quantized ({kind}), but "
        f"{ckpt} is in full precision: the update was trained on rounded weights, so on these the result is "
        f"not the model that was trained. Merge into that checkpoint, or take base_quant='{kind}', or "
        "base_quant_from its config.json, which names the modules that it leaves out."
    ]


def test_an_adapter_of_a_base_that_is_quantized_otherwise(tmp_path):
    """There is nothing to take; two adapters are named each."""
    ckpt = write_checkpoint(tmp_path / "ckpt")
    one, two = (
        write_adapter(tmp_path / kind, base_model_name_or_path=f"a/b-{kind}") for kind in ("GPTQ", "AWQ")
    )
    assert sorted(warnings(ckpt, one, tmp_path / "out", adapters=[two])) == [
        f"{path}/adapter_model.safetensors: was trained on a/b-{kind}, whose weights are quantized ({kind}), "
        f"but {ckpt} is in full precision: the update was trained on rounded weights, so on these the result "
        f"is not the model that was trained. How {kind} rounds them cannot be repeated here."
        for path, kind in ((two, "AWQ"), (one, "GPTQ"))
    ]


def test_nothing_is_said_about_a_base_that_is_quantized_or_taken_so(base, adapter, tmp_path):
    lora = adapter("nf4", target_modules=["q_proj"])
    config = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", config | {"base_model_name_or_path": "a/b-bnb-4bit"})
    assert warnings(base("nf4"), lora, tmp_path / "stored") == []
    assert warnings(base("bf16"), lora, tmp_path / "simulated", base_quant="nf4") == []
    assert len(warnings(base("bf16"), lora, tmp_path / "neither")) == 1
    for name in (None, 3, "a/b"):
        write_json(lora / "adapter_config.json", config | {"base_model_name_or_path": name})
        assert warnings(base("bf16"), lora, tmp_path / f"full-{name}".replace("/", "-")) == []


REFUSALS = {
    "shape": {
        "base_model.model.lm_head.lora_A.weight": (4, 8),
        "base_model.model.lm_head.lora_B.weight": (32, 4),
    },
    "name": {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": (4, 16)}
    | {"base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": (24, 4)},
    "vocabulary": {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 33)}
    | {"base_model.model.model.embed_tokens.lora_embedding_B": (16, 4)},
    "whole": {"base_model.model.model.norm.weight": (17,)},
    "row": {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 16)}
    | {"base_model.model.lm_head.lora_A.weight": (4, 16), "base_model.model.lm_head.lora_B.weight": (32, 4)},
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_the_base_that_the_adapter_knows(tmp_path, case):
    ckpt, names = (
        write_checkpoint(tmp_path / "ckpt"),
        {"base_model_name_or_path": "a/b", "trainable_token_indices": None},
    )
    if case == "row":
        names["trainable_token_indices"] = [32]
    for i, name in enumerate(("a/b", "", None)):
        tensors = {key: torch.ones(shape) for key, shape in REFUSALS[case].items()}
        lora = write_adapter(tmp_path / f"lora{i}", tensors, **names | {"base_model_name_or_path": name})
        with pytest.raises(AdapterError) as caught:
            lorafuse.convert(ckpt, lora, tmp_path / "work" / "out")
        assert str(caught.value).endswith(" The adapter's config names a/b as its base.") == bool(name)
        assert "as its base" not in str(caught.value).partition(" The adapter's config")[0]
    assert not (tmp_path / "work").exists()


def test_what_has_nothing_to_do_with_the_base_does_not_name_it(tmp_path):
    """Neither tensors that do not fit each other, nor a weight that nothing can be added to."""
    integers = write_checkpoint(
        tmp_path / "integers", checkpoint_tensors() | {HEAD: torch.ones(32, 16, dtype=torch.int64)}
    )
    factors = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 16),
        "base_model.model.lm_head.lora_B.weight": torch.ones(32, 4),
    }
    with pytest.raises(
        AdapterError, match=r"lora_A\.weight updates lm_head\.weight, which is I64 \[32, 16\]\.$"
    ):
        lorafuse.convert(integers, write_adapter(tmp_path / "fits", factors), tmp_path / "out")
    head = "base_model.model.lm_head"
    tensors = {f"{head}.lora_A.weight": torch.ones(4, 16), f"{head}.lora_B.weight": torch.ones(32, 3)}
    lora = write_adapter(tmp_path / "lora", tensors, base_model_name_or_path="a/b")
    with pytest.raises(AdapterError, match=r"they are not the two factors of one update\.$"):
        lorafuse.convert(write_checkpoint(tmp_path / "ckpt"), lora, tmp_path / "out")


def with_rows(source, target, name, rows, value=1.0):
    """The same checkpoint, another number in some rows of one tensor."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name][rows, 0] += value
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def copy_text(lora, key, weight, n, of, name):
    return (
        f"{lora}/adapter_model.safetensors: base_model.model.{key} is the adapter's own copy of {weight}, "
        f"and is taken; it differs from the checkpoint's in {n} of {of} rows: is this the base that it was "
        f"trained on, {name}?"
    )


def test_the_copies_that_peft_saves_below_adapted_embeddings(base, adapter, tmp_path):
    """They are the base's, or those of another, whose differing rows are counted; the copy is taken in both
    cases."""
    lora = adapter("fp32", target_modules=["embed_tokens", "lm_head"])
    assert warnings(base("fp32"), lora, tmp_path / "same") == []
    other = with_rows(base("fp32"), tmp_path / "other", EMBED, [3, 90, 7])
    key = "model.embed_tokens.base_layer.weight"
    assert warnings(other, lora, tmp_path / "out") == [copy_text(lora, key, EMBED, 3, 96, base("fp32"))]
    assert torch.equal(read_tensors(tmp_path / "out")[EMBED], read_tensors(tmp_path / "same")[EMBED])


def test_a_dry_run_reads_no_copy(base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["embed_tokens"])
    other = with_rows(base("fp32"), tmp_path / "other", EMBED, [3])
    assert warnings(other, lora, tmp_path / "out", dry_run=True) == []


def test_whole_embeddings_of_a_resized_vocabulary(base, adapter, tmp_path):
    """The rows that both have are compared."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("fp32"), dtype=torch.float32)
    model.resize_token_embeddings(100, mean_resizing=False)
    lora = adapter("fp32", model=model, save={"save_embedding_layers": True}, target_modules=["q_proj"])
    assert warnings(base("fp32"), lora, tmp_path / "same") == []
    other = with_rows(base("fp32"), tmp_path / "other", HEAD, slice(None))
    assert warnings(other, lora, tmp_path / "out") == [copy_text(lora, HEAD, HEAD, 96, 96, base("fp32"))]


def test_nothing_is_said_about_what_was_trained(base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    key = f"base_model.model.{EMBED}"
    assert not torch.equal(read_adapter(lora)[key], read_tensors(base("fp32"))[EMBED])
    assert warnings(base("fp32"), lora, tmp_path / "out") == []


def test_what_a_decomposition_left_of_the_base_is_no_copy_of_it(base, adapter, tmp_path):
    """PiSSA takes a part of the weight out of the layer whose weight is saved."""
    lora = adapter("fp32", target_modules=["lm_head"], init_lora_weights="pissa")
    assert not torch.equal(
        read_adapter(lora)["base_model.model.lm_head.base_layer.weight"], read_tensors(base("fp32"))[HEAD]
    )
    assert not [text for text in warnings(base("fp32"), lora, tmp_path / "out") if "copy" in text]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_in_another_dtype_is_the_same(tmp_path, stored, trained):
    """What casts leave, of tiny numbers too, is no difference; half as much again as bfloat16's step is."""
    tensors = {name: tensor.to(stored) for name, tensor in checkpoint_tensors(torch.float32).items()}
    tensors[EMBED] *= torch.logspace(-6, 0, 32)[:, None].to(stored)
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors)
    key = "base_model.model.model.embed_tokens"
    factors = {f"{key}.lora_embedding_A": torch.ones(4, 32), f"{key}.lora_embedding_B": torch.ones(16, 4)}
    copy = tensors[EMBED].to(trained)
    same = write_adapter(tmp_path / "same", factors | {f"{key}.base_layer.weight": copy})
    assert warnings(ckpt, same, tmp_path / "out") == []
    copy[31] *= 1 + 1.5 * 2**-7
    other = write_adapter(tmp_path / "other", factors | {f"{key}.base_layer.weight": copy})
    expected = copy_text(other, "model.embed_tokens.base_layer.weight", EMBED, 1, 32, "somebody/something")
    assert warnings(ckpt, other, tmp_path / "out2") == [expected]


@pytest.mark.parametrize("init", [[], {}, 7])
def test_an_odd_init_of_a_type_that_has_none(init, tmp_path):
    """Found by the fuzzer: what a type does not read may be of any kind."""
    tensors = {"base_model.model.lm_head.ia3_l": torch.ones(32, 1)}
    adapter = write_adapter(
        tmp_path / "lora", tensors, peft_type="IA3", feedforward_modules=[], init_lora_weights=init
    )
    lorafuse.convert(write_checkpoint(tmp_path / "ckpt"), adapter, tmp_path / "out", dry_run=True)


def test_a_copy_is_compared_in_pieces(tmp_path):
    """Rows in the first and in the last of several pieces; NaN is equal to NaN, though it ends the run
    afterwards."""
    tensors = {EMBED: torch.randn(5000, 48)}
    tensors[EMBED][2500] = float("nan")
    ckpt = write_checkpoint(
        tmp_path / "ckpt", checkpoint_tensors() | tensors, config=CONFIG | {"vocab_size": 5000}
    )
    copy = tensors[EMBED].clone()
    copy[[0, 1, 4999]] += 1
    tensors = {"base_model.model.model.embed_tokens.weight": copy}
    lora = write_adapter(tmp_path / "lora", tensors, base_model_name_or_path=None)
    said = []
    with pytest.raises(
        AdapterError,
        match=r"48 of 240000 values of base_model\.model\.model\.embed_tokens\.weight are not finite",
    ):
        lorafuse.convert(ckpt, lora, tmp_path / "out", on_event=said.append)
    assert [event["message"] for event in said if event["event"] == "warning"] == [
        f"{lora}/adapter_model.safetensors: base_model.model.{EMBED} is the adapter's own copy of {EMBED}, "
        "and is taken; it differs from the checkpoint's in 3 of 5000 rows: is this the base that it was "
        "trained on?"
    ]


def merged_text(lora, ckpt):
    return (
        f"{lora}/adapter_model.safetensors: was merged into {ckpt} already, as its lorafuse_receipt.json "
        "says; now its update is added once more. Merge into the checkpoint before that, unless this is what "
        "you want."
    )


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_adapter_that_was_merged_already(tmp_path, dry_run):
    """By its tensors, whatever it is called and whatever else was merged with it."""
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    tensors = {key: 2 * tensor for key, tensor in read_adapter(lora).items()}
    other, third = (
        write_adapter(tmp_path / "other", tensors),
        write_adapter(tmp_path / "third", {k: -t for k, t in tensors.items()}),
    )
    first = tmp_path / "first"
    assert warnings(ckpt, lora, first, adapters=[other]) == []
    renamed = shutil.copytree(lora, tmp_path / "renamed")
    write_json(
        renamed / "adapter_config.json",
        json.loads((lora / "adapter_config.json").read_text()) | {"revision": "x"},
    )
    assert warnings(first, renamed, tmp_path / "a", dry_run=dry_run) == [merged_text(renamed, first)]
    assert warnings(first, third, tmp_path / "b", dry_run=dry_run, adapters=[other]) == [
        merged_text(other, first)
    ]
    assert warnings(first, third, tmp_path / "c", dry_run=dry_run) == []


def test_a_receipt_of_megabytes_says_so_too(tmp_path):
    """Of the receipt of a large model only the beginning is read."""
    ckpt, lora, first = (
        write_checkpoint(tmp_path / "ckpt"),
        write_adapter(tmp_path / "lora"),
        tmp_path / "first",
    )
    receipt = lorafuse.convert(ckpt, lora, first)
    receipt["tensors"] |= {
        f"model.layers.0.mlp.experts.{i}.weight": {"action": "copied"} for i in range(30_000)
    }
    text = json.dumps(receipt, indent=2)
    assert len(text) > 2_000_000
    (first / "lorafuse_receipt.json").write_text(text)
    assert warnings(first, lora, tmp_path / "out") == [merged_text(lora, first)]


def test_an_adapter_that_shares_a_shard_with_one_that_was_merged(tmp_path):
    """All of its tensors would have to be the same."""
    paths = []
    for name in ("one", "two"):
        lora = write_adapter(tmp_path / name)
        tensors = sorted(read_adapter(lora).items())
        (lora / "adapter_model.safetensors").unlink()
        tensors[-1] = (tensors[-1][0], tensors[-1][1] + len(paths))
        half = len(tensors) // 4 * 2
        weight_map = {}
        for i, part in enumerate((tensors[:half], tensors[half:]), 1):
            save_file(dict(part), lora / f"adapter_model-{i}.safetensors")
            weight_map |= {key: f"adapter_model-{i}.safetensors" for key, _ in part}
        write_json(lora / "adapter_model.safetensors.index.json", {"weight_map": weight_map})
        paths.append(lora)
    ckpt, first = write_checkpoint(tmp_path / "ckpt"), tmp_path / "first"
    lorafuse.convert(ckpt, paths[0], first)
    assert warnings(first, paths[1], tmp_path / "out") == []
    said = merged_text(paths[0], first).replace("model.safetensors:", "model.safetensors.index.json:")
    assert warnings(first, paths[0], tmp_path / "out2") == [said]


BROKEN = [
    "",
    "[]",
    "{}",
    '{"inputs": 3}',
    '{"inputs": [{}, 3, {"role": "adapter", "size": null, "sha256": []}]}',
]
BROKEN += ["[" * 9999, '{"inputs": ' + "[" * 99999, '{"inputs": "\u00e9"}']


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_receipt_that_cannot_be_read_is_none(tmp_path, text):
    """A merge does not depend on it."""
    ckpt = write_checkpoint(tmp_path / "ckpt")
    lora = write_adapter(tmp_path / "lora")
    lorafuse.convert(ckpt, lora, tmp_path / "without")
    (ckpt / "lorafuse_receipt.json").write_text(text)
    assert warnings(ckpt, lora, tmp_path / "out") == []
    weights = "model.safetensors"
    assert files_of(tmp_path / "out")[weights] == files_of(tmp_path / "without")[weights]


@pytest.mark.parametrize(
    ("base", "warned"),
    [
        ("Qwen/Qwen3-8B-FP8", False),
        ("somebody/model-8bit", False),
        ("somebody/model-W8A8", False),
        ("Qwen/Qwen3-8B-GPTQ", True),
        ("unsloth/llama-3-8b-bnb-4bit", True),
        ("nvidia/model-NVFP4", True),
        ("Qwen/Qwen3-8B", False),
    ],
)
def test_a_base_of_another_quantization(base, warned, tmp_path):
    """The checkpoint is quantized, and the name of the adapter's base says otherwise."""
    stored = {
        "model.layers.0.mlp.up_proj.weight": torch.ones(8, 4).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
    }
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    path = write_checkpoint(tmp_path / "ckpt", stored, config=config)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora"
    lora = {f"{key}_A.weight": torch.ones(2, 4), f"{key}_B.weight": torch.ones(8, 2)}
    adapter = write_adapter(tmp_path / "adapter", lora, r=2, base_model_name_or_path=base)
    events = []
    lorafuse.convert(path, adapter, tmp_path / "out", dry_run=True, on_event=events.append)
    said = [e["message"] for e in events if "is stored in FP8, a scale for each" in e.get("message", "")]
    assert bool(said) == warned, said
