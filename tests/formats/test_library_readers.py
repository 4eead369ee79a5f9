"""Light results of GPTQ, AWQ, auto-round, AQLM and MLX, as their own libraries load them: each layer computes
with what lorafuse decodes, and what was to be dense is."""

import json

import pytest
import torch
from quantized_base import decoded
from safetensors.torch import load_file, save_file

import lorafuse

LIGHT = pytest.mark.parametrize("form", ["base", "mixed"])


def words(*shape):
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).to(torch.int32)


def scales(*shape):
    return (torch.rand(shape) * 1e-3 + 1e-3).half()


def gptq(name, n_outputs, n_inputs, size):
    return {
        f"{name}.qweight": words(n_inputs // 8, n_outputs),
        f"{name}.qzeros": words(n_inputs // size, n_outputs // 8),
        f"{name}.scales": scales(n_inputs // size, n_outputs),
        f"{name}.g_idx": (torch.arange(n_inputs) // size).int(),
    }


def awq(name, n_outputs, n_inputs, size):
    return {
        f"{name}.qweight": words(n_inputs, n_outputs // 8),
        f"{name}.qzeros": words(n_inputs // size, n_outputs // 8),
        f"{name}.scales": scales(n_inputs // size, n_outputs),
    }


def auto_round(name, n_outputs, n_inputs, size):
    stored = gptq(name, n_outputs, n_inputs, size)
    del stored[f"{name}.g_idx"]
    # Symmetric: 8, less 1.
    return stored | {f"{name}.qzeros": torch.full_like(stored[f"{name}.qzeros"], 0x77777777)}


def mlx(name, n_outputs, n_inputs, size):
    grid = scales(n_outputs, n_inputs // size)
    stored = {f"{name}.weight": words(n_outputs, n_inputs // 8).view(torch.uint32)}
    return stored | {f"{name}.scales": grid, f"{name}.biases": grid * -8}


def packed(root, dense, make, section, size=32):
    """The dense checkpoint with random codes for its linear layers."""
    stored = {}
    for path in dense.glob("*.safetensors"):
        for name, weight in load_file(path).items():
            if name.endswith("_proj.weight"):
                stored |= make(name.removesuffix(".weight"), *weight.shape, size)
            else:
                stored[name] = weight.half()
    root.mkdir()
    save_file(stored, root / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text()) | section | {"dtype": "float16"}
    (root / "config.json").write_text(json.dumps(config))
    return root


def check(layers, out, form):
    """`layers`: {module: (whether it is quantized, what it computes with)}."""
    assert len(layers) > 10
    for name, (quantized, weight) in layers.items():
        assert quantized == (form == "base" or not name.endswith(("q_proj", "down_proj"))), name
        assert torch.equal(weight.float(), decoded(out, f"{name}.weight").float()), name


READERS = {
    "gptq": (gptq, {"sym": False, "desc_act": False}),
    "awq": (awq, {"version": "gemm", "zero_point": True}),
    "auto-round": (auto_round, {"sym": True, "packing_format": "auto_round:auto_gptq"}),
}
CASES = [
    pytest.param("gptq", marks=pytest.mark.oracle("gptqmodel", "optimum")),
    pytest.param("awq", marks=pytest.mark.oracle("gptqmodel")),
    pytest.param("auto-round", marks=pytest.mark.oracle("auto_round")),
]


@pytest.mark.parametrize("method", CASES)
@LIGHT
def test_transformers(method, form, base, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    make, further = READERS[method]
    section = {"quant_method": method, "bits": 4, "group_size": 32} | further
    ckpt = packed(tmp_path / "ckpt", base("bf16"), make, {"quantization_config": section})
    lora = adapter("bf16", target_modules=["q_proj", "down_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "out", format=form)
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=3, do_sample=False).shape == (1, 6)
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            if hasattr(module, "dequantize_weight"):
                layers[name] = True, module.dequantize_weight().T
            else:
                if module.bias is not None:
                    module.bias.zero_()
                unit = torch.eye(module.infeatures, dtype=torch.float16)
                layers[name] = True, module(unit).T
        elif isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            layers[name] = False, module.weight
    check(layers, tmp_path / "out", form)


def aqlm(name, n_outputs, n_inputs, size):
    codes = torch.randint(0, 512, (n_outputs, n_inputs // 8, 2)).to(torch.int16)
    stored = {f"{name}.codes": codes, f"{name}.codebooks": torch.randn(2, 512, 1, 8).half()}
    return stored | {f"{name}.scales": scales(n_outputs, 1, 1, 1)}


@pytest.mark.oracle("aqlm", "accelerate")
def test_aqlm(base, adapter, tmp_path):
    """What transformers loads of a mixed result is what the dense result has."""
    from aqlm import utils
    from transformers import AutoModelForCausalLM

    section = {"quant_method": "aqlm", "num_codebooks": 2, "nbits_per_codebook": 9}
    section |= {"in_group_size": 8, "out_group_size": 1, "linear_weights_not_to_quantize": ["lm_head.weight"]}
    ckpt = packed(tmp_path / "ckpt", base("bf16"), aqlm, {"quantization_config": section})
    lora = adapter("bf16", target_modules=["q_proj", "down_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "out", format="mixed")
    lorafuse.convert(ckpt, lora, tmp_path / "dense", format="dense")
    model, dense = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("out", "dense")
    )
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "codebooks"):
            codes = utils.unpack_int_data(module.codes.data, module.nbits_per_codebook)
            weight = utils._dequantize_weight(codes, module.codebooks, module.scales)
            assert torch.equal(weight, dense.get_submodule(name).weight), name
            layers[name] = True, weight
        elif isinstance(module, torch.nn.Linear):
            assert torch.equal(module.weight, dense.get_submodule(name).weight), name
            if name.endswith("_proj"):
                layers[name] = False, module.weight
    check(layers, tmp_path / "out", "mixed")
    ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0.01, atol=0.01)


@pytest.mark.oracle("mlx", "mlx_lm")
@LIGHT
def test_mlx_lm(form, base, adapter, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    section = {"group_size": 32, "bits": 4, "mode": "affine"}
    said = {"quantization_config": section, "quantization": section}
    ckpt = packed(tmp_path / "ckpt", base("bf16"), mlx, said)
    lora = adapter("bf16", target_modules=["q_proj", "down_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "out", format=form)
    model, _ = load_model(tmp_path / "out")
    layers = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            weight = module.weight
            if quantized := hasattr(module, "scales"):
                parts = (module.weight, module.scales, module.biases)
                weight = mx.dequantize(*parts, module.group_size, module.bits)
            layers[name] = quantized, torch.tensor(weight.astype(mx.float32).tolist())
    check(layers, tmp_path / "out", form)
    assert model(mx.array([[1, 5, 9]])).shape[:2] == (1, 3)
