"""FP8 with a scale for each block or tensor, against a decoder that is written here from the format."""

import pytest
import torch
from build import write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_base import (
    DTYPES,
    MODULE,
    check_decoding,
    check_merging,
    decoded,
    dtypes,
    refusal,
    write,
)
from small_floats import E2M1, E4M3, E8M0, of_codes, same_bits

import lorafuse

F8 = torch.float8_e4m3fn
WEIGHT = f"{MODULE}.weight"


def quantization(block=(128, 128), **further):
    size = list(block) if block else None
    return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": size} | further


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def spread(scales, block, shape):
    """Each scale at every element of its block, one element after another."""
    made = torch.empty(shape, dtype=torch.float64)
    for row in range(shape[-2]):
        for col in range(shape[-1]):
            made[..., row, col] = scales[..., row // block[0], col // block[1]]
    return made


def expected_of(codes, scales, dtype, table=E4M3):
    return (of_codes(table, codes) * scales).float().to(dtype)


@st.composite
def scales(draw, grid):
    """(as they are stored, as numbers): of every dtype, and extreme ones."""
    kind = draw(st.sampled_from(["F32", "BF16", "F8_E8M0", "U8", "tiny", "huge"]))
    if kind in ("F8_E8M0", "U8"):
        stored = torch.randint(0 if draw(st.booleans()) else 100, 255, grid, dtype=torch.uint8)
        return stored if kind == "U8" else stored.view(torch.float8_e8m0fnu), of_codes(E8M0, stored)
    stored = torch.rand(grid) + 0.5
    stored *= {"tiny": 2.0**-130, "huge": 2.0**120}.get(kind, 0.01)
    stored = stored.bfloat16() if kind == "BF16" else stored
    return stored, stored.double()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks(data):
    """Any shape, ragged blocks, any dtype of scales and model, every code."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    shape = (data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)))
    block = (data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16)))
    dtype = data.draw(dtypes)
    codes, grid = random_bytes(*shape), tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    stored, numbers = data.draw(scales(grid))
    expected = expected_of(codes, spread(numbers, block, shape), DTYPES[dtype])
    tensors = {WEIGHT: codes.view(F8), f"{WEIGHT}_scale_inv": stored}
    check_decoding(tensors, quantization(block), expected, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", [f"{WEIGHT}_scale_inv", f"{MODULE}.scale", f"{MODULE}.qscale_weight"])
def test_one_scale(shape, name):
    """For the whole weight, under each of its names."""
    codes, scale = random_bytes(9, 20), torch.full(shape, 0.013)
    tensors = {WEIGHT: codes.view(F8), name: scale}
    check_decoding(tensors, quantization(None), expected_of(codes, scale.double(), torch.bfloat16))


def test_every_code():
    """Also NaN and −0, as torch decodes them."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    tensors = {WEIGHT: codes.view(F8), f"{WEIGHT}_scale_inv": torch.ones(1, 1)}
    check_decoding(tensors, quantization(), codes.view(F8).bfloat16())


@pytest.mark.parametrize("kind", [torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_other_float8(kind):
    codes = random_bytes(9, 20).view(kind)
    tensors = {WEIGHT: codes, f"{WEIGHT}_scale_inv": torch.full((1, 1), 0.5)}
    check_decoding(tensors, quantization(), (codes.float() * 0.5).bfloat16())


def test_stacks():
    """Of experts, fused: tiles may cross from one expert to the next."""
    codes, numbers = random_bytes(3, 10, 12), torch.rand(3, 3, 2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = expected_of(codes, spread(numbers.double(), (4, 8), codes.shape), torch.bfloat16)
    tensors = {name: codes.view(F8), f"{name}_scale_inv": numbers}
    check_decoding(tensors, quantization((4, 8)), expected, name)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), dtypes)
def test_fp4_experts(rows, groups, dtype):
    """Two codes in a byte, the low half first."""
    packed, exponents = (
        random_bytes(rows, groups * 16),
        torch.randint(0, 255, (rows, groups), dtype=torch.uint8),
    )
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(rows, -1)
    numbers = of_codes(E8M0, exponents).repeat_interleave(32, dim=1)
    tensors = {
        WEIGHT: packed.view(torch.int8),
        f"{MODULE}.scale": exponents.view(torch.float8_e8m0fnu),
    }
    expected = expected_of(codes, numbers, DTYPES[dtype], E2M1)
    check_decoding(tensors, quantization(expert_dtype="fp4"), expected, dtype=dtype)


def test_a_grid_that_the_config_does_not_fit(tmp_path):
    """The blocks are then those that divide the weight evenly."""
    codes, numbers = random_bytes(12, 8), torch.rand(3, 2)
    expected = expected_of(codes, spread(numbers.double(), (4, 4), (12, 8)), torch.bfloat16)
    tensors = {WEIGHT: codes.view(F8), f"{WEIGHT}_scale_inv": numbers}
    check_decoding(tensors, quantization((128, 128)), expected)


@pytest.mark.parametrize(
    ("config", "dense", "dtype"),
    [
        ({"dtype": None, "torch_dtype": "float16"}, torch.bfloat16, torch.float16),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, torch.bfloat16, torch.float16),
        ({"dtype": None}, torch.float16, torch.float16),
        ({"dtype": None}, None, torch.bfloat16),
    ],
)
def test_dtype(config, dense, dtype, tmp_path):
    """The config's, at its top or in text_config; else that of most dense weights; else bfloat16. Never that
    of scales."""
    stored = {WEIGHT: random_bytes(4, 4).view(F8), f"{WEIGHT}_scale_inv": torch.ones(1, 1)}
    if dense is not None:
        stored["model.embed_tokens.weight"] = torch.ones(8, 4, dtype=dense)
    path = write(tmp_path / "ckpt", stored, quantization(), **config)
    assert decoded(path, WEIGHT).dtype == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged(dtype, tmp_path):
    """Ragged blocks, scales of activations and of the cache, which are dropped."""
    stored, expected = {}, {}
    for name, shape in ((WEIGHT, (40, 24)), ("model.layers.0.mlp.down_proj.weight", (24, 40))):
        codes = torch.randint(0, 120, shape, dtype=torch.uint8)
        numbers = torch.rand(-(-shape[0] // 16), -(-shape[1] // 16)) * 0.01
        stored |= {name: codes.view(F8), f"{name}_scale_inv": numbers}
        expected[name] = expected_of(codes, spread(numbers.double(), (16, 16), shape), DTYPES[dtype])
    extra = {
        f"{MODULE}.input_scale": torch.ones(1),
        f"{MODULE}.activation_scale": torch.ones(()),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.v_proj.v_scale": torch.ones(1),
    }
    receipt = check_merging(tmp_path, stored | extra, quantization((16, 16)), expected, dtype=dtype)
    assert receipt["dropped"].keys() == extra.keys()
    assert receipt["base_semantics"] == "stored in FP8, a scale for each 16 × 16"


DAMAGED = {
    "grid": ({f"{WEIGHT}_scale_inv": torch.ones(2, 2)}, f"{WEIGHT} is F8_E4M3 [9, 20], its scales"),
    "one scale too few": ({f"{WEIGHT}_scale_inv": torch.ones(3)}, f"{WEIGHT} is F8_E4M3 [9, 20], its scales"),
    "dtype": ({f"{WEIGHT}_scale_inv": torch.ones(1, 1).double()}, "are F64 [1, 1]"),
    "codes gone": ({WEIGHT: None}, f"{WEIGHT}_scale_inv belongs to a weight that is quantized"),
    "codes of integers": ({WEIGHT: random_bytes(9, 20)}, f"{WEIGHT}_scale_inv belongs to a weight"),
    "scales gone": ({f"{WEIGHT}_scale_inv": None}, f"{WEIGHT} is quantized, but other parts of it"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case):
    """The refusal names the tensor."""
    change, text = DAMAGED[case]
    stored = {WEIGHT: random_bytes(9, 20).view(F8), f"{WEIGHT}_scale_inv": torch.ones(1, 1)} | change
    other = {
        f"{MODULE}2.weight": random_bytes(4, 4).view(F8),
        f"{MODULE}2.weight_scale_inv": torch.ones(1, 1),
    }
    present = {name: tensor for name, tensor in (stored | other).items() if tensor is not None}
    for config in (quantization((128, 128)), {}):
        assert text in refusal(present, config)


def test_the_judge_agrees_with_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    assert same_bits(E4M3.float(), codes.view(F8).float())
    assert same_bits(E8M0.float(), codes.view(torch.float8_e8m0fnu).float())


def test_gpt_oss_with_a_layer_for_each_expert_is_refused():
    """Its stacks are transposed, which FP8 is not read in."""
    stored = {}
    for n in range(2):
        name = f"model.layers.0.mlp.experts.down_projs.{n}.weight"
        stored |= {name: random_bytes(4, 4).view(F8), f"{name}_scale_inv": torch.ones(1, 1)}
    text = refusal(stored, quantization(), model_type="gpt_oss")
    assert "down_projs.0.weight and others, which are stored in FP8, a scale for each tensor" in text


@pytest.mark.parametrize("trained", [{"target_parameters": ["mlp.experts.down_proj"]}, {}])
def test_an_update_before_the_scale(trained, tmp_path):
    """What PEFT trains on experts that stay FP8 is no sum: a warning says that the files do not tell. A dry
    run says how much is decoded."""
    stack = "model.layers.0.mlp.experts.down_proj"
    stored = {stack: random_bytes(2, 8, 4).view(F8), f"{stack}_scale_inv": torch.ones(2, 1, 1)}
    stored["model.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4).bfloat16()
    path = write(tmp_path / "ckpt", stored, quantization())
    module, rank, n_outputs = ("mlp.experts", 4, 8) if trained else ("self_attn.q_proj", 2, 4)
    key = f"base_model.model.model.layers.0.{module}.lora"
    lora = {f"{key}_A.weight": torch.ones(rank, 4), f"{key}_B.weight": torch.ones(n_outputs, rank)}
    adapter = write_adapter(tmp_path / "adapter", lora, r=2, lora_alpha=2, target_modules=[], **trained)
    events = []
    plan = lorafuse.convert(path, adapter, tmp_path / "out", dry_run=True, on_event=events.append)
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert any("is stored in FP8. If experts stayed FP8" in text for text in warnings) == bool(trained)
    assert plan["decoded"] == {"FP8, a scale for each 128 × 128": 64}


def test_a_size_of_blocks_that_nothing_says():
    """24 rows in 2 blocks: of 12 or of 16 each. A scale for each row, or for all, tells itself."""
    codes = torch.zeros(24, 32).to(torch.float8_e4m3fn)
    stored = {f"{MODULE}.weight": codes, f"{MODULE}.weight_scale_inv": torch.ones(2, 2)}
    assert refusal(stored, None) == (
        f"{MODULE}.weight has a scale for each block, and no config says of which size: add "
        "quantization_config to config.json, with weight_block_size."
    )
    for shape in ((1, 1), (24, 1)):
        stored[f"{MODULE}.weight_scale_inv"] = torch.ones(shape)
        check_decoding(stored, None, torch.zeros(24, 32).bfloat16())
