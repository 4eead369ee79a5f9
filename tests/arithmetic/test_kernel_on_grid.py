"""The compiled kernel rounds a tile onto its grid as torch does, bit for bit, and measures it meanwhile."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from compiled_kernel import arena_of, at_every_level
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.dequantize import decode_int8
from lorafuse.arithmetic.draws import Draws, HalfDraws, RunDraws, TurnedDraws
from lorafuse.arithmetic.measure import measure_tile
from lorafuse.arithmetic.on_grid import round_tile
from lorafuse.arithmetic.quantize import quant_map
from lorafuse.codecs.bnb4_grid import FourBitGrid, levels_of
from lorafuse.codecs.bnb8_grid import Int8Grid

STRANGE = [0.0, -0.0, 1e-42, -1e-38, 1e-6, 3e38, float("inf"), float("-inf"), float("nan"), 65504.0, -7e4]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MAPS = {
    "nf4": quant_map("nf4"),
    "fp4": quant_map("fp4"),  # with two zeros
    "shuffled": quant_map("nf4")[torch.randperm(16, generator=torch.Generator().manual_seed(0))],
    "few": torch.tensor([0.0, 1.0, 2.0, 2.0] * 4),  # values that are equal, none below 0
}


@pytest.fixture(scope="module")
def kernels(kernel_path):
    return at_every_level(kernel_path)


def tiles():
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "numel": st.sampled_from([1, 2, 63, 64, 130, 1000, 1024, 1025, 3000, 8192, 9001]),
            "run": st.sampled_from([2, 6, 32, 64, 256, 4096]),
            "skip": st.sampled_from([0, 0, 2, 40]),
            "first": st.sampled_from([0, 1, 8, 1021, 2**33 + 5]),
            "draws": st.sampled_from(["run", "turned", "half"]),
            "size": st.sampled_from([1.0, 1.0, 1e-4, 1e-36]),  # of the scales: float16 has no small ones
            "update": st.sampled_from([0.0, 1e-4, 0.01, 0.3, 5.0]),
            "strange": st.sampled_from([0.0, 0.0, 0.01, 0.3]),  # share of the scales, and of the sums
        }
    )


def strangely(values, share, generator):
    """The values, some of which are strange."""
    strange = torch.tensor(STRANGE)[torch.randint(len(STRANGE), values.shape, generator=generator)]
    return torch.where(torch.rand(values.shape, generator=generator) < share, strange, values)


def draws_of(tile, arena):
    numel, weight = tile["numel"], Draws("layers.0.é.weight")
    if tile["draws"] == "half":
        return HalfDraws()
    if tile["draws"] == "run":
        return RunDraws(weight, tile["first"])
    n_rows = next(n for n in (16, 3, 2, 1) if numel % n == 0)
    return TurnedDraws(weight, tile["first"], n_rows, numel // n_rows, arena)


def rounded(kernel, make_grid, base, sums, tile):
    """(codes, values, how many are beyond the grid, measures), all by this kernel, or by torch."""
    arena = Arena(torch.device("cpu"))
    arena.kernel = kernel
    grid, codes = make_grid()
    drawn = draws_of(tile, arena)
    values, n_clipped, measures = round_tile(grid, base, sums.clone(), drawn, arena, measured=True)
    measures = measures or measure_tile(base, sums.clone(), values, arena)
    return codes, values.clone(), n_clipped, measures


def check(kernels, make_grid, base, tile, generator):
    sums = base.float() + tile["update"] * base.float().nan_to_num(0, 1, -1).abs().mean() * torch.randn(
        base.numel(), generator=generator
    )
    sums = strangely(sums, tile["strange"] / 4, generator)
    codes, values, n_clipped, _ = rounded(None, make_grid, base, sums, tile)
    for kernel in kernels:
        found = rounded(kernel, make_grid, base, sums, tile)
        assert torch.equal(found[0], codes), str(kernel)
        assert torch.equal(found[1].isnan(), values.isnan()), str(kernel)
        bits = (v.masked_fill(v.isnan(), 0).view(torch.uint8) for v in (found[1], values))
        assert torch.equal(*bits), str(kernel)
        assert found[2] == n_clipped, str(kernel)
        apart = measure_tile(base, sums.clone(), values, arena_of(kernel))
        assert same_measures(found[3], apart), str(kernel)


def same_measures(a, b):
    """Of the same elements in the same order: NaN where the other has it."""
    return all(x == y or (x != x and y != y) for x, y in zip(astuple(a), astuple(b), strict=True))


@settings(max_examples=80, deadline=None)
@given(tile=tiles(), kind=st.sampled_from(sorted(MAPS)), dtype=st.sampled_from(DTYPES), beside=st.booleans())
def test_four_bits(kernels, tile, kind, dtype, beside):
    """`beside`: the codes are written beside those that are stored."""
    generator = torch.Generator().manual_seed(tile["seed"])
    numel, run, skip = tile["numel"], tile["run"], tile["skip"] % tile["run"]
    packed = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8, generator=generator)
    scales = 0.03 + 0.02 * torch.randn(-(-(skip + numel) // run), generator=generator)
    scales *= tile["size"]
    scales = strangely(scales, tile["strange"], generator)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:numel].long()
    base = MAPS[kind][codes] * scales.repeat_interleave(run)[skip : skip + numel]

    def make_grid():
        levels = levels_of(MAPS[kind].numpy().tobytes(), dtype)
        if beside:
            made = torch.full_like(packed, 0xA5)
            return FourBitGrid(made, scales, levels, run, skip, packed), made
        recoded = packed.clone()
        return FourBitGrid(recoded, scales, levels, run, skip), recoded

    check(kernels, make_grid, base.to(dtype), tile, generator)


@settings(max_examples=25, deadline=None)
@given(tile=tiles())
def test_int8(kernels, tile):
    generator = torch.Generator().manual_seed(tile["seed"])
    n_cols = tile["run"] - 1
    n_rows = -(-tile["numel"] // n_cols)
    tile = tile | {"numel": n_rows * n_cols}
    q = torch.randint(-128, 128, (n_rows, n_cols), dtype=torch.int8, generator=generator)
    scb = strangely(0.5 + torch.randn(n_rows, generator=generator).abs(), tile["strange"], generator)
    base = decode_int8(q.float(), scb[:, None]).view(-1)

    def make_grid():
        recoded = q.clone().view(-1)
        return Int8Grid(recoded, scb), recoded

    check(kernels, make_grid, base, tile, generator)


def test_a_tie_is_decided_by_the_fraction(kernels):
    """Sums at which the byte alone does not decide: 256 p is a byte and a little."""
    numel = 64 * 256
    packed = torch.full((numel // 2,), 0x77, dtype=torch.uint8)
    scales, levels = torch.ones(numel // 64), levels_of(MAPS["nf4"].numpy().tobytes(), torch.float32)
    arena = Arena(torch.device("cpu"))
    byte = RunDraws(Draws("w"), 0).bytes(0, numel, arena).numpy().astype(np.float64)
    share = (byte + np.linspace(0, 1, numel)) / 256
    sums = torch.from_numpy((share * float(MAPS["nf4"][8])).astype(np.float32))
    made = []
    for kernel in [None, *kernels]:
        arena.kernel = kernel
        codes = packed.clone()
        grid = FourBitGrid(codes, scales, levels, 64, 0)
        round_tile(grid, torch.zeros(numel), sums, RunDraws(Draws("w"), 0), arena)
        made.append(codes)
    assert 0.3 < float((made[0] != packed).double().mean()) < 0.9
    assert all(torch.equal(codes, made[0]) for codes in made)
