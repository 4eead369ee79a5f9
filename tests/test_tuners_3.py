"""PEFT types that replace, add or project, each against PEFT's unmerged model and a float64 formula of its own.

The formulas are written from the papers and PEFT's documentation, on the tensors of the adapter file; they share no code with the
package.
"""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import lorafuse
from lorafuse.errors import AdapterError
from oracle import config, decode, read_adapter, read_tensors
from test_lora import assert_same_answers, rewrite

LAYERS = {"target_modules": ["q_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
ADALORA = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 9}

# name → (peft_type, settings, kind of base)
CASES = {
    "ln_tuning": ("LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}, "fp32"),
    "ln_tuning, a module with children": ("LN_TUNING", {"target_modules": ["mlp"]}, "fp32"),
    "ln_tuning, norms with a bias": ("LN_TUNING", {"target_modules": ["ln_1", "ln_f"]}, "gpt2"),
    "trainable_tokens": ("TRAINABLE_TOKENS", {"token_indices": [90, 1, 2, 5]}, "fp32"),
    "trainable_tokens, two layers": (
        "TRAINABLE_TOKENS",
        {"token_indices": [1, 5], "target_modules": ["embed_tokens", "lm_head"]},
        "fp32",
    ),
    "trainable_tokens, tied": ("TRAINABLE_TOKENS", {"token_indices": [1, 5]}, "fp32_tied"),
}


@pytest.fixture
def tuned(base, tmp_path):
    """tuned(peft_type, settings, kind) → an adapter that PEFT wrote for that base (dequantized, where it is quantized), every
    trained value moved at random; `.model` is PEFT's model, not merged."""

    def make(kind, settings, base_kind="fp32", *, before=None, noise=0.05):
        from peft import get_peft_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from transformers import AutoConfig, AutoModelForCausalLM

        conf = AutoConfig.from_pretrained(base(base_kind))
        conf.__dict__.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(conf, dtype=torch.float32)
        values = {name: value.float() for name, (value, _) in decode(base(base_kind)).items()}
        missing = model.load_state_dict(values, strict=False)
        assert not missing.unexpected_keys
        model.tie_weights()
        torch.manual_seed(1)
        peft = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * noise)
            if before:
                before(peft)
        path = tmp_path / "adapter"
        peft.save_pretrained(path)
        make.model = peft.eval()
        return path

    return make


@pytest.mark.parametrize("case", CASES)
def test_merged_answers_as_the_unmerged_model(case, base, tuned, tmp_path):
    kind, settings, base_kind = CASES[case]
    adapter = tuned(kind, settings, base_kind)
    receipt = lorafuse.convert(base(base_kind), adapter, tmp_path / "out")
    used, ignored = receipt["adapter_tensors"]["used"], receipt["adapter_tensors"]["ignored"]
    assert sorted([*used, *ignored]) == sorted(read_adapter(adapter))
    assert_same_answers(tmp_path / "out", tuned.model)


# One case of each type that has one on linear layers; PEFT's model stands on the dequantized base.
NF4 = {}


@pytest.mark.parametrize("case", NF4)
def test_merged_answers_as_the_unmerged_model_on_nf4(case, base, tuned, tmp_path):
    kind, settings, _ = CASES[case]
    adapter = tuned(kind, settings, "nf4_dq")
    lorafuse.convert(base("nf4_dq"), adapter, tmp_path / "out", dtype="float32")
    assert_same_answers(tmp_path / "out", tuned.model)


def expected_ln_tuning(w, name, tensors, conf):
    return tensors.get(name.rpartition(".")[0] + ".ln_tuning_layers." + name.rpartition(".")[2], w)


def expected_trainable_tokens(w, name, tensors, conf):
    rows = tensors.get(name.removesuffix("weight") + "trainable_tokens_delta")
    return w if rows is None else w.index_copy(0, torch.tensor(conf["token_indices"]), rows)


# peft_type → (W in float64, weight name, adapter tensors in float64 by name without the prefix, config) → W'
FORMULAS = {"LN_TUNING": expected_ln_tuning, "TRAINABLE_TOKENS": expected_trainable_tokens}
WEIGHED = [case for case in CASES if CASES[case][0] in FORMULAS and "children" not in case]


def wanted(base_dir, adapter, scale):
    """{weight: W + scale · (W' − W) in float64}."""
    conf = config(adapter, "adapter_config.json")
    tensors = {key.removeprefix("base_model.model."): t for key, t in read_adapter(adapter).items()}
    tensors = {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
    values = {name: value for name, (value, _) in decode(base_dir).items()}
    formula = FORMULAS[conf["peft_type"]]
    return {name: w + scale * (formula(w, name, tensors, conf) - w) for name, w in values.items()}


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("case", WEIGHED)
def test_weights_are_those_of_the_formula(case, scale, base, tuned, tmp_path):
    """W + scale · (W' − W), within the error of fp32."""
    kind, settings, base_kind = CASES[case]
    adapter = tuned(kind, settings, base_kind)
    lorafuse.convert(base(base_kind), adapter, tmp_path / "out", adapter_scale=scale)
    found, expected = read_tensors(tmp_path / "out"), wanted(base(base_kind), adapter, scale)
    assert found.keys() == expected.keys()
    before = {name: value for name, (value, _) in decode(base(base_kind)).items()}
    changed = 0
    for name, value in expected.items():
        # Each of the few operations behind an element rounds by at most 2⁻²⁴ of the largest term in its sum.
        slack = SLACK.get(kind, 2e-7) * (1 + value.abs().max())
        assert (found[name].double() - value).abs().max() <= slack, name
        changed += not torch.equal(before[name], value)
    assert changed


SLACK = {}


def refused(ckpt, adapter, out, where="adapter_model.safetensors"):
    """The text of the refusal after the file's name; nothing is written."""
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, out / "work" / "out")
    assert not (out / "work").exists()
    start = f"{adapter}/{where}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def change(adapter, **tensors):
    """Rewrite an adapter file: a new tensor, or None to drop one; keys by their last part, in the first module that has it."""
    stored = read_adapter(adapter)
    for leaf, tensor in tensors.items():
        key = min((k for k in stored if re.search(rf"(^|\.){re.escape(leaf)}$", k)), default=leaf)
        stored.pop(key, None)
        if tensor is not None:
            stored[key] = tensor
    save_file(stored, adapter / "adapter_model.safetensors")


Q = "model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens.trainable_tokens_delta"
ANOTHER_BASE = "is the adapter for another base?"


def test_ln_tuning_refuses_another_shape(base, tuned, tmp_path):
    adapter = tuned("LN_TUNING", {"target_modules": ["norm"]})
    change(adapter, **{"model.norm.ln_tuning_layers.weight": torch.zeros(65)})
    key = "base_model.model.model.norm.ln_tuning_layers.weight"
    assert refused(base("fp32"), adapter, tmp_path) == f"{key} is [65], but model.norm.weight is [64]; {ANOTHER_BASE}"


TOKENS = {
    "another width": ({}, torch.zeros(2, 72), f"{EMBED} [2, 72] does not fit model.embed_tokens.weight [96, 64]; {ANOTHER_BASE}"),
    "another count": ({}, torch.zeros(3, 64), f"{EMBED} is F32 [3, 64], expected one row for each of the 2 in token_indices."),
    "integers": ({}, torch.zeros(2, 64, dtype=torch.int32), f"{EMBED} has the dtype I32; expected one of F32, F16, BF16."),
    "no list": ({"token_indices": "1, 5"}, None, "token_indices is 1, 5, expected a list of integers."),
    "twice": ({"token_indices": [5, 5]}, None, "token_indices has 5 twice; which row is meant?"),
    "outside": (
        {"token_indices": [1, 96]},
        None,
        "token_indices has 96, but model.embed_tokens.weight has 96 rows; is the adapter for another base, or was the vocabulary "
        "resized without saving the embedding?",
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_trainable_tokens_refuses_what_does_not_fit(case, base, tuned, tmp_path):
    adapter = tuned("TRAINABLE_TOKENS", {"token_indices": [1, 5]})
    fields, tensor, message = TOKENS[case]
    rewrite(adapter, **fields)
    if tensor is not None:
        change(adapter, **{"embed_tokens.trainable_tokens_delta": tensor})
    where = "adapter_config.json" if tensor is None else "adapter_model.safetensors"
    assert refused(base("fp32"), adapter, tmp_path, where) == message


def test_replaced_rows_are_bit_exact_and_the_pair_stays_tied(base, tuned, tmp_path):
    """A row is copied, not added to; PEFT saves it for both sides of a tied pair, which stays one tensor."""
    adapter = tuned("TRAINABLE_TOKENS", {"token_indices": [90, 1, 2]}, "bf16_tied")
    receipt = lorafuse.convert(base("bf16_tied"), adapter, tmp_path / "out")
    found, stored = read_tensors(tmp_path / "out"), read_adapter(adapter)
    embed = found["model.embed_tokens.weight"]
    assert torch.equal(embed[torch.tensor([90, 1, 2])], stored[EMBED].bfloat16())
    assert "lm_head.weight" not in found and json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert receipt["adapter_tensors"]["ignored"] == {
        "base_model.model.lm_head.trainable_tokens_delta": "equal to the update of model.embed_tokens.weight, to which it is tied"
    }
