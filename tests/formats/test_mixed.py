"""`--format mixed`, and weights that stay dense beside quantized ones: the results are loaded as users load
them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorafuse


def weights_of(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def decoded(model):
    """{module: its weight as the model computes with it}, of linear layers."""
    import bitsandbytes as bnb

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        elif isinstance(module, torch.nn.Linear):
            found[name] = module.weight.data
    return found


LIGHT = [("mixed", {}), ("base", {}), ("base", {"keep_dense": ["*.v_proj", "*.layers.1.*.down_proj"]})]


@pytest.mark.parametrize("kind", ["nf4_dq", "nf4_tied", "int8"])
@pytest.mark.parametrize(("form", "options"), LIGHT)
def test_transformers_loads_what_was_written(kind, form, options, base, adapter, tmp_path):
    """Layer by layer what the receipt measured: changed, dense, copied; and the model generates."""
    lora = adapter(kind, target_modules=["q_proj", "v_proj", "down_proj"])
    receipt = lorafuse.convert(base(kind), lora, tmp_path / "out", format=form, **options)
    lorafuse.convert(base(kind), lora, tmp_path / "dense")
    full, was = weights_of(tmp_path / "dense"), decoded(AutoModelForCausalLM.from_pretrained(base(kind)))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    dense = {name.removesuffix(".weight") for name, e in receipt["tensors"].items() if "stored" not in e}
    n_changed = 0
    for name, weight in decoded(model).items():
        entry = receipt["tensors"].get(f"{name}.weight")
        if entry and name in dense:
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, full[f"{name}.weight"]), name
        elif entry and entry["action"] == "merged":
            share = float((weight != was[name]).double().mean())
            assert share == pytest.approx(entry["changed"]), name
            n_changed += 1
        else:
            assert torch.equal(weight, was[name]), name
    kept_dense = {"mixed": 6, "base": 3 if options else 0}[form]
    merged = {name for name, e in receipt["tensors"].items() if e["action"] == "merged"}
    assert len(merged) == 6 and len(merged & {f"{name}.weight" for name in dense}) == kept_dense
    assert n_changed == 6 - kept_dense
    assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("form", ["mixed", "base"])
def test_transformers_loads_fp8(form, base, adapter, tmp_path):
    """Layer by layer what was written: q_proj in bfloat16 with `mixed`, all else FP8."""
    ckpt, f8 = tmp_path / "ckpt", torch.float8_e4m3fn

    def spread(scales):
        return scales.repeat_interleave(16, 0).repeat_interleave(16, 1)

    ckpt.mkdir()
    stored = {}
    for name, weight in weights_of(base("bf16")).items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            rows, cols = (size // 16 for size in weight.shape)
            stored[f"{name}_scale_inv"] = scales = torch.rand(rows, cols) * 1e-3 + 1e-3
            stored[name] = (weight.float() / spread(scales)).to(f8)
    save_file(stored, ckpt / "model.safetensors")
    config = json.loads((base("bf16") / "config.json").read_text())
    section = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (ckpt / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    lora = adapter("bf16", target_modules=["q_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "out", format=form)
    found = weights_of(tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    modules = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    for name, module in modules.items():
        expected = found[f"{name}.weight"]
        assert (expected.dtype == torch.bfloat16) == (form == "mixed" and name.endswith("q_proj"))
        if expected.dtype == f8:
            expected = (expected.float() * spread(found[f"{name}.weight_scale_inv"])).bfloat16()
        assert torch.equal(module.weight, expected), name  # on a CPU, transformers dequantizes
    assert modules
