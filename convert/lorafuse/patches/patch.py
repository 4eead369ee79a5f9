"""What an adapter does to one weight: a tile goes in, a tile comes out.

A patch is not "a delta": it may replace rows or rescale them. `prepare` and `release` bracket the tiles of
its weight.
"""

from collections.abc import Iterator
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


class Patch(Protocol):
    """An update of one weight. A class that lists it as its base takes the defaults below."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the receipt says about it: rank, scale."""
        return {}

    @property
    def nbytes(self) -> int:
        """Held from prepare to release."""
        return 0

    @property
    def scratch_nbytes(self) -> int:
        """Needed by each worker while it patches a tile."""
        return 0

    @property
    def stacked(self) -> bool:
        """The weight is a stack of matrices: its rows are those of all matrices, and a tile stays within one
        of them."""
        return False

    @property
    def members(self) -> tuple["Patch", ...]:
        """The patches that it is made of, if any."""
        return ()

    @property
    def reads_base(self) -> bool:
        """Whether prepare reads the weight."""
        return True

    @property
    def holds_weight(self) -> bool:
        """Whether it holds the whole weight from prepare to release, for a decomposition; the plan says
        so."""
        return any(patch.holds_weight for patch in self.members)

    @property
    def additive(self) -> bool:
        """Whether apply adds what does not depend on the values in the tile, so that it may follow another
        adapter's patches."""
        return False

    @property
    def follows_tie(self) -> bool:
        """Whether a tied embedding has this update too when the adapter names only the other."""
        return False

    @property
    def row_multiple(self) -> int:
        """Tiles start at multiples of this many rows, for patches that mix neighbouring rows."""
        return 1

    def prepare(self, base: Base, arena: Arena) -> None:
        """Load what the tiles need. `base` reads the weight, for statistics of the whole."""

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        """Update `tile` (fp32 [rows, n_cols], rows from first_row on) in place."""

    def release(self) -> None:
        """Drop what prepare loaded."""

    def same_as(self, other: "Patch") -> bool:
        """Whether both make the same update; tied weights need to know."""
        return False
