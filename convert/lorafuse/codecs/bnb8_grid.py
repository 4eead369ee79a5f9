"""The grid of LLM.int8: what the codes of a tile can stand for, and how they are written anew."""

import torch

from lorafuse.arithmetic.compiled import Coded
from lorafuse.arithmetic.dequantize import INV_127, decode_int8
from lorafuse.arithmetic.on_grid import Grid

# fp32 rounds a value to 2^-24 of itself, 128 times the distance of two: 1.001 is more than enough.
NUMERATOR = 1.001 * 256 / INV_127
LOWEST = -128  # bitsandbytes makes -127 to 127; a reader decodes every code


class Int8Grid(Grid):
    """`q`: the codes of whole rows, int8 (1-D), which `write` changes; `scb`: float32 [rows]. Everything is
    on one device."""

    n_positions = 256
    skip = 0

    def __init__(self, q: torch.Tensor, scb: torch.Tensor) -> None:
        self._q, self._scb, self.run = q, scb, max(q.numel() // max(scb.numel(), 1), 1)

    def _of_rows(self, elements: torch.Tensor) -> torch.Tensor:
        return self._scb.index_select(0, elements.div(self.run, rounding_mode="floor"))

    def positions(self, elements: torch.Tensor) -> torch.Tensor:
        return self._q.index_select(0, elements).to(torch.int64).sub_(LOWEST)

    def decoded(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q = (positions + LOWEST).to(torch.float32)
        return decode_int8(q, self._of_rows(elements)).to(torch.float64)

    def bound(self, sizes: torch.Tensor, first_run: int) -> None:
        rows = sizes.view(-1, self.run)
        rows.mul_((NUMERATOR / self._scb[first_run : first_run + len(rows)].abs())[:, None])

    def limits(self, first_run: int, last_run: int) -> tuple[torch.Tensor, torch.Tensor]:
        scb = self._scb[first_run:last_run]
        lowest, highest = (decode_int8(torch.full_like(scb, float(q)), scb) for q in (LOWEST, 127))
        return torch.minimum(lowest, highest), torch.maximum(lowest, highest)

    def write(self, elements: torch.Tensor, before: torch.Tensor, positions: torch.Tensor) -> None:
        self._q.index_copy_(0, elements, (positions + LOWEST).to(torch.int8))

    def coded(self) -> Coded:
        bound = NUMERATOR, 1, 0
        return Coded(self._q, None, self._scb.contiguous(), None, bound, torch.float32, self.run, self.skip)
