"""Formats that keep a quantization whose configs have no list of what is dense, but other words for it: GPTQ,
auto-round, AQLM and MLX. And AWQ, whose list readers add to one of their own."""

import re

import pytest
import torch
from light_results import light
from quantized_base import MODULE
from safetensors.torch import load_file

import lorafuse

FIRST, SECOND = "model.layers.0", "model.layers.1"
UP, DOWN = f"{FIRST}.mlp.up_proj", f"{FIRST}.mlp.down_proj"
EXPERTS = f"{FIRST}.mlp.experts"
assert UP == MODULE


def words(*shape):
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).to(torch.int32)


def gptq(module, bits=4):
    return {
        f"{module}.qweight": words(4 * bits // 4, 32),
        f"{module}.qzeros": words(1, bits),
        f"{module}.scales": torch.full((1, 32), 0.01).half(),
        f"{module}.g_idx": torch.zeros(32 if bits == 4 else 16, dtype=torch.int32),
    }


def awq(module):
    stored = {f"{module}.qweight": words(32, 4), f"{module}.qzeros": words(1, 4)}
    return stored | {f"{module}.scales": torch.full((1, 32), 0.01).half()}


def mlx(module, bits=4):
    scales = torch.full((32, 1), 0.01).bfloat16()
    stored = {f"{module}.weight": words(32, bits).view(torch.uint32)}
    return stored | {f"{module}.scales": scales, f"{module}.biases": scales * -8}


def aqlm(module):
    codes, books = torch.randint(0, 64, (32, 4, 1)).to(torch.int8), torch.randn(1, 64, 1, 8).half()
    scales = torch.full((32, 1, 1, 1), 0.01).half()
    return {f"{module}.codes": codes, f"{module}.codebooks": books, f"{module}.scales": scales}


def on_modules(*modules):
    return {
        f"base_model.model.{module}.lora_{side}.weight": torch.randn(shape) * 0.01
        for module in modules
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "lm_head": False}
AUTO = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
AQLM = {"quant_method": "aqlm", "num_codebooks": 1, "nbits_per_codebook": 6, "in_group_size": 8}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "modules_to_not_convert": None}


def section_of(tmp_path, make, section, modules, changed=(DOWN,), form="mixed", **options):
    """The section of a base that has these modules quantized, after `changed` became dense."""
    stored = {name: tensor for module in modules for name, tensor in make(module).items()}
    config, found, _ = light(tmp_path, stored, section, on_modules(*changed), form, **options)
    for module in modules:
        is_dense = f"{module}.weight" in found and found[f"{module}.weight"].is_floating_point()
        assert is_dense == (module in changed), module
        assert is_dense != all(name in found for name in make(module)), module
    return config["quantization_config"]


def test_gptq_says_what_is_quantized(tmp_path):
    """By the names that modules have in all layers, but not where one of another layer is dense."""
    modules = [UP, DOWN, f"{SECOND}.mlp.up_proj", f"{SECOND}.mlp.down_proj"]
    dense = {f"{FIRST}.mlp.gate.weight": torch.zeros(4, 4).bfloat16()}
    made = section_of(tmp_path, lambda m: gptq(m) | dense, GPTQ, modules)
    assert made == GPTQ | {
        "modules_in_block_to_quantize": [["mlp.up_proj", f"{SECOND}.mlp.down_proj"]],
        "dynamic": {r"-:model\.layers\.0\.mlp\.down_proj$": {}},
    }


def test_gptq_without_a_name_that_dense_ones_contain(tmp_path):
    """vLLM would take these for quantized."""
    dense = {f"{FIRST}.mlp.up_proj_gate.weight": torch.zeros(4, 4).bfloat16()}
    made = section_of(tmp_path, lambda m: gptq(m) | dense, GPTQ, [UP, DOWN, f"{SECOND}.mlp.up_proj"])
    assert made["modules_in_block_to_quantize"] == [[UP, f"{SECOND}.mlp.up_proj"]]


def test_gptq_where_the_base_said_something(tmp_path):
    """The first expression that matches counts, so those of dense modules come first."""
    dynamic = {"+:.*down_proj": {"bits": 8}, "-:.*gate": {}}
    before = GPTQ | {"dynamic": dynamic, "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]]}
    made = section_of(tmp_path, gptq, before, [UP, DOWN])
    assert list(made["dynamic"].items()) == [(r"-:model\.layers\.0\.mlp\.down_proj$", {}), *dynamic.items()]
    assert made["modules_in_block_to_quantize"] == [["mlp.up_proj"]]


def test_a_head_of_gptq(tmp_path):
    made = section_of(tmp_path, gptq, GPTQ | {"lm_head": True}, [UP, "lm_head"], ["lm_head"])
    assert made["lm_head"] is False
    assert made["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    assert made["dynamic"] == {r"-:lm_head$": {}}


def test_experts_of_gptq(tmp_path):
    """All of a layer, with one expression for the experts together and each alone."""
    changed, there = [f"{EXPERTS}.{n}.up_proj" for n in (0, 1)], f"{SECOND}.mlp.experts.1.up_proj"
    made = section_of(tmp_path, gptq, GPTQ, [*changed, there], changed)
    [expression] = made["dynamic"]
    for name in (EXPERTS, *changed):
        assert re.match(expression.removeprefix("-:"), name), name
    assert not re.match(expression.removeprefix("-:"), f"{EXPERTS}_2")
    assert made["modules_in_block_to_quantize"] == [[there]]


@pytest.mark.parametrize(
    ("make", "section", "field", "expected"),
    [
        (gptq, GPTQ, "dynamic", {r"-:model\.layers\.0\.mlp\.experts(\..*)?$": {}}),
        (awq, AWQ, "modules_to_not_convert", [EXPERTS]),
        (
            gptq,
            AUTO,
            "extra_config",
            {f"{EXPERTS}.{n}.up_proj": {"bits": 16, "data_type": "float"} for n in (0, 1)},
        ),
    ],
)
def test_some_experts_become_dense_with_all_of_their_layer(make, section, field, expected, tmp_path):
    changed, other, there = f"{EXPERTS}.0.up_proj", f"{EXPERTS}.1.up_proj", f"{SECOND}.mlp.experts.0.up_proj"
    stored = {name: t for module in (changed, other, there) for name, t in make(module).items()}
    config, found, receipt = light(tmp_path, stored, section, on_modules(changed))
    assert config["quantization_config"][field] == expected
    assert receipt["tensors"][f"{changed}.weight"]["action"] == "merged"
    assert receipt["tensors"][f"{other}.weight"]["action"] == "decoded"
    assert found.keys() == {
        f"{changed}.weight", f"{other}.weight", *make(there), "model.embed_tokens.weight"
    }  # fmt: skip
    lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "dense")
    dense = load_file(tmp_path / "dense/model.safetensors")
    assert all(torch.equal(found[f"{name}.weight"], dense[f"{name}.weight"]) for name in (changed, other))


def test_auto_round_has_a_section_for_each_module(tmp_path):
    before = AUTO | {"extra_config": {"lm_head": {"bits": 16}, DOWN: {"bits": 8}}}
    made = section_of(tmp_path, gptq, before, [UP, DOWN])
    assert made == AUTO | {
        "extra_config": {"lm_head": {"bits": 16}, DOWN: {"bits": 16, "data_type": "float"}}
    }
    made = section_of(tmp_path / "none", gptq, AUTO, [UP, DOWN])
    assert made == AUTO | {"extra_config": {DOWN: {"bits": 16, "data_type": "float"}}}


def test_auto_round_in_the_packing_of_awq(tmp_path):
    section = AUTO | {"packing_format": "auto_round:auto_awq"}
    made = section_of(tmp_path, awq, section, [UP, DOWN])
    assert made == section | {"extra_config": {DOWN: {"bits": 16, "data_type": "float"}}}


@pytest.mark.parametrize(("before", "after"), [(None, [DOWN]), (["visual"], ["visual", DOWN])])
def test_the_list_of_awq(before, after, tmp_path):
    """What readers leave dense by themselves they do with a list too."""
    made = section_of(tmp_path, awq, AWQ | {"modules_to_not_convert": before}, [UP, DOWN])
    assert made == AWQ | {"modules_to_not_convert": after}


@pytest.mark.parametrize("before", [None, [], ["lm_head.weight"]])
def test_aqlm_lists_weights_and_modules(before, tmp_path):
    """And what was dense: transformers would make codes of it. A name that is the end of another one would
    name both."""
    short = DOWN.removeprefix("model.")
    section = AQLM | {"linear_weights_not_to_quantize": before}
    made = section_of(tmp_path, aqlm, section, [UP, DOWN, short], [short])
    listed = made.pop("linear_weights_not_to_quantize")
    dense = {"model.embed_tokens", "lm_head"}
    assert made == AQLM
    assert set(listed) == {f"{re.escape(short)}$", *dense, *(f"{name}.weight" for name in (short, *dense))}
    for name in (short, *dense):
        assert any(re.match(f"{entry}$", name) for entry in listed), name
    assert not any(re.match(rf"(?:{entry})(?=\.|$)", DOWN) or DOWN.endswith(entry) for entry in listed)


def test_mlx_has_false_for_a_module(tmp_path):
    """In both sections, the second of which has no quant_method, as very old ones of bitsandbytes."""
    section = {"group_size": 32, "bits": 4, "mode": "affine", DOWN: {"group_size": 32, "bits": 4}}
    stored = mlx(UP) | mlx(DOWN)
    config, found, _ = light(tmp_path, stored, section, on_modules(DOWN), config={"quantization": section})
    assert config["quantization_config"] == config["quantization"] == section | {DOWN: False}
    assert found[f"{DOWN}.weight"].dtype == torch.bfloat16 and f"{DOWN}.biases" not in found


@pytest.mark.parametrize(("make", "section"), [(gptq, GPTQ), (gptq, AUTO), (awq, AWQ)])
def test_base_changes_no_word(make, section, tmp_path):
    stored = make(UP) | make(DOWN)
    config, found, receipt = light(tmp_path, stored, section, on_modules(DOWN), "base")
    assert config["quantization_config"] == section and found.keys() == {*stored, "model.embed_tokens.weight"}
    assert receipt["tensors"][f"{DOWN}.weight"]["changed"] > 0


def test_one_module_is_kept_dense(tmp_path):
    made = section_of(tmp_path, gptq, GPTQ, [UP, DOWN], [DOWN], "base", keep_dense=["*.down_proj"])
    assert made["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
