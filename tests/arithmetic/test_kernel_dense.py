"""The compiled kernel decodes 4-bit codes as torch does, bit for bit, and measures a tile to 1e-6."""

import math

import pytest
import torch
from compiled_kernel import arena_of, at_every_level
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.arithmetic import compiled
from lorafuse.arithmetic.dequantize import byte_pairs, decode_four_bit
from lorafuse.arithmetic.measure import Measures, measure_tile, store_tile
from lorafuse.arithmetic.quantize import quant_map

STRANGE = torch.tensor([0.0, -0.0, 1e-42, -1e-38, 1e-7, 6e-5, 3e38, -7e4, float("inf"), float("nan")])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SUMS = ("base_sq", "delta_sq", "residual_sq")


@pytest.fixture(scope="module")
def kernels(kernel_path):
    return at_every_level(kernel_path)


def same_bits(a, b):
    bits = torch.int16 if a.dtype != torch.float32 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def strangely(values, share, generator):
    strange = STRANGE[torch.randint(len(STRANGE), values.shape, generator=generator)]
    return torch.where(torch.rand(values.shape, generator=generator) < share, strange, values)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    numel=st.sampled_from([1, 2, 31, 32, 33, 64, 127, 1000, 2051]),
    blocksize=st.sampled_from([2, 6, 32, 34, 64, 128, 4096]),
    skip=st.integers(0, 4095),
    size=st.sampled_from([1.0, 1e-4, 1e-37, 1e30]),
    strange=st.sampled_from([0.0, 0.0, 0.05]),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
)
def test_decoded(kernels, seed, numel, blocksize, skip, size, strange, kind, dtype):
    generator, skip = torch.Generator().manual_seed(seed), skip % blocksize
    n_blocks = -(-(skip + numel) // blocksize)
    n_bytes = -(-(skip + numel) // 2)  # the last block may be short
    packed = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator)
    absmax = strangely(size * torch.randn(n_blocks, generator=generator), strange, generator)
    levels = quant_map(kind)
    given = packed, levels, byte_pairs(levels), absmax, blocksize, skip, numel, dtype
    expected = decode_four_bit(*given, arena_of(None)).clone()
    for kernel in kernels:
        assert same_bits(decode_four_bit(*given, arena_of(kernel)), expected), str(kernel)


def test_torch_decodes_where_a_scale_or_a_level_is_not_finite(kernels):
    """What NaN is in 16 bits depends on how torch is compiled."""
    packed, values = torch.zeros(64, dtype=torch.uint8), torch.zeros(128).bfloat16()
    for kernel in kernels:
        for number, is_done in ((1.0, kernel.level > 0), (math.inf, False), (math.nan, False)):
            scales, levels = torch.tensor([1.0, number]), quant_map("nf4").clone()
            assert compiled.decode_four_bit(kernel, packed, levels, scales, 64, 0, values) == is_done
            scales, levels[7] = torch.ones(2), number
            assert compiled.decode_four_bit(kernel, packed, levels, scales, 64, 0, values) == is_done


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_is_rounded_as_by_torch(dtype, kernels):
    """Scales of every exponent, of every ending that decides a rounding, and of every number of the dtype."""
    endings = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = torch.arange(-(2**15), 2**15)[:, None] * 2**16 + endings
    scales = torch.cat([bits.to(torch.int32).view(-1).view(torch.float32), torch.arange(-999.0, 999) / 64])
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    scales = torch.cat([scales, numbers])
    scales = scales[scales.isfinite()]
    levels = torch.ones(16)
    packed, numel = torch.zeros(len(scales), dtype=torch.uint8), 2 * len(scales)
    given = packed, levels, byte_pairs(levels), scales, 2, 0, numel, dtype
    expected = decode_four_bit(*given, arena_of(None)).clone()
    for kernel in kernels:
        assert same_bits(decode_four_bit(*given, arena_of(kernel)), expected), str(kernel)
        made = torch.empty(len(scales), dtype=dtype)
        parts = range(0, len(scales), 100)  # a number that is not finite leaves only its part to torch
        for at in parts:
            part = scales[at : at + 100]
            store_tile(part, part, made[at : at + 100], arena_of(kernel))
        assert same_bits(made, scales.to(dtype)), str(kernel)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    numel=st.sampled_from([1, 15, 16, 17, 511, 513, 5000, (1 << 17) + 3]),
    update=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    base_dtype=st.sampled_from(DTYPES),
    stored_dtype=st.sampled_from(DTYPES),
    strange=st.sampled_from([0.0, 0.0, 0.01]),
)
def test_measured(kernels, seed, numel, update, base_dtype, stored_dtype, strange):
    generator = torch.Generator().manual_seed(seed)
    base = strangely(0.02 * torch.randn(numel, generator=generator), strange, generator).to(base_dtype)
    total = base.float() + update * 0.02 * torch.randn(numel, generator=generator)
    stored = total.to(stored_dtype)
    torch_made = measure_tile(base, total.clone(), stored, arena_of(None))
    for kernel in kernels:
        found = measure_tile(base, total.clone(), stored, arena_of(kernel))
        for name in ("numel", "n_changed", "n_broken", "n_broken_base"):
            assert getattr(found, name) == getattr(torch_made, name), name
        assert_near(found, exact(base, total, stored), 1e-6)
        assert_near(found, torch_made, 2e-5)  # what torch's own sums of 2^17 numbers in fp32 are off by
        made = torch.empty_like(stored)
        in_passing = store_tile(base, total.clone(), made, arena_of(kernel))
        assert same_bits(made, stored), str(kernel)
        is_done = kernel.level > 0 and math.isfinite(found.residual_sq)
        assert in_passing == (found if is_done else None)


def exact(base, total, stored):
    """The sums in float64, of differences in fp32."""
    w, delta, residual = base.double(), (total - base.float()).double(), (stored.float() - total).double()
    return Measures(
        base_sq=float(w @ w),
        delta_sq=float(delta @ delta),
        residual_sq=float(residual @ residual),
        residual_delta=float(residual @ delta),
    )


def assert_near(found: Measures, expected: Measures, rel: float) -> None:
    """Where the sums are not too large for fp32, in which torch's are infinite then."""
    largest = torch.finfo(torch.float32).max
    for name in SUMS:
        a, b = getattr(found, name), getattr(expected, name)
        if b <= largest:
            assert a == pytest.approx(b, rel=rel, abs=1e-38), name
        else:
            assert not a <= largest, name
    size = math.sqrt(expected.residual_sq * expected.delta_sq)
    if size <= largest:
        assert abs(found.residual_delta - expected.residual_delta) <= rel * size + 1e-38


def test_measures_are_the_same_at_every_level(kernels):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(100_000, generator=generator)
    total = base + 0.001 * torch.randn(100_000, generator=generator)
    found = [measure_tile(base, total.clone(), total.bfloat16(), arena_of(kernel)) for kernel in kernels]
    assert all(measures == found[0] for measures in found)
    exact = float((total - base).double().square().sum())
    assert found[0].delta_sq == pytest.approx(exact, rel=1e-6)
