"""ModelOpt and FBGEMM FP8, against decoders that are written here from the formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_base import DTYPES, MODULE, check_decoding, check_merging, dtypes, refusal
from small_floats import E2M1, E4M3, E8M0, of_codes

F8 = torch.float8_e4m3fn
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
WEIGHT, SCALE, SECOND = (f"{MODULE}.weight{end}" for end in ("", "_scale", "_scale_2"))
EXPERTS = "model.layers.0.feed_forward.experts"


def random_bytes(*shape, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8)


def halves(packed):
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(len(packed), -1)


def spread(scales, shape, block):
    """Each scale at every element of its block."""
    rows = scales.double().repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def fp8_and_int8(n_rows, n_cols, strategy, integers, dtype, factor=0.01):
    """(stored tensors, values)."""
    shape, codes = (n_rows, n_cols), random_bytes(n_rows, n_cols)
    block = {"tensor": shape, "blocks": (4, 8)}.get(strategy, (1, n_cols))
    grid = (-(-n_rows // block[0]), -(-n_cols // block[1]))
    scales = (torch.rand(grid) + 0.5) * factor
    told = {"tensor": (), "row": (n_rows,), "column": (n_rows, 1), "blocks": (grid[0], 1, grid[1], 1)}
    weight = codes.view(torch.int8 if integers else F8)
    values = weight.double() if integers else of_codes(E4M3, codes)
    stored = {WEIGHT: weight, SCALE: scales.view(told[strategy])}
    return stored, (values * spread(scales, shape, block)).float().to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_code_for_each_byte(data):
    """FP8 and int8, a scale for each tensor, row or block; the product is rounded once."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    strategy = data.draw(st.sampled_from(["tensor", "row", "column", "blocks"]))
    n_rows, n_cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    shape = (4 * n_rows, 8 * n_cols) if strategy == "blocks" else (n_rows, n_cols)
    dtype, factor = data.draw(dtypes), data.draw(st.sampled_from([0.01, 2.0**-130, 2.0**118]))
    stored, expected = fp8_and_int8(*shape, strategy, data.draw(st.booleans()), DTYPES[dtype], factor)
    check_decoding(stored, MODELOPT, expected, dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 4),
    dtypes,
    st.sampled_from([1.0, 3e-5, 700.0]),
    st.sampled_from([(), (1,)]),
)
def test_nvfp4(n_rows, n_groups, dtype, second, shape):
    """The second scale is a factor of the first; a config need not say anything."""
    packed, scales = random_bytes(n_rows, n_groups * 8), random_bytes(n_rows, n_groups, high=127)
    factors = of_codes(E4M3, scales).float() * torch.tensor(second)
    exact = of_codes(E2M1, halves(packed)) * spread(factors, (n_rows, n_groups * 16), (1, 16))
    stored = {WEIGHT: packed, SCALE: scales.view(F8), SECOND: torch.full(shape, second)}
    for config in (MODELOPT, None):
        check_decoding(stored, config, exact.float().to(DTYPES[dtype]), dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 20),
    st.integers(1, 3),
    dtypes,
    st.booleans(),
    st.sampled_from([(0, 4), (110, 130), (240, 255)]),
)
def test_mx(n_rows, n_groups, dtype, four_bits, exponents):
    powers = torch.randint(*exponents, (n_rows, n_groups), dtype=torch.uint8)
    codes = random_bytes(n_rows, n_groups * (16 if four_bits else 32))
    values = of_codes(E2M1, halves(codes)) if four_bits else of_codes(E4M3, codes)
    exact = values * of_codes(E8M0, powers).repeat_interleave(32, dim=1)
    stored = {WEIGHT: codes if four_bits else codes.view(F8), SCALE: powers}
    check_decoding(stored, MODELOPT, exact.float().to(DTYPES[dtype]), dtype=dtype)


def test_merged(tmp_path):
    """What serves inference alone is dropped."""
    stored, expected = fp8_and_int8(12, 20, "tensor", False, torch.bfloat16)
    stored[WEIGHT] = random_bytes(12, 20, high=120).view(F8)
    expected = (of_codes(E4M3, stored[WEIGHT].view(torch.uint8)) * stored[SCALE].double()).float().bfloat16()
    down = "model.layers.0.mlp.down_proj"
    packed, scales = random_bytes(20, 8), random_bytes(20, 1, high=120)
    stored |= {
        f"{down}.weight": packed,
        f"{down}.weight_scale": scales.view(F8),
        f"{down}.weight_scale_2": torch.tensor(0.001),
    }
    factors = of_codes(E4M3, scales).float() * torch.tensor(0.001)
    four = (of_codes(E2M1, halves(packed)) * factors.double()).float().bfloat16()
    extra = {
        f"{MODULE}.input_scale": torch.ones(()),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
    }
    weights = {WEIGHT: expected, f"{down}.weight": four}
    receipt = check_merging(tmp_path, stored | extra, MODELOPT, weights)
    assert receipt["dropped"].keys() == extra.keys()
    assert receipt["base_semantics"] == "stored in ModelOpt NVFP4, block size 16"


def nvfp4():
    return {WEIGHT: random_bytes(12, 16), SCALE: random_bytes(12, 2, high=9).view(F8), SECOND: torch.ones(())}


DAMAGED = {
    "no second scale": (nvfp4, {SECOND: None}, f"{SCALE} belongs to a weight"),
    "no scale": (nvfp4, {SCALE: None}, f"{SECOND} belongs to a weight"),
    "no codes": (nvfp4, {WEIGHT: None}, f"{SECOND} belongs to a weight"),
    "too many groups": (nvfp4, {SCALE: random_bytes(12, 3).view(F8)}, f"{WEIGHT} is U8 [12, 16]; its scales"),
    "two second scales": (nvfp4, {SECOND: torch.ones(2)}, f"{WEIGHT} is U8 [12, 16]; its scales"),
    "AWQ": (nvfp4, {f"{MODULE}.pre_quant_scale": torch.ones(32)}, f"{MODULE}.pre_quant_scale belongs"),
    "BitNet": (
        lambda: {WEIGHT: random_bytes(3, 16), SCALE: torch.ones(1)},
        {},
        f"{SCALE} belongs to a weight that is quantized: bytes with scales (BitNet",
    ),
    "rows": (
        lambda: fp8_and_int8(12, 16, "row", False, torch.bfloat16)[0],
        {SCALE: torch.ones(11)},
        f"{WEIGHT} is F8_E4M3 [12, 16]; its scales {SCALE}, which is F32 [11]",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case):
    """The refusal names the tensor."""
    make, change, text = DAMAGED[case]
    present = {name: tensor for name, tensor in (make() | change).items() if tensor is not None}
    assert text in refusal(present, MODELOPT)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), dtypes)
def test_fbgemm(n_rows, n_cols, dtype):
    codes, scales = random_bytes(n_rows, n_cols), torch.rand(n_rows, 1)
    expected = (of_codes(E4M3, codes) * scales.double()).float().to(DTYPES[dtype])
    check_decoding({WEIGHT: codes.view(F8), SCALE: scales}, FBGEMM, expected, dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(2, 9), st.booleans(), st.sampled_from([FBGEMM, None])
)
def test_fbgemm_experts(n_experts, n_inputs, n_outputs, last, config):
    """In stacks of (in, out): a scale for each output, in whichever of two shapes."""
    codes, scales = random_bytes(n_experts, n_inputs, n_outputs), torch.rand(n_experts, 1, n_outputs)
    expected = (of_codes(E4M3, codes) * scales.double()).float().bfloat16()
    name = f"{EXPERTS}.down_proj"
    stored = {name: codes.view(F8), f"{name}_scale": scales.mT if last else scales}
    stored = {key: tensor.contiguous() for key, tensor in stored.items()}
    check_decoding(stored, config, expected, name)


def test_fbgemm_merged(tmp_path):
    stored, weights = {}, {}
    for module in (MODULE, "model.layers.0.mlp.down_proj"):
        codes, scales = random_bytes(12, 20, high=120), torch.rand(12, 1) * 0.01
        stored |= {f"{module}.weight": codes.view(F8), f"{module}.weight_scale": scales}
        weights[f"{module}.weight"] = (of_codes(E4M3, codes) * scales.double()).float().bfloat16()
    receipt = check_merging(tmp_path, stored, FBGEMM, weights)
    assert receipt["base_semantics"] == "stored in FBGEMM FP8, a scale for each output"


@pytest.mark.parametrize("shape", [(12,), (1, 12), (11, 1)])
def test_fbgemm_damaged(shape):
    stored = {WEIGHT: random_bytes(12, 20).view(F8), SCALE: torch.ones(shape)}
    assert f"{WEIGHT} is F8_E4M3 [12, 20], its scales {SCALE} are F32" in refusal(stored, FBGEMM)
