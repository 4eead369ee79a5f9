"""The formats of compressed-tensors against compressed-tensors itself: `make oracle`."""

import json

import pytest
import torch
from hypothesis import given, settings
from quantized_base import decoded
from safetensors.torch import load_file
from symmetric_tiles import WORDS, encoded, weights

import lorafuse

pytestmark = pytest.mark.oracle


def by_the_library(dense, target, like):
    """Quantize a dense checkpoint by the scheme of the result `like`, as llm-compressor does without data:
    scales come from the smallest and the largest value of each group."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    [scheme] = json.loads((like / "config.json").read_text())["quantization_config"]["config_groups"].values()
    config = QuantizationConfig(
        config_groups={"group_0": {k: v for k, v in scheme.items() if k != "format"}},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.INITIALIZED,
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is not None:
            weight = module.weight.data
            groups = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data = scale
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(target)


def same(a, b):
    bits = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)


def relative(found, expected):
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@given(weights())
@settings(max_examples=300, deadline=None)
def test_bytes_of_extreme_weights_are_those_of_the_library(case):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    values, dtype, word, group, cuts = case
    weight, levels = values.to(dtype), WORDS[word][0]
    args = QuantizationArgs(
        num_bits=levels.bits,
        type="int" if levels.whole else "float",
        strategy="group" if levels.whole else "channel",
        group_size=group if levels.whole else None,
    )
    groups = weight.unflatten(-1, (-1, group))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    layout = "pack-quantized" if levels.whole else "float-quantized"
    expected = BaseCompressor.get_value_from_registry(layout).compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero},
        QuantizationScheme(targets=["Linear"], weights=args),
    )
    found, _, _ = encoded(weight, values, word, group, cuts)
    assert found.keys() == {f"m.{name}" for name in expected}
    for name, tensor in expected.items():
        assert same(found[f"m.{name}"], tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("word", WORDS)
def test_bytes_are_those_of_the_library(word, dtype, base, adapter, tmp_path):
    """Also what config.json says, but for the list of what is dense, which is longer."""
    lora = adapter("bf16", target_modules=["q_proj", "down_proj"])
    lorafuse.convert(base("bf16"), lora, tmp_path / "dense", dtype=dtype)
    lorafuse.convert(base("bf16"), lora, tmp_path / "out", format=word, dtype=dtype)
    by_the_library(tmp_path / "dense", tmp_path / "library", tmp_path / "out")
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "library")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(found[name], tensor), name
    config, theirs = (
        json.loads((tmp_path / d / "config.json").read_text())["quantization_config"]
        for d in ("out", "library")
    )
    assert set(theirs["ignore"]) <= set(config["ignore"])
    assert config | {"ignore": None} == theirs | {"ignore": None}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("kind", ["bf16_tied", "nf4_dq"])
def test_transformers_loads_it_and_it_generates(word, kind, base, adapter, tmp_path):
    """Its logits are near those of the dense result, also with weights that are decoded on loading."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    lora = adapter(kind, target_modules=["q_proj", "v_proj"])
    lorafuse.convert(base(kind), lora, tmp_path / "dense")
    lorafuse.convert(base(kind), lora, tmp_path / "out", format=word, keep_dense=["*.1.*.v_proj"])
    ids = torch.arange(3, 40)[None]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(ids).logits
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 40)
    limit = 0.3 if word == "w4a16" else 0.08
    assert 0 < relative(model(ids).logits, dense) < limit
    dequantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert float((dequantized(ids).logits.float() - dense).norm() / dense.norm()) < (
        0.3 if word == "w4a16" else 0.08
    )


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("form", ["base", "mixed"])
def test_transformers_loads_light_results_of_such_a_base(word, form, base, adapter, tmp_path):
    """Layer by layer what is stored: what changed is dense with `mixed`, all else quantized."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    first, lora = (adapter("bf16", target_modules=[name, "down_proj"]) for name in ("v_proj", "q_proj"))
    lorafuse.convert(base("bf16"), first, tmp_path / "ckpt", format=word)
    lorafuse.convert(tmp_path / "ckpt", lora, tmp_path / "out", format=form)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype="auto",
        output_loading_info=True,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    assert not any(info.values()), info
    found, modules = stored(tmp_path / "out"), dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if name.endswith("_proj")}
    assert len(layers) > 10
    for name, module in layers.items():
        is_dense = f"{name}.weight_scale" not in found
        assert is_dense == (form == "mixed" and name.endswith(("q_proj", "down_proj"))), name
        assert torch.equal(module.weight, decoded(tmp_path / "out", f"{name}.weight")), name
