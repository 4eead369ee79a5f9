"""HQQ, against a packer and a decoder that are written here from the format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import extreme
from quantized_base import (
    DTYPES,
    MODULE,
    check_decoding,
    check_merging,
    dtypes,
    refusal,
    refusal_of_format,
    write,
)

import lorafuse
from lorafuse.arithmetic import units

WEIGHT = f"{MODULE}.weight"
PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
N_CODES = {"8bit_u8": 1, "4bit_u8": 2, "2bit_u8": 4, "1bit_u8": 8, "3bit_32": 10}
WIDTH = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1, "3bit_32": 3}


def quantization(bits=4, group_size=16):
    params = {"nbits": bits, "group_size": group_size, "axis": 1}
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}


def packed(matrix, packing):
    """Rows of units: row i holds rows i, i + step, … of a matrix of codes."""
    n_codes, width = N_CODES[packing], WIDTH[packing]
    step = -(-len(matrix) // n_codes)
    units = torch.zeros(step, matrix.shape[1], dtype=torch.int64)
    for row in range(len(matrix)):
        units[row % step] |= matrix[row] << (width * (n_codes - 1 - row // step))
    return units.to(torch.int32 if packing == "3bit_32" else torch.uint8)


def text(word):
    return torch.tensor(list(word.encode()), dtype=torch.uint8)


def module(shape, bits, group_size, axis, dtype=torch.float16, size="ordinary", name=MODULE):
    """(stored tensors of a random weight, its values in float64 of the dtype it is computed in)."""
    numel, packing = shape[0] * shape[1], PACKINGS[bits]
    groups = (numel // group_size, group_size) if axis == 1 else (group_size, numel // group_size)
    codes = torch.randint(0, 1 << bits, groups)
    grid = (groups[0], 1) if axis == 1 else (1, groups[1])
    scales = extreme(grid, dtype, size)
    zeros = (torch.rand(grid) * (1 << bits)).to(dtype)
    values = ((codes - zeros.double()).to(dtype).double() * scales.double()).to(dtype).reshape(shape)
    dtype_word = str(dtype)
    stored = {
        "W_q": packed(codes, packing),
        "scale": scales,
        "zero": zeros,
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "group_size": torch.tensor(group_size, dtype=torch.int32),
        "shape": torch.tensor(shape),
        "packing": text(packing),
        "compute_dtype": text(dtype_word),
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
        "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
    }
    return {f"{name}.{part}": tensor for part, tensor in stored.items()}, values


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_decoding(data):
    """All bits, both axes, groups that end inside a row, groups of one, chunks of one element and of all."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bits, axis = data.draw(st.sampled_from(sorted(PACKINGS))), data.draw(st.sampled_from([0, 1]))
    # Units of 8 bits are full.
    n_codes = 1 if bits == 3 else N_CODES[PACKINGS[bits]]
    group_size = data.draw(st.sampled_from([1, 3, 8])) * (n_codes if axis == 0 else 1)
    shape = data.draw(st.integers(1, 5)) * n_codes, data.draw(st.integers(1, 4)) * group_size
    dtype, made = DTYPES[data.draw(dtypes)], data.draw(dtypes)
    size = data.draw(st.sampled_from(["ordinary", "tiny", "huge"]))
    stored, values = module(shape, bits, group_size, axis, dtype, size)
    before, units.CHUNK_NUMEL = units.CHUNK_NUMEL, data.draw(st.sampled_from([1, 7, 1 << 17]))
    try:
        check_decoding(stored, quantization(bits), values.to(DTYPES[made]), dtype=made)
    finally:
        units.CHUNK_NUMEL = before


def test_codes_that_are_viewed_as_floats():
    """view_as_float: the same bytes under another dtype."""
    stored, values = module((16, 32), 4, 16, 1)
    stored[f"{MODULE}.W_q"] = stored[f"{MODULE}.W_q"].view(torch.bfloat16)
    check_decoding(stored, quantization(), values, dtype="float16")


def test_dtype_without_a_config():
    """That of the computation."""
    stored, values = module((16, 32), 4, 16, 1, torch.float16)
    check_decoding(stored, quantization(), values, dtype=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged(dtype, tmp_path):
    stored, expected = {}, {f"{MODULE}.bias": torch.randn(16).to(DTYPES[dtype])}
    stored |= expected
    for name, shape, axis in ((MODULE, (16, 32), 0), ("model.layers.0.mlp.down_proj", (32, 16), 1)):
        tensors, values = module(shape, 4, 16, axis, name=name)
        stored |= tensors
        expected[f"{name}.weight"] = values.to(DTYPES[dtype])
    receipt = check_merging(tmp_path, stored, quantization(), expected, dtype=dtype)
    assert receipt["base_semantics"] == "stored in HQQ, 4 bit, block size 16"


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


DAMAGED = {
    "no codes": ({"W_q": None}, f"{MODULE}.packing"),
    "no scales": ({"scale": None}, f"{MODULE}.W_q"),
    "no shape": ({"shape": None}, f"{MODULE}.W_q"),
    "codes cut short": ({"W_q": torch.zeros(15, 16, dtype=torch.uint8)}, f"{MODULE}.W_q U8 [15, 16]"),
    "scales of another shape": ({"scale": torch.zeros(31, 1).half()}, f"{MODULE}.scale F16 [31, 1]"),
    "scales of another dtype": ({"scale": torch.zeros(32, 1)}, f"{MODULE}.scale F32 [32, 1]"),
    "zeros of another shape": ({"zero": torch.zeros(1, 1).half()}, f"{MODULE}.zero F16 [1, 1]"),
    "no groups": (
        {"zero": torch.zeros(0, 1).half(), "scale": torch.zeros(0, 1).half()},
        f"{MODULE}.scale F16 [0, 1]",
    ),
    "groups that do not divide": (
        {"zero": torch.zeros(31, 1).half(), "scale": torch.zeros(31, 1).half()},
        f"{MODULE}.scale F16 [31, 1]",
    ),
    "another shape": ({"shape": torch.tensor([16, 31])}, "do not make F16 [16, 31] of 4 bit"),
    "a shape below zero": ({"shape": torch.tensor([-16, -32])}, "shape [-16, -32] are not those of a matrix"),
    "a shape of three": (
        {"shape": torch.tensor([1, 16, 32])},
        f"{MODULE}.shape is I64 [3]; expected 2 whole",
    ),
    "a shape in halves": ({"shape": torch.zeros(2).half()}, f"{MODULE}.shape is F16 [2]; expected 2 whole"),
    "a long shape": ({"shape": torch.zeros(99).long()}, f"{MODULE}.shape is I64 [99]; expected"),
    "bits that do not fit": ({"nbits": i32(8)}, "nbits 8, axis 1, shape [16, 32] are not those"),
    "another axis": ({"axis": i32(2)}, "nbits 4, axis 2, shape [16, 32] are not those"),
    "another packing": ({"packing": text("9bit_u8")}, "packing b'9bit_u8' in b'torch.float16' is not read"),
    "another dtype": ({"compute_dtype": text("torch.int8")}, "in b'torch.int8' is not read"),
    "no text": ({"packing": text("")}, f"{MODULE}.packing is U8 [0]; expected a number, or a word."),
    "a long text": ({"packing": text("x" * 99)}, f"{MODULE}.packing is U8 [99]; expected"),
    "quantized scales": ({"quant_scale": i32(1)}, f"{MODULE}.quant_scale: its scales or zero points are"),
    "quantized zeros": ({"quant_zero": i32(1)}, f"{MODULE}.quant_zero: its scales or zero points are"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("section", [quantization(), {}])
def test_damaged(case, section):
    changes, expected = DAMAGED[case]
    stored = module((16, 32), 4, 16, 1)[0]
    stored |= {f"{MODULE}.{name}": tensor for name, tensor in changes.items()}
    said = refusal({name: tensor for name, tensor in stored.items() if tensor is not None}, section)
    assert expected in said and MODULE in said


@pytest.mark.parametrize(("bits", "shape"), [(1, (16, 32)), (3, (20, 32)), (4, (16, 32)), (6, (16, 32))])
def test_inspected_by_its_headers(bits, shape, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.inspection.checkpoint.open_weights", lambda ckpt: {})
    stored, values = module(shape, bits, 32, 1)
    (row,) = lorafuse.inspect(write(tmp_path / "ckpt", stored, quantization(bits, 32)))["storage"]
    assert (row["scheme"], row["bits"]) == (f"HQQ, {bits} bit, block size 32", bits)
    assert row["n_parameters"] == values.numel()


@pytest.mark.parametrize("form", ["base", "light", "mixed", "nf4"])
def test_no_light_format(form, tmp_path):
    """What is said is the reason, and a way out that there is."""

    def make(name):
        return module((16, 32), 4, 16, 1, name=name)

    said = refusal_of_format(tmp_path, form, make, quantization())
    assert said == {
        "nf4": f"Error: {tmp_path}/ckpt: is quantized already, and --format nf4 would quantize it again: "
        "leave --format out.\n",
        "mixed": "Error: A checkpoint in hqq that is dense in part cannot be described in config.json by "
        "this version: leave --format out.\n",
    }.get(
        form,
        f"Error: --format {form}: {WEIGHT} is stored in HQQ, 4 bit, block size 16, whose codes this "
        "version does not write anew: leave --format out.\n",
    )
