"""The compiled kernel decodes rows of codes as torch does, at each level of the processor, and torch as their
definition says."""

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

STRANGE = torch.tensor([0.0, -0.0, 1e-42, -1e-38, 6e-8, 65504.0, 3e38, float("inf"), float("nan")])
KINDS = {
    **{f"stream {bits}": lambda n, bits=bits: packed_codes(n, bits) for bits in range(2, 9)},
    **{f"words {bits}": lambda n, bits=bits: packed_codes(n, bits, padded=True) for bits in range(2, 9)},
    **{f"unsigned {bits}": lambda n, bits=bits: packed_codes(n, bits, offset=0) for bits in (2, 3, 4, 6, 8)},
    "e2m1": e2m1_codes,
    "e2m3": e2m3_codes,
    "int8": int8_codes,
    "e4m3": lambda n: float8_codes(n, torch.float8_e4m3fn),
    "e5m2": lambda n: float8_codes(n, torch.float8_e5m2),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def kernels(kernel_path):
    return at_every_level(kernel_path)


def numbers_of(shape, size, strange, generator):
    made = size * torch.randn(shape, generator=generator)
    found = torch.rand(shape, generator=generator) < strange
    made[found] = STRANGE[torch.randint(len(STRANGE), (int(found.sum()),), generator=generator)]
    return made


def codes_by_definition(packed, codes, n_cols):
    """One bit after another."""
    rows = []
    for row in packed.tolist():
        stream = sum(byte << 8 * k for k, byte in enumerate(row))
        per_word = 32 // codes.bits
        starts = [
            i // per_word * 32 + i % per_word * codes.bits if codes.padded else i * codes.bits
            for i in range(n_cols)
        ]
        rows.append([stream >> start & ((1 << codes.bits) - 1) for start in starts])
    return torch.tensor(rows, dtype=torch.int64)


def by_definition(packed, codes, numbers, n_cols, dtypes):
    """In float64: a sum or a product of two numbers of fp32 is rounded once, or the next step rounds what is
    exact."""
    values = codes.levels[codes_by_definition(packed, codes, n_cols)].double()
    group_of = numbers.group_of
    if isinstance(group_of, int):
        group_of = torch.arange(n_cols) // group_of if numbers.scales.shape[1] > 1 else torch.zeros(n_cols)
    scales = numbers.scales.double()[:, group_of.long()]
    zeros = torch.zeros(()) if numbers.zeros is None else numbers.zeros[:, group_of.long()]
    if numbers.are_biases:
        values = (values * scales).float().to(dtypes[-1]).double() + zeros.double()
    else:
        values = (values.float() - zeros).double() * scales
    values = values.float()
    for dtype in dtypes:
        values = values.to(dtype)
    return values


def same(found, expected):
    return torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def check(kernels, decode, expected, beside, dtype, is_done, is_left=False):
    """`decode(arena, values)`; `is_done(kernel, values)`: whether the kernel decodes, which it does not of
    NaN, and need not where there is NaN `beside`, or where all `is_left` to torch."""
    shape = expected.shape
    by_torch = torch.empty(shape, dtype=dtype)
    decode(arena_of(None), by_torch)
    assert torch.equal(by_torch.isnan(), expected.isnan())
    assert torch.equal(by_torch.nan_to_num(7.0), expected.nan_to_num(7.0))
    for kernel in kernels:
        buffer = torch.full((expected.numel() + 1,), -7.0, dtype=dtype)
        values = buffer[:-1].view(shape)
        done = is_done(kernel, values)
        assert done or is_left or beside.isnan().any(), str(kernel)
        assert not (done and expected.isnan().any()), str(kernel)
        decode(arena_of(kernel), values)
        assert same(values, by_torch), str(kernel)
        assert buffer[-1] == -7, str(kernel)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(sorted(KINDS)),
    n_rows=st.sampled_from([1, 2, 5, 31, 33]),
    n_cols=st.sampled_from([4, 8, 16, 60, 64, 100, 128, 480, 520, 1028]),
    groups=st.sampled_from(["runs", "runs", "all", "any order"]),
    width=st.sampled_from([1, 16, 32, 64, 100]),
    zeros=st.sampled_from(["none", "zeros", "biases"]),
    shared=st.booleans(),
    size=st.sampled_from([1.0, 1e-3, 1e-7, 1e-38, 1e4]),
    strange=st.sampled_from([0.0, 0.0, 0.02]),
    dtype=st.sampled_from(DTYPES),
    via=st.sampled_from([None, *DTYPES[:2]]),
    skip=st.sampled_from([0, 3, 32]),
)
def test_rows(
    kernels, seed, kind, n_rows, n_cols, groups, width, zeros, shared, size, strange, dtype, via, skip
):
    generator = torch.Generator().manual_seed(seed)
    codes = KINDS[kind](n_cols)
    packed = torch.randint(0, 256, (n_rows, codes.row_nbytes + 5), dtype=torch.uint8, generator=generator)
    whole = packed[:, : codes.row_nbytes].contiguous()
    n_groups = {"runs": -(-n_cols // width), "all": 1, "any order": 5}[groups]
    shape = (1 if shared else n_rows, n_groups)
    if groups == "any order":
        width = torch.randint(0, n_groups, (n_cols,), dtype=torch.int32, generator=generator)
        zeros = "zeros" if zeros == "biases" else zeros
    scales = numbers_of(shape, size, strange, generator)
    offsets = None if zeros == "none" else numbers_of(shape, 3.0, strange, generator)
    numbers = Numbers(scales, offsets, width if groups != "all" else n_cols, zeros == "biases")
    dtypes = [dtype] if via in (None, dtype) or numbers.are_biases else [via, dtype]
    expected = by_definition(whole, codes, numbers, n_cols, dtypes)
    check(
        kernels,
        lambda arena, values: decode_rows(whole, codes, numbers, dtypes, values, arena),
        expected,
        expected,
        dtype,
        lambda kernel, values: compiled_rows.decode_rows(kernel, whole, codes, numbers, dtypes, values),
    )
    # Transposed, of rows that lie apart, and not all of their columns.
    skip = skip % n_cols
    wanted = slice(skip, n_cols - 1 if n_cols - 1 > skip else n_cols)
    turned = expected[:, wanted].T.contiguous()
    apart = packed[:, : codes.row_nbytes]
    check(
        kernels,
        lambda arena, values: decode_turned(apart, codes, n_cols, numbers, dtypes, skip, values, arena),
        turned,
        expected,
        dtype,
        lambda kernel, values: compiled_rows.decode_rows(
            kernel, apart, codes, numbers, dtypes, values, skip=skip
        ),
        is_left=codes.padded,
    )
