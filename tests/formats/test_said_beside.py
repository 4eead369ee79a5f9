"""Bases whose config.json says nothing of quantization, and a file beside it does: light results have the
section in config.json, as readers of today expect it."""

import json

import pytest
import torch
from build import write_adapter, write_checkpoint
from safetensors.torch import load_file

import lorafuse
from lorafuse.errors import CheckpointError

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def words(*shape):
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).to(torch.int32)


def gptq(module):
    scales = torch.full((1, 32), 0.01).half()
    return {f"{module}.qweight": words(4, 32), f"{module}.qzeros": words(1, 4), f"{module}.scales": scales}


def awq(module):
    scales = torch.full((1, 32), 0.01).half()
    return {f"{module}.qweight": words(32, 4), f"{module}.qzeros": words(1, 4), f"{module}.scales": scales}


def nvfp4(module):
    return {
        f"{module}.weight": torch.randint(0, 256, (32, 16), dtype=torch.uint8),
        f"{module}.weight_scale": torch.full((32, 2), 1.5).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_2": torch.tensor(0.01),
    }


OLD_GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "model_file_base_name": "model"}
OLD_AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
OLD_MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.19"},
    "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "zero_point": True, "group_size": 32, "bits": 4, "version": "gemm"}
MODELOPT = {"quant_method": "modelopt", **OLD_MODELOPT}
# case → (how a module is stored, the file, what it says, the section of today)
CASES = {
    "gptq": (gptq, "quantize_config.json", OLD_GPTQ, GPTQ),
    "awq": (awq, "quant_config.json", OLD_AWQ, AWQ),
    "awq by GPTQ's file": (awq, "quantize_config.json", OLD_AWQ, AWQ),
    "modelopt": (nvfp4, "hf_quant_config.json", OLD_MODELOPT, MODELOPT),
}
DENSE = {
    "gptq": {
        "modules_in_block_to_quantize": [["mlp.up_proj"]],
        "dynamic": {r"-:model\.layers\.0\.mlp\.down_proj$": {}},
    },
    "awq": {"modules_to_not_convert": [DOWN]},
    "modelopt": {"quantization": {**OLD_MODELOPT["quantization"], "exclude_modules": ["lm_head", DOWN]}},
}


def inputs(tmp_path, make, file, said, **config):
    stored = {**make(UP), **make(DOWN), "model.embed_tokens.weight": torch.ones(8, 32).half()}
    config = {"model_type": "llama", "torch_dtype": "float16", "vocab_size": 8, **config}
    ckpt = write_checkpoint(tmp_path / "ckpt", stored, config=config)
    (ckpt / file).write_text(said if isinstance(said, str) else json.dumps(said))
    key = f"base_model.model.{DOWN}"
    lora = {f"{key}.lora_A.weight": torch.randn(2, 32), f"{key}.lora_B.weight": torch.randn(32, 2) * 0.01}
    return ckpt, write_adapter(tmp_path / "lora", lora, r=2, lora_alpha=2, target_modules=["down_proj"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["base", "mixed", "dense"])
def test_the_section_of_today(case, form, tmp_path):
    make, file, said, today = CASES[case]
    ckpt, lora = inputs(tmp_path, make, file, said)
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "out", format=form)
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {"base": today, "mixed": today | DENSE[case.split()[0]], "dense": None}[form]
    assert config.get("quantization_config") == expected
    assert not (tmp_path / "out" / file).exists()
    assert str(ckpt / file) in [entry["path"] for entry in receipt["inputs"]]
    found = load_file(tmp_path / "out/model.safetensors")
    dense = {"base": set(), "mixed": {DOWN}, "dense": {UP, DOWN}}[form]
    for module in (UP, DOWN):
        weight = found.get(f"{module}.weight")
        assert (weight is not None and weight.is_floating_point()) == (module in dense)
        assert (found.keys() > make(module).keys()) == (module not in dense)
    lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])


def test_transformers_takes_the_sections():
    from transformers.utils.quantization_config import AwqConfig, GPTQConfig

    made = GPTQConfig.from_dict(GPTQ)
    assert (made.bits, made.group_size, made.desc_act, made.sym) == (4, 32, False, False)
    made = AwqConfig.from_dict(AWQ | DENSE["awq"])
    assert (made.bits, made.group_size, made.zero_point) == (4, 32, True)


def test_a_leftover_says_nothing(tmp_path):
    """Beside dense weights; and beside a section in config.json, at whatever depth."""
    dense = lambda module: {f"{module}.weight": torch.randn(32, 32).half()}  # noqa: E731
    ckpt, lora = inputs(tmp_path, dense, "quantize_config.json", "no JSON")
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    section = {"thinker_config": {"text_config": {"quantization_config": GPTQ}}}
    ckpt, lora = inputs(tmp_path / "deep", gptq, "quantize_config.json", "no JSON", **section)
    lorafuse.convert(ckpt, lora, tmp_path / "deep/out", format="base")
    assert (
        json.loads((tmp_path / "deep/out/config.json").read_text())["thinker_config"]
        == section["thinker_config"]
    )
    lorafuse.convert(ckpt, lora, tmp_path / "deep/dense")
    config = json.loads((tmp_path / "deep/dense/config.json").read_text())
    assert config["thinker_config"] == {"text_config": {}}


@pytest.mark.parametrize(
    ("file", "make", "said", "text"),
    [
        ("quantize_config.json", gptq, "{", "quantize_config.json: is not valid JSON"),
        ("quantize_config.json", gptq, {"quant_method": "marlin"}, "quantize_config.json: the checkpoint is"),
        ("quant_config.json", awq, {"version": "GEMV"}, "AWQ in version gemv is not read, only gemm"),
        ("hf_quant_config.json", nvfp4, {}, "hf_quant_config.json: quantization is None; expected an object"),
    ],
)
def test_refused_by_the_file(file, make, said, text, tmp_path):
    ckpt, lora = inputs(tmp_path, make, file, said)
    with pytest.raises(CheckpointError) as caught:
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert text in str(caught.value)
    [problem] = lorafuse.inspect(ckpt)["problems"]
    assert text in problem
