"""Formats that keep the quantization of a base, which bitsandbytes did not make: which modules config.json
lists as dense, and which run-time tensors stay."""

import pytest
import torch
from light_results import light
from safetensors.torch import load_file

import lorafuse
from lorafuse.errors import UsageError

LAYER = "model.layers.0"
UP, DOWN = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
EXPERTS = f"{LAYER}.mlp.experts"
F8 = torch.float8_e4m3fn


def codes(*shape):
    return torch.randint(0, 0x70, shape, dtype=torch.uint8)


def fp8(module, end="weight_scale_inv", grid=(1, 1)):
    return {f"{module}.weight": codes(8, 8).view(F8), f"{module}.{end}": torch.full(grid, 0.01)}


def channel(module):
    return fp8(module, "weight_scale", (8, 1))


def stack(module, kind):
    """Experts (2, in, out) of gpt-oss."""
    return {
        f"{module}.{kind}_proj_blocks": codes(2, 8, 1, 16),
        f"{module}.{kind}_proj_scales": torch.full((2, 8, 1), 120, dtype=torch.uint8),
        f"{module}.{kind}_proj_bias": torch.zeros(2, 8, dtype=torch.bfloat16),
    }


def on_module(module):
    key = f"base_model.model.{module}"
    return {f"{key}.lora_A.weight": torch.randn(2, 8), f"{key}.lora_B.weight": torch.randn(8, 2) * 0.1}


def on_stack(*kinds):
    """The adapter that peft makes of experts with target_parameters, and its settings."""
    tensors, key = {}, f"base_model.model.{EXPERTS}"
    for _ in kinds:
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 32)
        tensors[f"{key}.lora_B.weight"] = torch.randn(8, 4) * 0.1
        key += ".base_layer"
    parameters = [f"experts.{kind}_proj" for kind in kinds]
    return tensors, {"target_modules": [], "target_parameters": parameters}


HEAD = ["lm_head", "model.embed_tokens"]  # what transformers leaves dense where there is no list
CASES = {
    "fp8": (fp8, {"quant_method": "fp8"}, "modules_to_not_convert", [*HEAD, DOWN]),
    "fp8 with a list": (
        fp8,
        {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]},
        "modules_to_not_convert",
        ["lm_head", DOWN],
    ),
    "fp8 of MiniMax": (
        fp8,
        {"quant_method": "fp8", "ignored_layers": ["gate"]},
        "ignored_layers",
        ["gate", DOWN],
    ),
    "fbgemm": (channel, {"quant_method": "fbgemm_fp8"}, "modules_to_not_convert", [*HEAD, DOWN]),
    "compressed-tensors": (
        channel,
        {"quant_method": "compressed-tensors", "ignore": ["re:.*head"]},
        "ignore",
        ["re:.*head", DOWN],
    ),
    "modelopt": (channel, {"quant_method": "modelopt", "ignore": ["lm_head"]}, "ignore", ["lm_head", DOWN]),
    "older modelopt": (
        channel,
        {"quant_method": "modelopt", "exclude_modules": ["lm_head"]},
        "exclude_modules",
        ["lm_head", DOWN],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_quantization_has_its_list(case, tmp_path):
    make, section, field, expected = CASES[case]
    stored = make(UP) | make(DOWN)
    config, found, receipt = light(tmp_path, stored, section, on_module(DOWN))
    assert config["quantization_config"] == section | {field: expected}
    assert found[f"{DOWN}.weight"].dtype == torch.bfloat16
    assert found.keys() == {*stored, "model.embed_tokens.weight"} - {
        name for name in stored if name.startswith(DOWN) and not name.endswith("weight")
    }
    assert receipt["tensors"][f"{DOWN}.weight"]["action"] == "merged"


def test_modelopt_as_its_own_file_has_it(tmp_path):
    section = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}
    config, _, _ = light(tmp_path, channel(UP) | channel(DOWN), section, on_module(DOWN))
    assert config["quantization_config"] == section | {
        "quantization": {"quant_algo": "FP8", "exclude_modules": [DOWN]}
    }


def test_an_old_section(tmp_path):
    section = {"quant_method": "compressed-tensors", "ignore": []}
    stored = channel(UP) | channel(DOWN)
    config, _, _ = light(tmp_path, stored, section, on_module(DOWN), where="compression_config")
    assert config["compression_config"] == section | {"ignore": [DOWN]}


def test_a_config_that_is_silent(tmp_path):
    """hf_quant_config.json is not copied, so that nothing would say how the result is quantized."""
    stored = {f"{UP}.weight": codes(8, 8), f"{UP}.weight_scale": torch.ones(8, 1).to(F8)}
    stored |= {f"{UP}.weight_scale_2": torch.ones(())} | {f"{DOWN}.weight": torch.zeros(8, 8).bfloat16()}
    with pytest.raises(UsageError, match=r"config\.json does not say how the checkpoint is quantized"):
        light(tmp_path, stored, None, on_module(DOWN))


def test_run_time_tensors_stay_with_what_stays_quantized(tmp_path):
    of_up, of_down, of_cache = f"{UP}.input_scale", f"{DOWN}.input_scale", f"{LAYER}.self_attn.k_scale"
    extra = {name: torch.ones(1) for name in (of_up, of_down, of_cache)}
    section = {"quant_method": "compressed-tensors"}
    _, found, receipt = light(tmp_path, channel(UP) | channel(DOWN) | extra, section, on_module(DOWN))
    assert {of_up, of_cache} < found.keys() and of_down not in found
    assert receipt["dropped"].keys() == {of_down}
    assert receipt["tensors"][of_up]["action"] == "copied"


def test_run_time_tensors_go_with_all_that_is_quantized(tmp_path):
    extra = {f"{DOWN}.input_scale": torch.ones(1), f"{LAYER}.self_attn.k_scale": torch.ones(1)}
    config, found, receipt = light(
        tmp_path, channel(DOWN) | extra, {"quant_method": "compressed-tensors"}, on_module(DOWN)
    )
    assert not found.keys() & extra.keys() and receipt["dropped"].keys() == extra.keys()
    assert "quantization_config" not in config


OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 2}


def test_experts_of_gpt_oss_are_listed_together(tmp_path):
    stored = stack(EXPERTS, "gate_up") | stack(EXPERTS, "down") | stack(EXPERTS.replace("0", "1"), "down")
    tensors, lora = on_stack("gate_up", "down")
    config, found, _ = light(tmp_path, stored, OSS, tensors, config=GPT_OSS, lora=lora)
    assert config["quantization_config"] == OSS | {
        "modules_to_not_convert": ["model.layers.*.self_attn", EXPERTS]
    }
    assert found[f"{EXPERTS}.down_proj"].shape == (2, 32, 8)
    assert f"{EXPERTS}.down_proj_blocks" not in found


def test_the_other_half_of_the_experts_becomes_dense_too(tmp_path):
    """The stack that does not change, to the bits that it decodes to; no other layer."""
    there = EXPERTS.replace("0", "1")
    stored = stack(EXPERTS, "gate_up") | stack(EXPERTS, "down") | stack(there, "down")
    tensors, lora = on_stack("down")
    said = []
    config, found, receipt = light(
        tmp_path, stored, OSS, tensors, config=GPT_OSS, lora=lora, on_event=said.append
    )
    assert config["quantization_config"] == OSS | {
        "modules_to_not_convert": ["model.layers.*.self_attn", EXPERTS]
    }
    lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "dense")
    dense = load_file(tmp_path / "dense/model.safetensors")
    for kind, action in (("gate_up", "decoded"), ("down", "merged")):
        name = f"{EXPERTS}.{kind}_proj"
        assert torch.equal(found[name], dense[name]) and receipt["tensors"][name]["action"] == action
        assert f"{name}_blocks" not in found
    assert f"{there}.down_proj_blocks" in found
    # A stack of 2 × 8 × 32 weights: 16 bits each, less 4 bits each and 16 scales.
    assert [e["message"] for e in said if e["event"] == "warning" and "one form" in e["message"]] == [
        "format='mixed': config.json has all experts of a layer in one form, so that those of "
        f"{EXPERTS} become dense with the ones that do, which takes 752 bytes more. format='base' without "
        "keep_dense keeps them all quantized."
    ]


@pytest.mark.parametrize(
    ("make", "method", "field", "entry"),
    [
        (channel, "compressed-tensors", "ignore", r"re:model\.layers\.0\.mlp\.experts(\..*)?$"),
        (fp8, "fp8", "modules_to_not_convert", EXPERTS),
        (channel, "modelopt", "ignore", EXPERTS),
    ],
)
def test_some_experts_become_dense_with_all_of_their_layer(make, method, field, entry, tmp_path):
    """Also where --keep-dense names one of them, and the others would change on the base's grid."""
    names = [f"{EXPERTS}.{n}.{kind}_proj" for n in (0, 1) for kind in ("up", "down")]
    there = f"{EXPERTS.replace('0', '1')}.0.up_proj"
    stored = {name: tensor for module in (*names, there, UP) for name, tensor in make(module).items()}
    for form, changed, keep in (("mixed", names[:1], []), ("base", names[:2], ["*.experts.0.up_proj"])):
        tensors = {k: t for module in changed for k, t in on_module(module).items()}
        config, found, _ = light(
            tmp_path / form, stored, {"quant_method": method, field: []}, tensors, form, keep_dense=keep
        )
        assert config["quantization_config"][field] == [entry]
        for module in (*names, there, UP):
            assert (found[f"{module}.weight"].dtype == torch.bfloat16) == (module in names)


def test_experts_one_by_one(tmp_path):
    """All of a layer: an entry for all of them; compressed-tensors needs an expression for that."""
    first, second = f"{EXPERTS}.0.up_proj", f"{EXPERTS}.1.up_proj"
    stored, tensors = channel(first) | channel(second) | channel(UP), on_module(first) | on_module(second)
    section = {"quant_method": "compressed-tensors"}
    config, _, _ = light(tmp_path, stored, section, tensors)
    assert config["quantization_config"]["ignore"] == [r"re:model\.layers\.0\.mlp\.experts(\..*)?$"]


@pytest.mark.parametrize("form", ["base", "mixed"])
def test_torchao_says_in_headers_how_weights_are_stored(form, tmp_path):
    stored = channel(UP) | {f"{DOWN}.weight": torch.zeros(8, 8).bfloat16()}
    section = {"quant_method": "compressed-tensors"}
    inner = {"text_config": {"quantization_config": {"quant_method": "torchao"}}}
    with pytest.raises(UsageError, match="say in their files' headers"):
        light(tmp_path, stored, section, on_module(DOWN), form, config=inner)
