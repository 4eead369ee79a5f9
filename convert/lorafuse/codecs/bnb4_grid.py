"""The grid of NF4 and FP4: what the codes of a tile can stand for, and how they are written anew."""

from functools import cache
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.compiled import Coded
from lorafuse.arithmetic.on_grid import Grid

# Rounded to a narrow dtype, a value moves by at most so much of itself; float16 has less precision below
# 6e-5, so that values of blocks with scales below the second figure may come closer to each other.
ROUNDED = {torch.float32: (0.0, 1e-30), torch.bfloat16: (2.0**-8, 1e-30), torch.float16: (2.0**-11, 1e-3)}


class Levels(NamedTuple):
    """A quant_map in ascending order, float32 [16]; the code of each value, uint8 [16]; the place of each
    code, int64 [16]; what decoded
    values are rounded to; and how far two values that differ are apart, at least, after that."""

    ascending: torch.Tensor
    codes: torch.Tensor
    places: torch.Tensor
    dtype: torch.dtype
    least: float

    def on(self, arena: Arena) -> "Levels":
        """The same on the arena's device."""
        if arena.on_host:
            return self
        ascending, codes, places = (arena.table(table) for table in self[:3])
        return Levels(ascending, codes, places, self.dtype, self.least)


@cache
def levels_of(quant_map: bytes, dtype: torch.dtype) -> Levels:
    """The levels of a stored quant_map, for a weight of `dtype`."""
    ascending, codes = torch.frombuffer(bytearray(quant_map), dtype=torch.float32).sort(stable=True)
    places = codes.argsort()
    distances, sizes = ascending.diff(), ascending.abs()
    left = distances - ROUNDED[dtype][0] * (sizes[:-1] + sizes[1:])
    least = float(left[distances > 0].min()) if bool((distances > 0).any()) else 0.0
    return Levels(ascending, codes.to(torch.uint8), places, dtype, least)


class FourBitGrid(Grid):
    """`packed`: the codes of the tile, uint8, two to a byte, the first in a whole byte; `write` changes them.
    They are there, or `before`, from where `begin` copies them. `scales`: float32, of the blocks that the
    tile touches. Everything is on one device."""

    n_positions = 16

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        levels: Levels,
        blocksize: int,
        skip: int,
        before: torch.Tensor | None = None,
    ) -> None:
        self._packed, self._scales, self._before = packed, scales, before
        self._levels, self.run, self.skip = levels, blocksize, skip
        self._any_below: bool | None = None
        self._shift = blocksize.bit_length() - 1 if blocksize & (blocksize - 1) == 0 else 0  # faster

    def begin(self) -> None:
        if self._before is not None:
            self._packed.copy_(self._before)

    def _scales_of(self, elements: torch.Tensor) -> torch.Tensor:
        at = elements + self.skip
        blocks = at >> self._shift if self._shift else at.div_(self.run, rounding_mode="floor")
        return self._scales.index_select(0, blocks)

    def _turned(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Places among the ascending levels. Double quantization may leave a scale below 0; the lowest value
        is then that of the highest level."""
        if self._any_below is None:
            self._any_below = bool((self._scales < 0).any())
        if not self._any_below:
            return positions
        return torch.where(self._scales_of(elements) < 0, 15 - positions, positions)

    def positions(self, elements: torch.Tensor) -> torch.Tensor:
        byte = self._packed.index_select(0, elements >> 1).to(torch.int64)
        code = byte.bitwise_right_shift_((elements & 1 ^ 1) << 2).bitwise_and_(15)
        places = self._levels.places.index_select(0, code)
        return self._turned(elements, places)

    def decoded(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scales = self._scales_of(elements)
        levels = self._levels.ascending.index_select(0, self._turned(elements, positions))
        return levels.mul_(scales).to(self._levels.dtype).to(torch.float64)

    def bound(self, sizes: torch.Tensor, first_run: int) -> None:
        scales = self._scales[first_run : first_run + sizes.numel() // self.run].abs()
        distances = scales * self._levels.least
        # Those of other blocks are looked at one by one.
        distances.masked_fill_((distances <= 0) | (scales < ROUNDED[self._levels.dtype][1]), 0.0)
        sizes.view(-1, self.run).mul_((256 / distances)[:, None])

    def limits(self, first_run: int, last_run: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales, levels = self._scales[first_run:last_run], self._levels
        lowest, highest = (scales * levels.ascending[end] for end in (0, -1))
        lowest, highest = torch.minimum(lowest, highest), torch.maximum(lowest, highest)
        return lowest.to(levels.dtype).float(), highest.to(levels.dtype).float()

    def write(self, elements: torch.Tensor, before: torch.Tensor, positions: torch.Tensor) -> None:
        codes = (
            self._levels.codes.index_select(0, self._turned(elements, places))
            for places in (positions, before)
        )
        # What is added to a byte changes one of its codes alone, so that both of them may change.
        change = torch.sub(*codes).bitwise_left_shift_((elements & 1 ^ 1).to(torch.uint8) << 2)
        self._packed.index_add_(0, elements >> 1, change)

    def coded(self) -> Coded:
        levels = self._levels
        tables = levels.ascending, levels.codes, levels.places
        bound = 256, levels.least, ROUNDED[levels.dtype][1]
        scales = self._scales.contiguous()
        return Coded(self._packed, self._before, scales, tables, bound, levels.dtype, self.run, self.skip)
