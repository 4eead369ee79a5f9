"""The patch of trainable tokens and of layers trained whole: some rows of a weight are replaced."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.patches.factor import Factor
from lorafuse.patches.patch import TILE_NUMEL, Base, Patch, PatchNeeds, PatchTraits


class ReplaceRows(Patch):
    """W[indices] = rows; with a scale other than 1, W[indices] += scale · (rows − W[indices]).

    The rows are read when their tile is made, so nothing is held. PEFT 0.21 trainable_tokens/layer.py, merge,
    copies them likewise: what PEFT calls a delta is the new row itself.
    """

    traits = PatchTraits(follows_tie=True)

    def __init__(self, rows: Factor, indices: Sequence[int], scale: float) -> None:
        self.rows, self.scale = rows, scale
        self.indices = sorted(indices)
        self._stored = sorted(range(len(indices)), key=indices.__getitem__)  # stored row of each index
        n_cols = max(rows.shape[1], 1)
        n_rows = min(len(self.indices), max(TILE_NUMEL // n_cols, 1))
        self.needs = PatchNeeds(scratch_nbytes=8 * n_cols * n_rows, reads_base=False)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"rows": len(self.indices), "scale": self.scale}

    def prepare(self, base: Base, arena: Arena) -> None:
        """Nothing is held."""

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        for row, stored, n_rows in self._runs(first_row, first_row + tile.shape[0]):
            new = self.rows.rows(stored, stored + n_rows, arena)
            old = tile[row - first_row : row - first_row + n_rows]
            if self.scale == 1.0:
                old.copy_(new)  # rather than W + (new − W), which rounds
            else:
                old.add_(new.sub_(old), alpha=self.scale)

    def _runs(self, first_row: int, stop_row: int) -> Iterator[tuple[int, int, int]]:
        """(row, stored row, count) of neighbours in both, between two rows of the weight."""
        start, stop = bisect_left(self.indices, first_row), bisect_left(self.indices, stop_row)
        while start < stop:
            n = 1
            while start + n < stop and self._follows(start + n):
                n += 1
            yield self.indices[start], self._stored[start], n
            start += n

    def _follows(self, i: int) -> bool:
        return self.indices[i] == self.indices[i - 1] + 1 and self._stored[i] == self._stored[i - 1] + 1

    def release(self) -> None:
        """Nothing is held."""

    def same_as(self, other: Patch) -> bool:
        if not isinstance(other, ReplaceRows) or (self.scale, self.indices) != (other.scale, other.indices):
            return False
        arenas = [Arena(torch.device("cpu")), Arena(torch.device("cpu"))]
        pairs = zip(self._stored, other._stored, strict=True)
        return all(
            torch.equal(self.rows.rows(a, a + 1, arenas[0]), other.rows.rows(b, b + 1, arenas[1]))
            for a, b in pairs
        )
