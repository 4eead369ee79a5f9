"""`--format fp8`, `w8a16`, `w4a16`: codes, scales and config.json of compressed-tensors."""

import numpy as np
import pytest
import symmetric_oracle as oracle
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from symmetric_tiles import WORDS, encoded, weights

import lorafuse


@given(weights())
@settings(max_examples=150, deadline=None)
def test_codes_and_scales_are_those_of_the_definition(case):
    values, dtype, word, group, cuts = case
    weight = values.to(dtype)
    codes, scales, decoded, n_clipped = oracle.quantized(weight, word, group)
    tensors, found, clipped = encoded(weight, values, word, group, cuts)
    made, of = oracle.stored(tensors, "m", word)
    np.testing.assert_array_equal(of, scales)
    np.testing.assert_array_equal(made, codes.reshape(made.shape))
    if word == "fp8":  # the quotient is -0 only where it comes from underflow
        negative = np.signbit(made) & (made == 0)
        assert not (negative & (weight == 0).numpy()).any()
    np.testing.assert_array_equal(found.double().numpy(), decoded.reshape(-1))
    assert clipped == n_clipped


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


LINEARS = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
MODULES = [f"model.layers.{i}.{linear}" for i in range(2) for linear in LINEARS]


def check(word, group, out, dense, modules):
    """Every module is quantized, from what it is in a dense result."""
    found, full = stored(out), stored(dense)
    for module in modules:
        weight = full.pop(f"{module}.weight")
        codes, scales, *_ = oracle.quantized(weight, word, group or weight.shape[1])
        made, of = oracle.stored(found, module, word)
        np.testing.assert_array_equal(of, scales.reshape(of.shape))
        np.testing.assert_array_equal(made, codes.reshape(made.shape))
        for name in ("weight", "weight_scale", "weight_shape", "weight_packed"):
            found.pop(f"{module}.{name}", None)
    assert found.keys() == full.keys()
    for name, tensor in full.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", "auto"), ("fp32_tied", "float16"), ("nf4_dq", "auto"), ("int8", "bfloat16")]
)
@pytest.mark.parametrize("word", WORDS)
def test_all_linear_layers_become_what_the_dense_result_makes(word, kind, dtype, base, adapter, tmp_path):
    """Of bases in full precision and quantized; also those that the adapter leaves alone."""
    ckpt, lora = base(kind), adapter(kind, target_modules=["q_proj", "down_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "dense", dtype=dtype)
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "out", dtype=dtype, format=word, max_shard_size="40KB")
    group = 32 if word == "w4a16" else WORDS[word][1]  # 64 and 96 columns
    check(word, group, tmp_path / "out", tmp_path / "dense", MODULES)
    entry = receipt["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    assert set(entry["stored"]) <= stored(tmp_path / "out").keys()
    assert lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])["weights"]


def test_figures_are_those_of_what_a_reader_decodes(base, adapter, tmp_path):
    ckpt, lora = base("bf16"), adapter("bf16", target_modules=["q_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "sums", dtype="float32")
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "out", format="w4a16")
    sums, was = stored(tmp_path / "sums"), stored(ckpt)
    merged = [name for name, entry in receipt["tensors"].items() if entry["action"] == "merged"]
    assert len(merged) == 2
    for name in merged:
        v, w = sums[name].double().numpy().ravel(), was[name].double().numpy().ravel()
        _, _, s, n_clipped = oracle.quantized(sums[name].bfloat16(), "w4a16", 32)
        s, entry = s.ravel(), receipt["tensors"][name]
        assert entry["kept"] == pytest.approx((s - w) @ (v - w) / ((v - w) @ (v - w)), rel=1e-4)
        assert entry["noise"] == pytest.approx(np.linalg.norm(s - v) / np.linalg.norm(v - w), rel=1e-4)
        assert entry["changed"] == pytest.approx((s != w).mean())
        assert entry["clipped"] == pytest.approx(n_clipped / s.size) and n_clipped


@pytest.mark.parametrize("word", WORDS)
def test_bytes_do_not_depend_on_tiles(word, base, adapter, tmp_path, monkeypatch):
    ckpt, lora = base("nf4_dq"), adapter("nf4_dq", target_modules=["q_proj", "down_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "one", format=word)
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 200)
    monkeypatch.setattr("lorafuse.arithmetic.symmetric.CHUNK_NUMEL", 64)
    lorafuse.convert(ckpt, lora, tmp_path / "many", format=word)
    one, many = (next((tmp_path / d).glob("*.safetensors")).read_bytes() for d in ("one", "many"))
    assert one == many


@pytest.mark.parametrize("word", WORDS)
def test_a_result_is_a_base(word, base, adapter, tmp_path):
    """It decodes to its codes times its scales, and can be quantized again."""
    lora = adapter("bf16", target_modules=["q_proj"])
    lorafuse.convert(base("bf16"), lora, tmp_path / "light", format=word)
    lorafuse.convert(tmp_path / "light", lora, tmp_path / "dense", adapter_scale=0.0)
    light, dense = stored(tmp_path / "light"), stored(tmp_path / "dense")
    for module in MODULES:
        codes, scales = oracle.stored(light, module, word)
        values = oracle.rounded(
            codes * scales.repeat(codes.shape[1] // scales.shape[1], axis=1), torch.bfloat16
        )
        np.testing.assert_array_equal(dense[f"{module}.weight"].double().numpy(), values)
    lorafuse.convert(tmp_path / "light", lora, tmp_path / "again", format="w8a16")
    lorafuse.convert(tmp_path / "light", lora, tmp_path / "sum")
    check("w8a16", 32, tmp_path / "again", tmp_path / "sum", MODULES)
