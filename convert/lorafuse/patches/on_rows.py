"""A patch of a parameter, applied to the weight that holds it beside others or holds some of its rows."""

from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.patches.patch import Base, Patch
from lorafuse.patches.target import Part


class OnRows(Patch):
    """Applies `inner`, a patch of a whole parameter, to the rows that `part` says. `inner` must not read the
    base nor mix rows."""

    def __init__(self, inner: Patch, part: Part) -> None:
        assert not inner.reads_base and inner.row_multiple == 1
        self.inner, self.part = inner, part

    @property
    def facts(self) -> dict[str, Any]:
        return self.inner.facts

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def scratch_nbytes(self) -> int:
        return self.inner.scratch_nbytes

    @property
    def reads_base(self) -> bool:
        return False

    @property
    def additive(self) -> bool:
        return self.inner.additive

    @property
    def members(self) -> tuple[Patch, ...]:
        return (self.inner,)

    def prepare(self, base: Base, arena: Arena) -> None:
        self.inner.prepare(base, arena)

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        start = max(self.part.weight_row, first_row)
        stop = min(self.part.weight_row + self.part.n_rows, first_row + tile.shape[0])
        if start < stop:
            moved = self.part.row - self.part.weight_row
            self.inner.apply(tile[start - first_row : stop - first_row], start + moved, arena)

    def release(self) -> None:
        self.inner.release()
