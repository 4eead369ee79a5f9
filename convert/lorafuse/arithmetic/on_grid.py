"""Rounding onto the grid that a weight is already stored on, without bias.

The grid of an element are the values that its code can stand for, its scale being given. A sum x = W + Δ
between two neighbouring values a < b becomes b with probability p = (x - a) / (b - a), else a, so that its
expected value is x; beyond the grid's ends it becomes the end (it is *clipped*). W itself is a value of the
grid: without an update nothing moves, and a small update seldom moves a code.

With u of draws.py, x becomes b where u < p. Rounding to the nearest value is the same with u = 1/2.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.draws import Draws

CHUNK_NUMEL = 1 << 16  # elements that are looked at at once: their buffers fit the cache
# Of a chunk: the update, the draws and flags of all elements, and, at worst, what settling them takes.
SCRATCH_NBYTES = CHUNK_NUMEL * 160
HALF = 128  # of the 256 values of a byte


class Grid(Protocol):
    """The values that the elements of a tile can have: position 0 is the lowest of each. Elements are indexes
    into the tile. `run`: scales are those of so many elements; the tile begins at element `skip` of a run."""

    n_positions: int
    run: int
    skip: int

    def positions(self, elements: torch.Tensor) -> torch.Tensor:
        """int64: where the stored codes are."""

    def decoded(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float64: what a reader decodes there."""

    def bound(self, sizes: torch.Tensor, first_run: int) -> None:
        """Makes of |Δ| (fp32, of whole runs, from `first_run` on), in place, at least 256 · p; of 0 0, or
        NaN."""

    def ends(self, start: int, stop: int) -> torch.Tensor:
        """int64: the elements in [start, stop) whose sums may be clipped, since their codes are the lowest or
        the highest; others may be among them."""

    def write(self, elements: torch.Tensor, positions: torch.Tensor) -> None:
        """Change the codes."""


class Settled(NamedTuple):
    """Elements that were looked at one by one: their new positions and values (float64), and how many lay
    beyond the grid."""

    elements: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    n_clipped: int


def settle(
    grid: Grid,
    elements: torch.Tensor,
    sums: torch.Tensor,
    bytes_drawn: torch.Tensor,
    draws: Draws | None,
    first: int,
) -> Settled:
    """Rounds `sums` (any floating-point dtype, of the elements given) in float64, in which differences of
    stored values are exact. `bytes_drawn`: the byte of each; `draws`: their fractions, with the index `first`
    of the tile's first element in the weight; None for 0. The code of a sum that is not finite stays; its
    value is the sum, so that whoever measures sees it."""
    x = sums.to(torch.float64)
    stored = grid.positions(elements)
    at, value = stored.clone(), grid.decoded(elements, stored)
    original = value.clone()
    finite = x.isfinite()
    direction = torch.where(finite, (x - value).sign(), 0.0)
    step = direction.to(torch.int64)
    following, ahead = value.clone(), torch.ones_like(step, dtype=torch.bool)
    moving = step.nonzero().view(-1)
    while len(moving):
        to = at[moving] + step[moving]
        inside = (to >= 0) & (to < grid.n_positions)
        ahead[moving[~inside]] = False
        moving, to = moving[inside], to[inside]
        beyond = grid.decoded(elements[moving], to)
        passed = (x[moving] - beyond) * direction[moving] >= 0
        following[moving[~passed]] = beyond[~passed]
        moving, to, beyond = moving[passed], to[passed], beyond[passed]
        at[moving], value[moving] = to, beyond
    clipped = ~ahead & (x != value)
    share = ((x - value) / (following - value)).masked_fill_((following == value) | ~ahead, 0.0).mul_(256.0)
    whole = share.floor()
    byte = bytes_drawn.to(torch.float64)
    up = byte < whole
    tie = ((byte == whole) & (share > whole)).nonzero().view(-1)
    if len(tie):
        fractions = draws.fractions(elements[tie] + first) if draws else torch.zeros_like(share[tie])
        up[tie] = fractions < share[tie] - whole[tie]
    at[up] += step[up]
    value = torch.where(up, following, value)
    # A code that stands for the same value stays.
    at = torch.where(value == original, stored, at)
    return Settled(elements, at, torch.where(finite, value, x), int((clipped & finite).sum()))


def round_tile(
    grid: Grid, base: torch.Tensor, sums: torch.Tensor, draws: Draws | None, first: int, arena: Arena
) -> tuple[torch.Tensor, int]:
    """Writes the codes of `sums` (fp32, 1-D) into the grid, whose stored codes decode to `base`; to the
    nearest value where `draws` is None. `first`: the tile's first element in the weight. Returns what a
    reader decodes, in the dtype of `base` and valid until the arena's next use, and the number of elements
    beyond the grid."""
    stored = arena.get("grid.stored", base.numel(), base.dtype).copy_(base)
    n_clipped = 0
    step = max(CHUNK_NUMEL // grid.run, 1) * grid.run
    for padded_start in range(0, grid.skip + base.numel(), step):
        start, stop = max(padded_start - grid.skip, 0), min(padded_start + step - grid.skip, base.numel())
        drawn = draws.bytes(first + start, first + stop, arena) if draws else None
        elements = _may_move(grid, base[start:stop], sums[start:stop], drawn, start, arena)
        if not len(elements):
            continue
        of_elements = torch.full_like(elements, HALF) if drawn is None else drawn[elements - start]
        settled = settle(grid, elements, sums[elements], of_elements, draws, first)
        grid.write(elements, settled.positions)
        stored[elements] = settled.values.to(stored.dtype)
        n_clipped += settled.n_clipped
    return stored, n_clipped


def _may_move(
    grid: Grid, base: torch.Tensor, sums: torch.Tensor, drawn: torch.Tensor | None, start: int, arena: Arena
) -> torch.Tensor:
    """int64: the elements of the tile, of those from `start` on that are given, of which the byte drawn does
    not say that they stay."""
    before = (grid.skip + start) % grid.run
    numel = -(-(before + base.numel()) // grid.run) * grid.run
    padded = arena.get("grid.update", numel, torch.float32)
    update = padded[before : before + base.numel()].copy_(base)
    padded[:before].zero_()
    padded[before + base.numel() :].zero_()
    torch.sub(sums, update, out=update).abs_()
    grid.bound(padded, (grid.skip + start) // grid.run)
    flags = arena.get("grid.flags", base.numel(), torch.bool)
    if drawn is None:
        torch.le(update, float(HALF), out=flags)
    else:
        bytes_drawn = arena.get("grid.drawn", base.numel(), torch.float32).copy_(drawn)
        torch.le(update, bytes_drawn, out=flags)
    flags[grid.ends(start, start + base.numel()) - start] = False
    # Those that do not stay, NaN among them.
    if arena.on_host:
        return torch.from_numpy(np.flatnonzero(np.logical_not(flags.numpy(), out=flags.numpy()))).add_(start)
    return flags.logical_not_().nonzero().view(-1).add_(start)
