"""The compiled kernel decodes rows of codes as torch does, bit for bit, at every level, also turned."""

import pytest
import torch
from compiled_kernel import arena_of, at_every_level
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.arithmetic import compiled_rows
from lorafuse.arithmetic.coded_rows import decode_rows, decode_turned
from lorafuse.arithmetic.codes import (
    Numbers,
    e2m1_codes,
    e2m3_codes,
    float8_codes,
    int8_codes,
    packed_codes,
)

STRANGE = torch.tensor([0.0, -0.0, 1e-42, -1e-38, 6e-5, 3e38, -7e4, float("inf"), float("nan")])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ("e2m1", "e2m3", "e4m3", "e5m2", "int8", *range(2, 9), "padded 3", "padded 4", "padded 5")


@pytest.fixture(scope="module")
def kernels(kernel_path):
    return at_every_level(kernel_path)


def codes_of(kind, n_cols):
    if isinstance(kind, int):
        return packed_codes(n_cols, kind)
    if kind.startswith("padded"):
        return packed_codes(n_cols, int(kind[-1]), padded=True)
    if kind in ("e4m3", "e5m2"):
        return float8_codes(n_cols, torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2)
    return {"e2m1": e2m1_codes, "e2m3": e2m3_codes, "int8": int8_codes}[kind](n_cols)


def same_bits(a, b):
    bits = torch.int16 if a.dtype != torch.float32 else torch.int32
    return torch.equal(a.view(bits), b.view(bits))


def numbers_of(n_rows, n_cols, width, strange, how, order, generator):
    shape = n_rows, -(-n_cols // width)
    made = []
    for size in (0.01, 5.0):
        numbers = size * torch.randn(shape, generator=generator)
        some = STRANGE[torch.randint(len(STRANGE), shape, generator=generator)]
        made.append(torch.where(torch.rand(shape, generator=generator) < strange, some, numbers))
    group_of = torch.randint(shape[1], (n_cols,), generator=generator) if order else width
    return Numbers(made[0], None if how == "scaled" else made[1], group_of, how == "biased")


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    n_rows=st.sampled_from([1, 3, 31, 33, 65]),
    n_cols=st.sampled_from([4, 28, 120, 132, 480, 516, 1000]),
    width=st.sampled_from([1, 3, 16, 32, 100, 128, 2000]),
    strange=st.sampled_from([0.0, 0.0, 0.02]),
    how=st.sampled_from(["scaled", "zeros", "biased", "order", "order and zeros"]),
    dtype=st.sampled_from(DTYPES),
    via=st.sampled_from([None, *DTYPES[:2]]),
    skip=st.sampled_from([None, 0, 1, 3]),
)
def test_decoded(kernels, seed, kind, n_rows, n_cols, width, strange, how, dtype, via, skip):
    generator = torch.Generator().manual_seed(seed)
    codes = codes_of(kind, n_cols)
    order, how = how.startswith("order"), "zeros" if how == "order and zeros" else how
    how = "scaled" if how == "order" else how
    if how == "biased" and kind in ("e4m3", "e5m2"):  # biases are those of whole numbers: no code is NaN
        how = "zeros"
    numbers = numbers_of(n_rows, n_cols, width, strange, how, order, generator)
    packed = torch.randint(0, 256, (n_rows, codes.row_nbytes), dtype=torch.uint8, generator=generator)
    dtypes = [dtype] if via in (None, dtype) or how == "biased" else [via, dtype]
    made = []
    for kernel in (None, *kernels):
        arena = arena_of(kernel)
        if skip is None:
            made.append(torch.empty(n_rows, n_cols, dtype=dtype))
            decode_rows(packed, codes, numbers, dtypes, made[-1], arena)
        else:
            made.append(torch.empty(n_cols - skip, n_rows, dtype=dtype))
            decode_turned(packed, codes, n_cols, numbers, dtypes, skip, made[-1], arena)
        assert same_bits(made[-1], made[0]), str(kernel)


@pytest.mark.parametrize("skip", [None, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_does_it(kernels, kind, skip):
    """And leaves it to torch only where a value is NaN, or words are padded and turned."""
    codes = codes_of(kind, 64)
    packed = torch.ones(5, codes.row_nbytes, dtype=torch.uint8)
    values = torch.empty((5, 64) if skip is None else (64, 5), dtype=torch.bfloat16)
    left = skip == 0 and str(kind).startswith("padded")
    for kernel in kernels:
        for scale in (1.0, float("nan")):
            numbers = Numbers(torch.full((5, 2), scale), None, 32)
            found = compiled_rows.decode_rows(kernel, packed, codes, numbers, [values.dtype], values, skip)
            assert found == (scale == 1.0 and not left)
