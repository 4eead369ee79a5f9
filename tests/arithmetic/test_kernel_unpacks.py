"""The compiled kernel unpacks codes of a few bits, scales of scales, and blocks with biases as torch does."""

import pytest
import torch
from compiled_kernel import arena_of, at_every_level
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.arithmetic import compiled
from lorafuse.arithmetic.bit_stream import unpack_floats
from lorafuse.arithmetic.dequantize import nested_scales

STRANGE = torch.tensor([0.0, -0.0, 1e-42, -1e-38, 3e38, float("inf"), float("nan")])


@pytest.fixture(scope="module")
def kernels(kernel_path):
    return at_every_level(kernel_path)


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    n_rows=st.sampled_from([1, 2, 7]),
    n_codes=st.sampled_from([1, 7, 8, 9, 24, 61, 64, 96, 256]),
    spare=st.sampled_from([0, 0, 1, 3, 9]),
    less=st.sampled_from([0, 1, 4, 128]),
)
def test_codes(kernels, seed, bits, n_rows, n_codes, spare, less):
    """`spare`: bytes of a row that hold no code."""
    generator = torch.Generator().manual_seed(seed)
    row_nbytes = -(-n_codes * bits // 8) + spare
    packed = torch.randint(0, 256, (n_rows, row_nbytes), dtype=torch.uint8, generator=generator)
    in_bits = [sum(int(byte) << 8 * k for k, byte in enumerate(row)) for row in packed]
    expected = [[(row >> i * bits) % 2**bits - less for i in range(n_codes)] for row in in_bits]
    expected = torch.tensor(expected, dtype=torch.float32).view(-1)
    assert same_bits(unpack_floats(packed, bits, n_codes, arena_of(None), less), expected)
    for kernel in kernels:
        values = torch.full((n_rows * n_codes + 1,), -7.0)
        compiled.unpack_floats(kernel, packed, bits, n_codes, less, values[:-1])
        assert same_bits(values[:-1], expected), str(kernel)
        assert values[-1] == -7, str(kernel)
        assert same_bits(unpack_floats(packed, bits, n_codes, arena_of(kernel), less), expected), str(kernel)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_codes=st.sampled_from([1, 2, 255, 256, 257, 1000]),
    blocksize=st.sampled_from([1, 2, 64, 256]),
    skip=st.sampled_from([0, 0, 1, 63, 255]),
    strange=st.sampled_from([0.0, 0.0, 0.3]),
    offset=st.sampled_from([0.0, 0.03, -1e-3, 0.1234567890123]),
)
def test_scales_of_scales(kernels, seed, n_codes, blocksize, skip, strange, offset):
    generator, skip = torch.Generator().manual_seed(seed), min(skip % blocksize, n_codes - 1)
    codes = torch.randint(0, 256, (n_codes,), dtype=torch.uint8, generator=generator)
    nested_map, nested = (torch.randn(n, generator=generator) for n in (256, -(-n_codes // blocksize)))
    for values in (nested_map, nested):
        found = torch.rand(values.shape, generator=generator) < strange
        values[found] = STRANGE[torch.randint(len(STRANGE), (int(found.sum()),), generator=generator)]
    given = codes, nested_map, nested, blocksize, offset, skip, n_codes - skip
    expected = nested_scales(*given, arena_of(None))
    for kernel in kernels:
        found = nested_scales(*given, arena_of(kernel))
        assert torch.equal(found.isnan(), expected.isnan())
        assert same_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0)), str(kernel)
