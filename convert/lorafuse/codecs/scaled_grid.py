"""The grid of codes with a scale, and perhaps a zero point, for each run of them: what the codes of a tile
can stand for, and how they are written anew."""

from functools import cache
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.on_grid import Grid
from lorafuse.arithmetic.scaling import round_through

# Rounded to a dtype, a value moves by at most so much of itself, or by the second figure where it is small.
_MOVES = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.bfloat16: (2.0**-8, 2.0**-133),
    torch.float16: (2.0**-11, 2.0**-24),
}


class Levels(NamedTuple):
    """What codes stand for before scales. `ascending` (float32 [P]): the finite numbers; `codes` (uint8 [P]):
    the code of each; `places` (int64 [codes]): where each code is among them, 0 for one that stands for no
    finite number; `gaps` (float32 [codes]): how far a code's value and the next other one are apart, at
    least, once they are scaled by 1 and rounded to `dtypes` in turn, but for `least`; 0 where that is not
    known."""

    ascending: torch.Tensor
    codes: torch.Tensor
    places: torch.Tensor
    gaps: torch.Tensor
    dtypes: tuple[torch.dtype, ...]
    least: float

    def on(self, arena: Arena) -> "Levels":
        """The same on the arena's device."""
        ascending, codes, places, gaps = (arena.table(table) for table in self[:4])
        return Levels(ascending, codes, places, gaps, self.dtypes, self.least)


@cache
def levels_of(levels: torch.Tensor, dtypes: tuple[torch.dtype, ...], *, zeros: bool) -> Levels:
    """Of codes that stand for `levels` (fp32 [codes], the one tensor that a codec has of them), from which
    zero points may be subtracted, which are as large as the largest level, at most."""
    finite = levels.isfinite()
    ascending, codes = levels.masked_fill(~finite, torch.inf).sort(stable=True)
    n_positions = int(finite.sum())
    places = torch.where(finite, codes.argsort(), 0)
    share, least = (sum(_MOVES[dtype][n] for dtype in (torch.float32, *dtypes)) for n in (0, 1))
    numbers = levels.double()[finite]
    sizes = numbers.abs() + (float(numbers.abs().max()) if zeros else 0.0)
    distances = (numbers[:, None] - numbers).abs()
    # Of values that lie further away, distances grow faster than what rounding takes.
    left = distances - 1.01 * share * (sizes[:, None] + sizes)
    gaps = torch.zeros_like(levels)
    gaps[finite] = left.masked_fill(distances == 0, torch.inf).amin(1).clamp(min=0.0).mul(0.999).float()
    return Levels(
        ascending[:n_positions], codes[:n_positions].to(torch.uint8), places, gaps, dtypes, 2.02 * least
    )


class ScaledGrid(Grid):
    """`codes`: those of whole runs, uint8 (1-D), which `write` changes; `scales`, `zeros` and `biases`:
    float32 [runs]; biases are added to the products, which are float32 again (`levels` of three dtypes: what
    products are rounded to, float32, what sums are rounded to). Everything is on one device."""

    skip = 0

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        levels: Levels,
        run: int,
        biases: torch.Tensor | None = None,
    ) -> None:
        self._biases = biases
        self._codes, self._scales, self._zeros, self._levels, self.run = codes, scales, zeros, levels, run
        self.n_positions = len(levels.ascending)
        self._any_below = bool((scales < 0).any())

    def _runs_of(self, elements: torch.Tensor) -> torch.Tensor:
        return elements if self.run == 1 else elements.div(self.run, rounding_mode="floor")

    def _turned(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Places among the ascending levels: where a scale is below 0, the lowest value is that of the
        highest level."""
        if not self._any_below:
            return positions
        below = self._scales.index_select(0, self._runs_of(elements)) < 0
        return torch.where(below, self.n_positions - 1 - positions, positions)

    def _scaled(self, levels: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
        """What a reader decodes of levels (fp32, 1-D), which it changes, of elements in these runs."""
        if self._zeros is not None:
            levels.sub_(self._zeros.index_select(0, runs))
        levels.mul_(self._scales.index_select(0, runs))
        scratch, dtypes = (
            torch.empty(len(levels), dtype=torch.int16, device=levels.device),
            self._levels.dtypes,
        )
        if self._biases is None:
            return round_through(levels, list(dtypes), scratch)
        products = round_through(levels, list(dtypes[:-1]), scratch)
        return round_through(products.add_(self._biases.index_select(0, runs)), [dtypes[-1]], scratch)

    def positions(self, elements: torch.Tensor) -> torch.Tensor:
        codes = self._codes.index_select(0, elements).to(torch.int64)
        return self._turned(elements, self._levels.places.index_select(0, codes))

    def decoded(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        levels = self._levels.ascending.index_select(0, self._turned(elements, positions))
        return self._scaled(levels, self._runs_of(elements)).to(torch.float64)

    def bound(self, sizes: torch.Tensor, first_run: int) -> None:
        start, n_runs = first_run * self.run, sizes.numel() // self.run
        codes = self._codes[start : start + sizes.numel()].to(torch.int32)
        gaps = self._levels.gaps.index_select(0, codes).view(n_runs, self.run)
        scales = self._scales[first_run : first_run + n_runs].abs()
        # What is not known to be apart, NaN too, is looked at one by one.
        gaps.mul_(scales[:, None]).sub_(self._least(first_run, n_runs)).clamp_(min=0.0)
        sizes.view(n_runs, self.run).mul_(256).div_(gaps)

    def _least(self, first_run: int, n_runs: int) -> torch.Tensor | float:
        """How much less than gap times scale two values of these runs may be apart; of each: [runs, 1]."""
        if self._biases is None:
            return self._levels.least
        share = 2.02 * (_MOVES[torch.float32][0] + _MOVES[self._levels.dtypes[-1]][0])
        biases = self._biases[first_run : first_run + n_runs].abs()
        return biases.mul_(share).add_(self._levels.least)[:, None]

    def limits(self, first_run: int, last_run: int) -> tuple[torch.Tensor, torch.Tensor]:
        runs = torch.arange(first_run, last_run, dtype=torch.int64, device=self._scales.device)
        ends = (self._levels.ascending[end].repeat(len(runs)) for end in (0, -1))
        lowest, highest = (self._scaled(end, runs).float() for end in ends)
        return torch.minimum(lowest, highest), torch.maximum(lowest, highest)

    def write(self, elements: torch.Tensor, before: torch.Tensor, positions: torch.Tensor) -> None:
        moved = (positions != before).nonzero().view(-1)  # a code that stays may be one of several, or none
        elements, positions = elements[moved], positions[moved]
        codes = self._levels.codes.index_select(0, self._turned(elements, positions))
        self._codes.index_copy_(0, elements, codes)
