"""A patch of a parameter, applied to the weight that holds it beside others or holds some of its rows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.patches.patch import Base, Patch
from lorafuse.patches.target import Part


class OnRows(Patch):
    """Applies `inner`, a patch of a whole parameter, to the rows that `part` says. `inner` must not read the
    base nor mix rows."""

    def __init__(self, inner: Patch, part: Part) -> None:
        assert not inner.needs.reads_base and inner.needs.row_multiple == 1
        self.inner, self.part = inner, part
        self.needs, self.traits = inner.needs, inner.traits

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.inner.facts

    def lighter(self) -> "OnRows | None":
        inner = self.inner.lighter()
        return OnRows(inner, self.part) if inner else None

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

    def same_as(self, other: Patch) -> bool:
        """The same rows of the parameter on the same rows of a weight, whatever that weight's name."""
        return (
            isinstance(other, OnRows)
            and replace(self.part, weight="") == replace(other.part, weight="")
            and self.inner.same_as(other.inner)
        )
