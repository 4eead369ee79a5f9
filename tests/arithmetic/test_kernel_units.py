"""The compiled kernel decodes codes in units, sums of vectors, and E4M3 as torch does, at each level of the
processor."""

import pytest
import torch
from compiled_kernel import arena_of, at_every_level
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.arithmetic import compiled, units, vectors
from lorafuse.arithmetic.small_floats import e4m3
from lorafuse.arithmetic.units import Numbers, decode_units
from lorafuse.arithmetic.vectors import decode_vectors

STRANGE = torch.tensor(
    [0.0, -0.0, 1e-42, -1e-38, 6e-8, 65504.0, 3e38, float("inf"), -float("inf"), float("nan")]
)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SEEDS, SOME = st.integers(0, 2**31), st.sampled_from([0.0, 0.0, 0.2])


@pytest.fixture(scope="module")
def kernels(kernel_path):
    return at_every_level(kernel_path)


def numbers(shape, dtype, size, strange, generator):
    made = size * torch.randn(shape, generator=generator)
    found = torch.rand(made.shape, generator=generator) < strange
    made[found] = STRANGE[torch.randint(len(STRANGE), (int(found.sum()),), generator=generator)]
    return made.to(dtype)


def filled(shape, dtype):
    """Values that are to be written, and of the same buffer an element that is not."""
    made = torch.full((shape.numel() + 1,), -7.0, dtype=dtype)
    return made[:-1].view(shape), made[-1:]


def check(values, beyond, expected, is_done, kernel):
    """`is_done`: whether the kernel says so, which it may not of NaN."""
    assert is_done == (not expected.isnan().any()), str(kernel)
    if is_done:
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8)), str(kernel)
    assert beyond == -7, str(kernel)


@settings(max_examples=150, deadline=None)
@given(
    seed=SEEDS,
    n=st.sampled_from([1, 2, 15, 16, 63, 511, 512, 513, 700, 1600]),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    wide=st.booleans(),
    period=st.sampled_from([0, 1, 3, 16, 64, 100]),
    n_numbers=st.sampled_from([1, 5, 16, 60, 600, 2000]),
    skip=st.integers(0, 99),
    size=st.sampled_from([1.0, 1e-3, 1e-7, 1e-38, 1e4]),
    strange=SOME,
    dtypes=st.tuples(DTYPES, DTYPES),
    chunk=st.sampled_from([1 << 17, 100]),
)
def test_units(
    kernels, in_chunks_of, seed, n, bits, wide, period, n_numbers, skip, size, strange, dtypes, chunk
):
    generator = torch.Generator().manual_seed(seed)
    dtype, made_in = dtypes
    if period:
        skip, n_numbers = skip % period, (skip % period + n - 1) // period + 1
    else:
        skip %= n_numbers
    low, high, of_unit = (-(2**31), 2**31, torch.int32) if wide else (0, 256, torch.uint8)
    shift = int(torch.randint(0, (30 if wide else 8) - bits + 1, (), generator=generator))
    stored = torch.randint(low, high, (n,), generator=generator).to(of_unit)
    zeros = numbers((n_numbers,), dtype, 2.0**bits, strange, generator)
    scales = numbers((n_numbers,), dtype, size, strange, generator)
    given = stored, shift, (1 << bits) - 1, Numbers(zeros, scales, period, skip)
    expected = by_definition(*given, made_in)
    values = torch.empty(n, dtype=made_in)
    in_chunks_of(chunk)
    decode_units(*given, values, arena_of(None))
    assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(values.isnan(), expected.isnan())
    for kernel in kernels:
        found, beyond = filled(expected.shape, made_in)
        check(found, beyond, expected, compiled.decode_units(kernel, *given[:3], *given[3], found), kernel)
        decode_units(*given, found, arena_of(kernel))
        assert torch.equal(found.view(torch.uint8), values.view(torch.uint8)), str(kernel)


def by_definition(stored, shift, mask, of_groups, made_in):
    """One element after another, in float64: a sum or a product of two numbers is rounded once."""
    zeros, scales, period, skip = of_groups
    at = skip + torch.arange(len(stored))
    at = at // period if period else at % len(scales)
    codes = (stored.long() >> shift) & mask
    differences = (codes.double() - zeros[at].double()).to(zeros.dtype)
    return (differences.double() * scales[at].double()).to(zeros.dtype).to(made_in)


@pytest.fixture(scope="module")
def in_chunks_of():
    before = units.CHUNK_NUMEL

    def put(numel):
        units.CHUNK_NUMEL = vectors.CHUNK_NUMEL = numel

    yield put
    put(before)


@settings(max_examples=80, deadline=None)
@given(
    seed=SEEDS,
    n_groups=st.sampled_from([1, 2, 5]),
    n_vectors=st.sampled_from([1, 3, 63, 64, 65, 130]),
    n_books=st.sampled_from([1, 2, 3]),
    book=st.sampled_from(
        [(1, 8), (2, 8), (256, 8), (1024, 8), (64, 1), (256, 3), (16, 4), (4, 16), (2, 512), (2, 513)]
    ),
    height=st.sampled_from([1, 1, 1, 2]),
    of_code=st.sampled_from([torch.int8, torch.int16, torch.int32]),
    size=st.sampled_from([1.0, 1e-3, 1e-38, 1e4]),
    strange=st.sampled_from([0.0, 0.0, 0.01]),
    dtypes=st.tuples(DTYPES, DTYPES),
    chunk=st.sampled_from([1 << 17, 100]),
)
def test_vectors(
    kernels, in_chunks_of, seed, n_groups, n_vectors, n_books, book, height, of_code, size, strange,
    dtypes, chunk,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    (dtype, made_in), (length, width) = dtypes, book
    codes = torch.randint(-(2**31), 2**31, (n_groups, n_vectors, n_books), generator=generator).to(of_code)
    books = numbers((n_books, length, height * width), dtype, 1.0, strange, generator)
    scales = numbers((n_groups,), dtype, size, strange, generator)
    shape = torch.Size((n_groups, height, n_vectors, width))
    expected = torch.empty(shape, dtype=made_in)
    in_chunks_of(chunk)
    decode_vectors(codes, books, scales, expected, arena_of(None))
    assert torch.equal(
        expected.nan_to_num(7.0), sums(codes, books, scales, shape).to(made_in).nan_to_num(7.0)
    )
    for kernel in kernels:
        found, beyond = filled(shape, made_in)
        is_done = compiled.decode_vectors(kernel, codes, books, scales, found)
        if height > 1 or width > 512:
            assert not is_done
        else:
            check(found, beyond, expected, is_done, kernel)
        decode_vectors(codes, books, scales, found, arena_of(kernel))
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), str(kernel)


def sums(codes, books, scales, shape):
    """In the dtype of the books."""
    n_groups, height, n_vectors, width = shape
    total = torch.zeros(n_groups, n_vectors, height * width)
    for number, book in enumerate(books):
        total += book[codes[:, :, number].long() % len(book)].float()
    values = (total.to(books.dtype).double() * scales.double()[:, None, None]).to(books.dtype)
    return values.view(n_groups, n_vectors, height, width).transpose(1, 2)


@pytest.mark.parametrize("n", [1, 7, 15, 16, 33, 256, 1000])
def test_e4m3(kernels, n):
    """All bytes; also against torch's own conversion."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(4)[:n].flip(0)
    expected = torch.empty(n)
    e4m3(codes, expected, arena_of(None))
    own = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(expected.nan_to_num(7.0), own.nan_to_num(7.0))
    assert torch.equal(expected.isnan(), own.isnan())
    for kernel in kernels:
        found, beyond = filled(expected.shape, torch.float32)
        e4m3(codes, found, arena_of(kernel))
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), str(kernel)
        assert beyond == -7, str(kernel)
