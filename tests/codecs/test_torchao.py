"""torchao's safetensors, against stored tensors and a decoder that are written here from the format."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import SIZES, extreme
from quantized_base import DTYPES, MODULE, check_decoding, check_merging, dtypes, refusal, write
from small_floats import E2M1, E4M3, of_codes

import lorafuse

WEIGHT = f"{MODULE}.weight"
QUANTIZATION = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
F8 = torch.float8_e4m3fn


def metadata(kind, dtype=torch.bfloat16, *names, field="dtype", **attributes):
    """What the header says of weights of one class."""
    name = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
    text = json.dumps({"_type": kind, "_data": {**attributes, field: name}, "_tensor_data_names": []})
    weights = names or (WEIGHT,)
    return {"format": "pt", "tensor_names": json.dumps([*weights])} | dict.fromkeys(weights, text)


def parts(name=MODULE, **tensors):
    return {f"{name}._weight_{part}": tensor for part, tensor in tensors.items()}


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def spread(numbers, height, width):
    return numbers.double().repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)


def integers(n_rows, n_groups, width, dtype, scales, *, zeros):
    """(stored parts, values)."""
    codes = torch.randint(-128, 128, (n_rows, n_groups * width), dtype=torch.int8)
    zero = torch.randint(-128, 128, (n_rows, n_groups), dtype=torch.int8) * int(zeros)
    differences = codes.double() - spread(zero, 1, width)
    # A product in fp32 where one of its dtypes is wider than 16 bits, or they are of two kinds.
    products = (differences * spread(scales, 1, width)).to(torch.promote_types(dtype, scales.dtype))
    stored = parts(qdata=codes, scale=scales, **({"zero_point": zero} if zeros else {}))
    return stored, products.to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_integers(data):
    """Groups of any width, with and without zero points, any dtype of scales and weight, extreme scales."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    n_rows, n_groups, width = (data.draw(st.integers(1, 9)) for _ in range(3))
    dtype, of_scales = DTYPES[data.draw(dtypes)], DTYPES[data.draw(dtypes)]
    scales = extreme((n_rows, n_groups), of_scales, data.draw(st.sampled_from(SIZES)))
    stored, expected = integers(n_rows, n_groups, width, dtype, scales, zeros=data.draw(st.booleans()))
    kind = data.draw(st.sampled_from(["Int8Tensor", "IntxUnpackedToInt8Tensor"]))
    check_decoding(stored, QUANTIZATION, expected, metadata=metadata(kind, dtype))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_float8(data):
    """A scale for each row, for all, or for each block."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    grid = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    codes = random_bytes(grid[0] * height, grid[1] * width)
    dtype = DTYPES[data.draw(dtypes)]
    scales = extreme(grid, torch.float32, data.draw(st.sampled_from(SIZES)))
    products = (of_codes(E4M3, codes) * spread(scales, height, width)).float()
    stored = parts(qdata=codes.view(F8), scale=scales)
    check_decoding(stored, QUANTIZATION, products.to(dtype), metadata=metadata("Float8Tensor", dtype))


def swizzled(scales):
    """uint8, as cuBLAS wants it: tiles of 128 rows and 4 columns, padded."""
    n_rows, n_cols = scales.shape
    down, across = -(-n_rows // 128), -(-n_cols // 4)
    flat = torch.zeros(down * across * 512, dtype=torch.uint8)
    for r in range(n_rows):
        for c in range(n_cols):
            tile = (r // 128 * across + c // 4) * 512
            flat[tile + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales[r, c]
    return flat.view(down * 32, across * 16)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("factor", [None, 3.7e-5])
@pytest.mark.parametrize("shape", [(1, 32), (130, 160), (300, 64)])
def test_nvfp4(plain, factor, shape):
    """Scales as they are, or swizzled, with one for all or without."""
    packed, scales = random_bytes(shape[0], shape[1] // 2), random_bytes(shape[0], shape[1] // 16) & 0x7E
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(shape)
    whole = {} if factor is None else {"per_tensor_scale": torch.tensor(factor)}
    of_blocks = of_codes(E4M3, scales).float() * (1 if factor is None else torch.tensor(factor))
    expected = (of_codes(E2M1, codes) * spread(of_blocks, 1, 16)).float().bfloat16()
    stored = parts(qdata=packed, scale=(scales if plain else swizzled(scales)).view(F8), **whole)
    told = metadata("NVFP4Tensor", field="orig_dtype", is_swizzled_scales=not plain)
    check_decoding(stored, QUANTIZATION, expected, metadata=told)


def test_merged(tmp_path):
    """A scale of activations is dropped, with the reason."""
    names = (MODULE, "model.layers.0.mlp.down_proj")
    stored, expected = {}, {}
    for name in names:
        tensors, values = integers(16, 2, 16, torch.bfloat16, torch.rand(16, 2) * 0.01, zeros=True)
        stored |= {part.replace(MODULE, name): tensor for part, tensor in tensors.items()}
        expected[f"{name}.weight"] = values
    stored |= parts(act_per_tensor_scale=torch.tensor(1.0))
    told = metadata("Int8Tensor", torch.bfloat16, *expected)
    receipt = check_merging(tmp_path, stored, QUANTIZATION, expected, metadata=told)
    assert receipt["base_semantics"] == "stored in torchao, int8, block size 16"
    reason = "a scale of activations, which the dense model does not quantize"
    assert receipt["dropped"] == {f"{MODULE}._weight_act_per_tensor_scale": reason}


def test_other_parameters(tmp_path):
    """A parameter that is not called weight, and a module without a name."""
    for name, stored_as in (("model.experts.gate_up", "model.experts._gate_up_"), ("weight", "_weight_")):
        stored, expected = integers(4, 1, 8, torch.bfloat16, torch.rand(4, 1), zeros=False)
        stored = {part.replace(f"{MODULE}._weight_", stored_as): tensor for part, tensor in stored.items()}
        told = metadata("Int8Tensor", torch.bfloat16, name)
        check_decoding(stored, QUANTIZATION, expected, name, metadata=told)


INT8 = metadata("Int8Tensor")
CODES = torch.zeros(8, 32, dtype=torch.int8)
NVFP4 = {"qdata": torch.zeros(8, 16, dtype=torch.uint8), "scale": torch.zeros(8, 2).to(F8)}
DAMAGED = {
    "no codes": ({"qdata": None}, INT8, f"{MODULE}._weight_scale"),
    "no scales": ({"scale": None}, INT8, f"{MODULE}._weight_qdata"),
    "codes of another dtype": ({"qdata": CODES.int()}, INT8, f"{MODULE}._weight_qdata"),
    "codes of another class": ({"qdata": CODES.to(F8)}, INT8, "are not the parts of torchao's Int8Tensor."),
    "a vector": ({"qdata": CODES[0]}, INT8, "are not the parts of torchao's Int8Tensor."),
    "no rows": ({"qdata": CODES[:0], "scale": torch.zeros(0, 1)}, INT8, "are not the parts of torchao's"),
    "scales of another shape": ({"scale": torch.ones(7, 1)}, INT8, f"{MODULE}._weight_scale F32 [7, 1]"),
    "scales of another dtype": ({"scale": torch.ones(8, 1).int()}, INT8, f"{MODULE}._weight_scale I32"),
    "zeros of another shape": (
        {"zero_point": CODES[:, :2].contiguous()},
        INT8,
        f"{MODULE}._weight_zero_point I8 [8, 2]",
    ),
    "zeros of another dtype": ({"zero_point": torch.zeros(8, 1)}, INT8, f"{MODULE}._weight_zero_point F32"),
    "zeros of FP8": (
        {"qdata": CODES.to(F8), "zero_point": CODES[:, :1].contiguous()},
        metadata("Float8Tensor"),
        "are not the parts of torchao's Float8Tensor.",
    ),
    "scales of NVFP4": (
        NVFP4 | {"scale": torch.zeros(8, 3).to(F8)},
        metadata("NVFP4Tensor"),
        "are not the parts of torchao's NVFP4Tensor.",
    ),
    "a factor of NVFP4": (
        NVFP4 | {"per_tensor_scale": torch.zeros(2)},
        metadata("NVFP4Tensor"),
        f"{MODULE}._weight_per_tensor_scale F32 [2] are not the parts",
    ),
    "scaled activations": (
        {"act_pre_scale": torch.ones(32)},
        INT8,
        "_weight_act_pre_scale scales activation",
    ),
    "no metadata": ({}, {"format": "pt"}, f"{WEIGHT}: the header's metadata has nothing about it"),
    "broken metadata": ({}, {WEIGHT: "{"}, f"{WEIGHT}: the header's metadata about it is broken: {{."),
    "metadata of another form": ({}, {WEIGHT: '{"_type": "Int8Tensor", "_data": []}'}, "about it is broken"),
    "another class": ({}, metadata("Int4Tensor"), f"{WEIGHT}: torchao's Int4Tensor of BF16 is not read"),
    "another dtype": ({}, metadata("Int8Tensor", torch.int32), "torchao's Int8Tensor of I32 is not read"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("section", [QUANTIZATION, {}])
def test_damaged(case, section):
    changes, told, text = DAMAGED[case]
    stored = parts(**({"qdata": CODES, "scale": torch.ones(8, 1)} | changes))
    present = {name: tensor for name, tensor in stored.items() if tensor is not None}
    if list(present) == [f"{MODULE}._weight_scale"] and not section:
        return  # nothing is quantized then, by all that is said
    assert text in refusal(present, section, metadata=told)


def test_inspected_by_its_headers(tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.inspection.checkpoint.open_weights", lambda ckpt: {})
    path = write(tmp_path / "ckpt", parts(**NVFP4), QUANTIZATION)
    (row,) = lorafuse.inspect(path)["storage"]
    assert (row["scheme"], row["n_parameters"]) == ("torchao, NVFP4, block size 16", 8 * 32)


def test_a_part_that_the_header_names_is_missing():
    """Without per_tensor_scale, NVFP4 would be another weight."""
    told = metadata("NVFP4Tensor", field="orig_dtype", is_swizzled_scales=False)
    named = json.loads(told[WEIGHT]) | {"_tensor_data_names": ["per_tensor_scale", "qdata", "scale"]}
    text = refusal(parts(**NVFP4), QUANTIZATION, metadata=told | {WEIGHT: json.dumps(named)})
    assert text == (
        f"{WEIGHT}: {MODULE}._weight_per_tensor_scale is missing, which the header's metadata names."
    )
