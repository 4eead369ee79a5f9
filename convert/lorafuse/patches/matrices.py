"""Updates of single matrices of a weight that is a stack of them: LoRA on experts one by one, where the
checkpoint has the experts stacked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Base, Patch, PatchNeeds, PatchTraits


@dataclass(frozen=True, slots=True)
class MatrixUpdate:
    """The update of these rows and columns of one matrix; `update` sees them as a matrix of their own."""

    matrix: int
    rows: range
    cols: range
    update: LowRank

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        """`tile`: rows of the matrix, from `first_row` on."""
        step = self.rows.step
        first = max(-(-(first_row - self.rows.start) // step), 0)  # of the own rows, the first in the tile
        last = min(-(-(first_row + tile.shape[0] - self.rows.start) // step), len(self.rows))
        if first < last:
            start, stop = self.rows[first] - first_row, self.rows[last - 1] - first_row + 1
            own = tile[start:stop:step, self.cols.start : self.cols.stop : self.cols.step]
            self.update.apply(own, first, arena)

    def same_as(self, other: "MatrixUpdate") -> bool:
        mine, its = ((u.matrix, u.rows, u.cols) for u in (self, other))
        return mine == its and self.update.same_as(other.update)


class Matrices(Patch):
    """The updates of some matrices of a stack [E, n_rows, n_cols]. The factors of the two matrices that were
    used last are kept: tiles come in order, so workers are at most at a boundary between two."""

    traits = PatchTraits(additive=True)

    def __init__(self, updates: Sequence[MatrixUpdate], n_rows: int) -> None:
        self.updates, self._n_rows = tuple(updates), n_rows
        self._of_matrix: dict[int, list[MatrixUpdate]] = {}
        for update in updates:
            self._of_matrix.setdefault(update.matrix, []).append(update)
        self._loaded: dict[int, list[MatrixUpdate]] = {}
        self._base: Base | None = None
        self._lock = Lock()
        # Of one matrix; a worker may load a third.
        held = max(sum(u.update.needs.nbytes for u in own) for own in self._of_matrix.values())
        scratch = max(update.update.needs.scratch_nbytes for update in updates)
        self.needs = PatchNeeds(
            nbytes=2 * held, scratch_nbytes=held + scratch, stacked=True, reads_base=False
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.updates[0].update.facts

    def prepare(self, base: Base, arena: Arena) -> None:
        self._base = base

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        matrix, row = divmod(first_row, self._n_rows)
        for update in self._prepared(matrix, arena):
            update.apply(tile, row, arena)

    def _prepared(self, matrix: int, arena: Arena) -> list[MatrixUpdate]:
        with self._lock:
            if matrix not in self._loaded:
                assert self._base is not None, "apply outside prepare and release"
                while len(self._loaded) > 1:
                    del self._loaded[min(self._loaded)]
                self._loaded[matrix] = [self._copy(u, arena) for u in self._of_matrix.get(matrix, ())]
            return self._loaded[matrix]

    def _copy(self, update: MatrixUpdate, arena: Arena) -> MatrixUpdate:
        """With its factors in memory, which go when it goes: another worker may use it still."""
        assert self._base is not None
        inner = update.update
        own = LowRank(inner.left, inner.right, inner.scale, right_resident=inner.right_resident)
        own.prepare(self._base, arena)
        return MatrixUpdate(update.matrix, update.rows, update.cols, own)

    def release(self) -> None:
        self._loaded, self._base = {}, None

    def same_as(self, other: Patch) -> bool:
        return (
            isinstance(other, Matrices)
            and self._n_rows == other._n_rows
            and len(self.updates) == len(other.updates)
            and all(a.same_as(b) for a, b in zip(self.updates, other.updates, strict=True))
        )


def joined(patches: Sequence[Patch]) -> list[Patch]:
    """The patches of one weight, with all updates of single matrices in one, where the first of them is."""
    updates = [update for patch in patches if isinstance(patch, Matrices) for update in patch.updates]
    result: list[Patch] = []
    for patch in patches:
        if not isinstance(patch, Matrices):
            result.append(patch)
        elif updates:
            result.append(Matrices(updates, patch._n_rows))
            updates = []
    return result
