"""Rounding onto the grid that a weight is already stored on, without bias.

The grid of an element are the values that its code can stand for, its scale being given. A sum x = W + Δ
between two neighbouring values a < b becomes b with probability p = (x - a) / (b - a), else a, so that its
expected value is x; beyond the grid's ends it becomes the end (it is *clipped*). W itself is a value of the
grid: without an update nothing moves, and a small update seldom moves a code.

With u of draws.py, a sum between W and its neighbour b becomes b where u < p = (x - W) / (b - W). Rounding to
the nearest value is the same with u = 1/2. Most elements stay, and the byte of u alone says so for most of
them: `bound` is cheap, and only what it does not settle is looked at exactly, in float64, in which
differences of stored values are exact.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lorafuse.arithmetic import compiled
from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.draws import TileDraws
from lorafuse.arithmetic.measure import Measures, of_sums

CHUNK_NUMEL = 1 << 17  # elements that are looked at at once: their buffers fit the cache
SETTLED_NUMEL = 1 << 13  # looked at exactly at once: small enough for malloc to reuse memory
# Of a chunk: the update, the draws and flags of all elements, and, at worst, what settling them takes.
SCRATCH_NBYTES = CHUNK_NUMEL * 40


class Grid(Protocol):
    """The values that the elements of a tile can have: position 0 is the lowest of each. Elements are indexes
    into the tile, int64. `run`: scales are those of so many elements; the tile begins at element `skip` of a
    run."""

    n_positions: int
    run: int
    skip: int

    def begin(self) -> None:
        """Puts the stored codes where `write` changes them, unless they are there: before anything else, but
        not where the compiled kernel does it."""
        return

    def positions(self, elements: torch.Tensor) -> torch.Tensor:
        """int64: where the stored codes are."""

    def decoded(self, elements: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float64: what a reader decodes there."""

    def bound(self, sizes: torch.Tensor, first_run: int) -> None:
        """Makes of |Δ| (fp32, of whole runs, from `first_run` on), in place, at least 256 · p; of 0 0, or
        NaN."""

    def limits(self, first_run: int, last_run: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and the highest value in each of these runs, fp32."""

    def write(self, elements: torch.Tensor, before: torch.Tensor, positions: torch.Tensor) -> None:
        """Change the codes, whose positions were `before`."""

    def coded(self) -> compiled.Coded | None:
        """What the compiled kernel needs; None where it does not know such a grid."""
        return None


class Rounded(NamedTuple):
    """A tile on a grid. `values`: what a reader decodes, in the dtype of the base and valid until the arena's
    next use; the value of a sum that is not finite is the sum, so that whoever measures sees it. `n_clipped`:
    elements beyond the grid. `measures`: those of the tile, where they were taken in passing."""

    values: torch.Tensor
    n_clipped: int
    measures: Measures | None = None


def round_tile(
    grid: Grid,
    base: torch.Tensor,
    sums: torch.Tensor,
    draws: TileDraws,
    arena: Arena,
    *,
    measured: bool = False,
) -> Rounded:
    """Writes the codes of `sums` (fp32, 1-D) into the grid, whose stored codes decode to `base`. `measured`:
    the tile is measured in passing, where that is cheap."""
    if arena.kernel and (coded := grid.coded()) and coded.dtype == base.dtype:
        given = coded, base, sums, draws.seeded(), arena
        values, n_clipped, found = compiled.round_tile(arena.kernel, *given, measured=measured)
        return Rounded(values, n_clipped, of_sums(found, base, values) if found else None)
    grid.begin()
    stored = arena.get("grid.stored", base.numel(), base.dtype).copy_(base)
    n_clipped, exactly = 0, _Exactly(grid, base, sums, stored, draws)
    for start, stop in _parts(grid, base.numel()):
        chunk = _Chunk(grid, base[start:stop], sums[start:stop], start, arena)
        n_clipped += chunk.n_clipped()
        drawn = draws.bytes(start, stop, arena)
        elements = chunk.may_move(drawn)
        byte = drawn.index_select(0, elements).to(torch.float64)
        exactly.look_at(elements.add_(start), byte)
    exactly.finish()
    return Rounded(stored, n_clipped)


def count_beyond(grid: Grid, values: torch.Tensor, arena: Arena) -> int:
    """How many values (1-D) of a tile are beyond the grid."""
    chunks = (
        _Chunk(grid, values[start:stop], values[start:stop], start, arena)
        for start, stop in _parts(grid, values.numel())
    )
    return sum(chunk.n_clipped() for chunk in chunks)


def _parts(grid: Grid, numel: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of chunks of a tile, each of whole runs but for the tile's ends."""
    step = max(CHUNK_NUMEL // grid.run, 1) * grid.run
    for at in range(0, grid.skip + numel, step):
        yield max(at - grid.skip, 0), min(at + step - grid.skip, numel)


class _Waiting:
    """Elements with their bytes, until they are many: a call costs more than its work on a few."""

    def __init__(self, settle: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._settle, self._parts, self._n = settle, list[tuple[torch.Tensor, torch.Tensor]](), 0

    def add(self, elements: torch.Tensor, byte: torch.Tensor) -> None:
        self._parts.append((elements, byte))
        self._n += len(elements)
        if self._n >= SETTLED_NUMEL:
            self.finish()

    def finish(self) -> None:
        if self._n:
            elements, byte = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
            for at in range(0, self._n, SETTLED_NUMEL):
                self._settle(elements[at : at + SETTLED_NUMEL], byte[at : at + SETTLED_NUMEL])
        self._parts, self._n = [], 0


class _Exactly:
    """The elements of a tile that are looked at one by one."""

    def __init__(
        self,
        grid: Grid,
        base: torch.Tensor,
        sums: torch.Tensor,
        stored: torch.Tensor,
        draws: TileDraws,
    ) -> None:
        self._grid, self._base, self._sums, self._stored = grid, base, sums, stored
        self._fractions = draws.fractions
        self._near, self._far = _Waiting(self._settle_near), _Waiting(self._settle_far)
        self.look_at = self._near.add

    def finish(self) -> None:
        self._near.finish()
        self._far.finish()

    def _of(self, values: torch.Tensor, elements: torch.Tensor) -> torch.Tensor:
        return values.index_select(0, elements).to(torch.float64)

    def _move(
        self, elements: torch.Tensor, before: torch.Tensor, to: torch.Tensor, values: torch.Tensor
    ) -> None:
        self._grid.write(elements, before, to)
        self._stored.index_copy_(0, elements, values.to(self._stored.dtype))

    def _settle_near(self, elements: torch.Tensor, byte: torch.Tensor) -> None:
        """Those whose sum lies between the base and its neighbour; the others are left for later."""
        sums, base = self._of(self._sums, elements), self._of(self._base, elements)
        direction = (sums > base).to(torch.int64).mul_(2).sub_(1)
        before = self._grid.positions(elements)
        to = before + direction
        neighbour = self._grid.decoded(elements, to.clamp(0, self._grid.n_positions - 1))
        share = (sums - base).div_(neighbour - base).mul_(256.0).abs_()  # of 1 / -0, too
        whole = share.floor()
        # Not where the neighbour is passed, where there is none, or where it has the same value: there the
        # share is larger, or no number.
        between = share <= 256.0
        moves = byte < whole
        tie = ((byte == whole) & between).nonzero().view(-1)
        if len(tie):
            left = (share - whole).index_select(0, tie)
            moves[tie] = self._fractions(elements.index_select(0, tie)) < left
        chosen = (moves & between).nonzero().view(-1)
        self._move(*(values.index_select(0, chosen) for values in (elements, before, to, neighbour)))
        far = between.logical_not_().nonzero().view(-1)
        if len(far):
            self._far.add(elements.index_select(0, far), byte.index_select(0, far))

    def _settle_far(self, elements: torch.Tensor, byte: torch.Tensor) -> None:
        """Step by step until the sum lies between two values, or beyond the grid."""
        grid, sums = self._grid, self._of(self._sums, elements)
        before = grid.positions(elements)
        original = grid.decoded(elements, before)
        at, value, following = before.clone(), original.clone(), original.clone()
        finite = sums.isfinite()
        step = torch.where(finite, (sums - value).sign(), 0.0).nan_to_num_(0.0).to(torch.int64)
        going = step.nonzero().view(-1)
        while len(going):
            to = at[going] + step[going]
            inside = (to >= 0) & (to < grid.n_positions)
            following[going[~inside]] = torch.inf  # which is never reached
            going, to = going[inside], to[inside]
            beyond = grid.decoded(elements[going], to)
            passed = (sums[going] - beyond) * step[going] >= 0
            following[going[~passed]] = beyond[~passed]
            going, to, beyond = going[passed], to[passed], beyond[passed]
            at[going], value[going] = to, beyond
        share = (sums - value).div_(following - value).mul_(256.0).nan_to_num_(0.0).abs_()
        whole = share.floor()
        moves = (byte < whole) | ((byte == whole) & (self._fractions(elements) < share - whole))
        at += step * moves
        value = torch.where(moves, following, value)
        # A code that stands for the same value stays.
        at = torch.where(value == original, before, at)
        self._move(elements, before, at, torch.where(finite, value, sums))


class _Chunk:
    """Elements of a tile from `start` on, whole runs but for the tile's ends."""

    def __init__(self, grid: Grid, base: torch.Tensor, sums: torch.Tensor, start: int, arena: Arena) -> None:
        self._grid, self._base, self._sums, self._arena = grid, base, sums, arena
        self._first_run, before = divmod(grid.skip + start, grid.run)
        self._n_runs = -(-(before + base.numel()) // grid.run)
        # With what is missing of the first run and of the last, as 0.
        self._padded = arena.get("grid.padded", self._n_runs * grid.run, torch.float32)
        self._inner = self._padded[before : before + base.numel()]
        self._padded[:before].zero_()
        self._padded[before + base.numel() :].zero_()
        self._flags = arena.get("grid.flags", self._padded.numel(), torch.bool)

    def n_clipped(self) -> int:
        self._inner.copy_(self._sums)
        runs, flags = self._padded.view(self._n_runs, -1), self._flags.view(self._n_runs, -1)
        lowest, highest = self._grid.limits(self._first_run, self._first_run + self._n_runs)
        beyond = 0
        for compare, limit in (("greater", highest), ("less", lowest)):
            self._compare(compare, runs, limit[:, None], flags)
            beyond += int(np.count_nonzero(flags.numpy()) if self._arena.on_host else flags.count_nonzero())
        return beyond

    def may_move(self, drawn: torch.Tensor) -> torch.Tensor:
        """int64: the elements of the chunk of which the byte drawn does not say that they stay."""
        update, flags = self._inner.copy_(self._base), self._flags[: self._base.numel()]
        torch.sub(self._sums, update, out=update).abs_()
        self._grid.bound(self._padded, self._first_run)
        byte = self._arena.get("grid.byte", len(update), torch.float32)
        self._compare("less_equal", update, byte.copy_(drawn), flags)
        # Those of which it is not true that they stay: NaN is among them.
        if self._arena.on_host:
            return torch.from_numpy(np.flatnonzero(np.logical_not(flags.numpy(), out=flags.numpy())))
        return flags.logical_not_().nonzero().view(-1)

    def _compare(self, how: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        # numpy compares and counts several times as fast as torch on the host.
        if self._arena.on_host:
            getattr(np, how)(a.numpy(), b.numpy(), out=out.numpy())
        else:
            getattr(torch, how)(a, b, out=out)
