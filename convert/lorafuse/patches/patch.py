"""What an adapter does to one weight: a tile goes in, a tile comes out.

A patch is not "a delta": it may replace rows or rescale them. `prepare` and `release` bracket the tiles of
its weight.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Sources
from lorafuse.files.tensors import Box

# Elements of a tile. It depends on nothing, so that the bytes written do not either; a tile of this size
# stays in cache while it is decoded, updated and cast, and smaller ones cost more in calls (bench/tiles.py).
TILE_NUMEL = 1 << 19


@dataclass(frozen=True)
class Base:
    """The weight before any patch, as fp32, for patches that need a statistic of it: norms of columns, an
    SVD."""

    sources: Sources
    arena: Arena

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (of the first dimension) and elements per row."""
        return self.sources.spec.shape[0], self.sources.spec.n_cols

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, n_cols]; valid until the next call."""
        box = Box.of_rows(self.sources.spec, start, stop)
        values = self.sources.values(box, self.arena)
        return self.arena.get("base.rows", box.numel, torch.float32).copy_(values).view(-1, box.width)

    def tiles(self, numel: int = 1 << 18) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) over the whole weight, about `numel` elements at a time."""
        n_rows, n_cols = self.shape
        step = max(numel // max(n_cols, 1), 1)
        for start in range(0, n_rows, step):
            yield start, self.rows(start, min(start + step, n_rows))


@dataclass(frozen=True, slots=True)
class PatchNeeds:
    """What a patch needs of those who run it: memory, tiles of a certain kind, a look at the weight. The plan
    reads it."""

    nbytes: int = 0  # held from prepare to release
    scratch_nbytes: int = 0  # of each worker, while it patches a tile
    # Tiles start at multiples of this many rows, for patches that mix neighbouring rows.
    row_multiple: int = 1
    # The weight is a stack of matrices: its rows are those of all matrices, and a tile stays within one of
    # them.
    stacked: bool = False
    # Whether prepare reads the weight. A patch that does not say so is taken to: then it is refused where the
    # weight is not the whole parameter, rather than given the wrong values.
    reads_base: bool = True
    # Whether it holds the whole weight from prepare to release, for a decomposition; the plan says so.
    holds_weight: bool = False


@dataclass(frozen=True, slots=True)
class PatchTraits:
    """What is true of a patch's update, however it is run: what other updates and other weights may make of
    it."""

    # Whether apply adds what does not depend on the values in the tile, so that it may follow another
    # adapter's patches.
    additive: bool = False
    # Whether a tied embedding has this update too when the adapter names only the other.
    follows_tie: bool = False


class Patch(Protocol):
    """An update of one weight: four calls, and what it says of itself. Only `lighter` has a default.

    A patch that wraps others says what they say by `replace(inner.needs, …)`, so that it forgets nothing.
    """

    needs: PatchNeeds
    traits: PatchTraits

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What the receipt says about it: rank, scale."""

    @abstractmethod
    def prepare(self, base: Base, arena: Arena) -> None:
        """Load what the tiles need. `base` reads the weight, for statistics of the whole."""

    @abstractmethod
    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        """Update `tile` (fp32 [rows, n_cols], rows from first_row on) in place."""

    @abstractmethod
    def release(self) -> None:
        """Drop what prepare loaded."""

    @abstractmethod
    def same_as(self, other: "Patch") -> bool:
        """Whether both make the same update; tied weights need to know."""

    def lighter(self) -> "Patch | None":
        """Returns a patch with the same update, to the bit, that holds less and reads it again for each tile;
        None where there is none. The plan asks for it where the memory limit is too small for this patch."""
        return None


def same_patches(some: Sequence[Patch], others: Sequence[Patch]) -> bool:
    """Whether two lists of patches make the same update, patch by patch."""
    return len(some) == len(others) and all(a is b or a.same_as(b) for a, b in zip(some, others, strict=True))
