"""The patch of most PEFT types beside LoRA: small adapter tensors held whole, and a function that updates rows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lorafuse.adapters.factor import load
from lorafuse.adapters.patch import Base, Patch
from lorafuse.checkpoint import Store
from lorafuse.codecs.sources import Arena
from lorafuse.tensors import DTYPES

Tensors = dict[str, torch.Tensor]


class RowWise(Patch):
    """`update(tile, first_row, tensors)` changes fp32 rows in place.

    `keys` maps the names that the function uses to adapter tensors, loaded as fp32 (integers as int64) in their own shapes.
    `begin(tensors, base)` may turn them once per weight into what the rows need, at most `begin_nbytes` of it, and read the
    base for statistics.
    """

    def __init__(
        self,
        store: Store,
        keys: Mapping[str, str],
        update: Callable[[torch.Tensor, int, Tensors], None],
        *,
        begin: Callable[[Tensors, Base], Tensors] | None = None,
        begin_nbytes: int = 0,
        scratch_nbytes: int = 0,
        row_multiple: int = 1,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._store, self._keys, self._update, self._begin = store, dict(keys), update, begin
        self._begin_nbytes, self._scratch_nbytes, self._row_multiple = begin_nbytes, scratch_nbytes, row_multiple
        self._facts = dict(facts or {})
        self._tensors: Tensors = {}

    @property
    def facts(self) -> dict[str, Any]:
        return self._facts

    @property
    def nbytes(self) -> int:
        specs = [self._store.tensors[key].spec for key in self._keys.values()]
        return self._begin_nbytes + sum(spec.numel * max(4, DTYPES[spec.dtype][0]) for spec in specs)

    @property
    def scratch_nbytes(self) -> int:
        return self._scratch_nbytes

    @property
    def reads_base(self) -> bool:
        return self._begin is not None

    @property
    def row_multiple(self) -> int:
        return self._row_multiple

    def prepare(self, base: Base, arena: Arena) -> None:
        self._tensors = {name: load(self._store, key, arena.device) for name, key in self._keys.items()}
        if self._begin is not None:
            self._tensors = self._begin(self._tensors, base)

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        self._update(tile, first_row, self._tensors)

    def release(self) -> None:
        self._tensors = {}


def product_added(scale: float) -> Callable[[torch.Tensor, int, Tensors], None]:
    """rows += scale · left[rows] @ right, for a `begin` that makes `left` [n_rows, r] and `right` [r, n_cols]."""

    def update(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
        tile.addmm_(tensors["left"][first_row : first_row + tile.shape[0]], tensors["right"], alpha=scale)

    return update


def oriented(left: torch.Tensor, right: torch.Tensor, *, transposed: bool) -> Tensors:
    """The factors of left @ right, or of its transpose."""
    return {"left": right.T, "right": left.T} if transposed else {"left": left, "right": right}
