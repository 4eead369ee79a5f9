"""AQLM, against a decoder that is written here from the format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import SIZES, extreme
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
from lorafuse.arithmetic import vectors

WEIGHT = f"{MODULE}.weight"
QUANTIZATION = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 1}
I8, I16, I32 = torch.int8, torch.int16, torch.int32


def module(grid, group, n_books, bits, codes=I8, dtype=torch.float16, size="ordinary", name=MODULE):
    """(stored tensors of a random weight, its values in the dtype of the codebooks). `grid`: groups down and
    across, of `group` elements down and across."""
    numbers = torch.randint(0, 1 << bits, (*grid, n_books))
    books = torch.randn(n_books, 1 << bits, *group).to(dtype)
    scales = extreme((grid[0], 1, 1, 1), dtype, size)
    values = torch.empty(grid[0] * group[0], grid[1] * group[1], dtype=dtype)
    for down in range(grid[0]):
        for across in range(grid[1]):
            total = torch.zeros(group)
            for book in range(n_books):
                total += books[book, numbers[down, across, book]].float()
            rows = slice(down * group[0], (down + 1) * group[0])
            columns = slice(across * group[1], (across + 1) * group[1])
            values[rows, columns] = (total.to(dtype).double() * scales[down].double()).to(dtype)
    stored = {f"{name}.codes": numbers.to(codes), f"{name}.codebooks": books, f"{name}.scales": scales}
    return stored, values


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_decoding(data):
    """Any group, tiles that begin inside it, several codebooks, codes that are stored as negative ones."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    grid, group = ((data.draw(st.integers(1, n)), data.draw(st.integers(1, 4))) for n in (6, 4))
    n_books = data.draw(st.integers(1, 3))
    codes, bits = data.draw(st.sampled_from([(I8, 8), (I8, 3), (I16, 10), (I16, 16), (I32, 5)]))
    dtype, made, size = DTYPES[data.draw(dtypes)], data.draw(dtypes), data.draw(st.sampled_from(SIZES))
    stored, values = module(grid, group, n_books, bits, codes, dtype, size)
    before, vectors.CHUNK_NUMEL = vectors.CHUNK_NUMEL, data.draw(st.sampled_from([1, 20, 1 << 17]))
    try:
        check_decoding(stored, QUANTIZATION, values.to(DTYPES[made]), dtype=made)
    finally:
        vectors.CHUNK_NUMEL = before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged(dtype, tmp_path):
    stored, expected = {}, {f"{MODULE}.bias": torch.randn(16).to(DTYPES[dtype])}
    stored |= expected
    for name, grid in ((MODULE, (16, 4)), ("model.layers.0.mlp.down_proj", (32, 2))):
        tensors, values = module(grid, (1, 8), 2, 8, name=name)
        stored |= tensors
        expected[f"{name}.weight"] = values.to(DTYPES[dtype])
    receipt = check_merging(tmp_path, stored, QUANTIZATION, expected, dtype=dtype)
    assert receipt["base_semantics"] == "stored in AQLM, 2 × 8 bit for 8 elements"


def test_dtype_without_a_config():
    """That of the codebooks."""
    stored, values = module((4, 4), (1, 8), 1, 8)
    check_decoding(stored, QUANTIZATION, values, dtype=None)


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


DAMAGED = {
    "no codes": ({"codes": None}, f"{MODULE}.scales"),
    "no codebooks": ({"codebooks": None}, f"{MODULE}.scales"),
    "no scales": ({"scales": None}, f"{MODULE}.codes"),
    "codes of another dtype": ({"codes": half(4, 4, 1)}, f"{MODULE}.codes"),
    "codes of another shape": ({"codes": torch.zeros(4, 4, dtype=I8)}, f"{MODULE}.codes I8 [4, 4]"),
    "codes for more codebooks": ({"codes": torch.zeros(4, 4, 2, dtype=I8)}, f"{MODULE}.codes I8 [4, 4, 2]"),
    "no rows": (
        {"codes": torch.zeros(0, 4, 1, dtype=I8), "scales": half(0, 1, 1, 1)},
        f"{MODULE}.codes I8 [0, 4, 1]",
    ),
    "codebooks of another shape": ({"codebooks": half(256, 1, 8)}, f"{MODULE}.codebooks F16 [256, 1, 8]"),
    "codebooks of another length": (
        {"codebooks": half(1, 200, 1, 8)},
        f"{MODULE}.codebooks F16 [1, 200, 1, 8]",
    ),
    "codebooks of another dtype": (
        {"codebooks": half(1, 256, 1, 8).to(I8)},
        f"{MODULE}.codebooks I8 [1, 256, 1, 8]",
    ),
    "scales of another shape": ({"scales": half(4, 1)}, f"{MODULE}.scales F16 [4, 1]"),
    "scales of another dtype": ({"scales": torch.ones(4, 1, 1, 1)}, f"{MODULE}.scales F32 [4, 1, 1, 1]"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case):
    changes, text = DAMAGED[case]
    stored = module((4, 4), (1, 8), 1, 8)[0]
    stored |= {f"{MODULE}.{name}": tensor for name, tensor in changes.items()}
    assert text in refusal(
        {name: tensor for name, tensor in stored.items() if tensor is not None}, QUANTIZATION
    )


@pytest.mark.parametrize(("n_books", "codes"), [(1, I16), (3, I8)])
def test_inspected_by_its_headers(n_books, codes, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.inspection.checkpoint.open_weights", lambda ckpt: {})
    stored, values = module((4, 4), (1, 8), n_books, 8, codes)
    (row,) = lorafuse.inspect(write(tmp_path / "ckpt", stored, QUANTIZATION))["storage"]
    assert row["scheme"] == f"AQLM, {n_books} × 8 bit for 8 elements"
    assert row["n_parameters"] == values.numel()


@pytest.mark.parametrize("form", ["base", "light"])
def test_codes_are_not_written_anew(form, tmp_path):
    """What is said is the reason, and a way out that there is."""

    def make(name):
        return module((16, 4), (1, 8), 1, 8, name=name)

    said = refusal_of_format(tmp_path, form, make, QUANTIZATION)
    assert said == (
        f"Error: --format {form}: {WEIGHT} is stored in AQLM, 1 × 8 bit for 8 elements, whose codes this "
        "version does not write anew: --format mixed leaves what changes dense.\n"
    )
