"""The grid of NF4 and FP4: what the codes of a tile can stand for, and how they are written anew."""

from functools import cache
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.on_grid import Grid

# Rounded to a narrow dtype, a value moves by at most so much of itself; float16 has less precision below
# 6e-5, so that values of blocks with scales below the second figure may come closer to each other.
ROUNDED = {torch.float32: (0.0, 1e-30), torch.bfloat16: (2.0**-8, 1e-30), torch.float16: (2.0**-11, 1e-3)}


class Levels(NamedTuple):
    """A quant_map in ascending order, float32 [16]; the code of each value, uint8 [16]; the place of each
    code, int64 [16]; whether a byte holds a code of the lowest or highest value, bool [256]; what decoded
    values are rounded to; and how far two values that differ are apart, at least, after that."""

    ascending: torch.Tensor
    codes: torch.Tensor
    places: torch.Tensor
    holds_end: torch.Tensor
    dtype: torch.dtype
    least: float

    def on(self, arena: Arena) -> "Levels":
        """The same on the arena's device."""
        ascending, codes, places, holds_end = (arena.place(table) for table in self[:4])
        return Levels(ascending, codes, places, holds_end, self.dtype, self.least)


@cache
def levels_of(quant_map: bytes, dtype: torch.dtype) -> Levels:
    """The levels of a stored quant_map, for a weight of `dtype`."""
    ascending, codes = torch.frombuffer(bytearray(quant_map), dtype=torch.float32).sort(stable=True)
    places = codes.argsort()
    values = ascending[places]
    is_end = (values == ascending[0]) | (values == ascending[-1])
    byte = torch.arange(256, dtype=torch.int64)
    distances, sizes = ascending.diff(), ascending.abs()
    left = distances - ROUNDED[dtype][0] * (sizes[:-1] + sizes[1:])
    least = float(left[distances > 0].min()) if bool((distances > 0).any()) else 0.0
    holds_end = is_end[byte >> 4] | is_end[byte & 15]
    return Levels(ascending, codes.to(torch.uint8), places, holds_end, dtype, least)


class FourBitGrid(Grid):
    """`packed`: the codes of the tile, uint8, two to a byte, the first in a whole byte; `write` changes them.
    `scales`: float32, of the blocks that the tile touches. Everything is on one device."""

    n_positions = 16

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, levels: Levels, blocksize: int, skip: int
    ) -> None:
        self._packed, self._scales = packed, scales
        self._levels, self.run, self.skip = levels, blocksize, skip

    def _scales_of(self, elements: torch.Tensor) -> torch.Tensor:
        return self._scales[(elements + self.skip).div_(self.run, rounding_mode="floor")]

    def _turned(self, scales: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Places among the ascending levels. Double quantization may leave a scale below 0; the lowest value
        is then that of the highest level."""
        return torch.where(scales < 0, 15 - positions, positions)

    def positions(self, elements: torch.Tensor) -> torch.Tensor:
        byte = self._packed[elements >> 1]
        code = torch.where((elements & 1).bool(), byte & 15, byte >> 4)
        return self._turned(self._scales_of(elements), self._levels.places[code.long()])

    def decoded(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scales = self._scales_of(elements)
        levels = self._levels.ascending[self._turned(scales, positions)]
        return levels.mul_(scales).to(self._levels.dtype).to(torch.float64)

    def bound(self, sizes: torch.Tensor, first_run: int) -> None:
        scales = self._scales[first_run : first_run + sizes.numel() // self.run].abs()
        distances = scales * self._levels.least
        # Those of other blocks are looked at one by one.
        distances.masked_fill_((distances <= 0) | (scales < ROUNDED[self._levels.dtype][1]), 0.0)
        sizes.view(-1, self.run).mul_((256 / distances)[:, None])

    def ends(self, start: int, stop: int) -> torch.Tensor:
        holds_end = self._levels.holds_end[self._packed[start // 2 : -(-stop // 2)].int()]
        first = holds_end.nonzero().view(-1).mul_(2).add_(start // 2 * 2)
        both = torch.cat((first, first + 1))
        return both[(both >= start) & (both < stop)]

    def write(self, elements: torch.Tensor, positions: torch.Tensor) -> None:
        codes = self._levels.codes[self._turned(self._scales_of(elements), positions)]
        at, low = elements >> 1, (elements & 1).bool()
        # The two codes of a byte one after the other: an index that occurs twice would lose one of them.
        for half, mask, shift in ((low, 0xF0, 0), (~low, 0x0F, 4)):
            where = at[half]
            self._packed[where] = (self._packed[where] & mask) | (codes[half] << shift)
