"""The patch of most PEFT types beside LoRA: small adapter tensors held whole, and a function that updates
rows."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.files.stores import Store
from lorafuse.files.tensors import TensorSpec
from lorafuse.patches.factor import load, loaded_nbytes, same_tensor
from lorafuse.patches.patch import TILE_NUMEL, Base, Patch, PatchNeeds, PatchTraits

Tensors = dict[str, torch.Tensor]
UpdateRows = Callable[[torch.Tensor, int, Tensors], None]


class RowFunction(Patch):
    """`update(tile, first_row, tensors)` changes fp32 rows in place.

    `keys` maps the names that the function uses to adapter tensors, loaded as fp32 (integers as int64) in
    their own shapes. `begin(tensors)` may turn them once per weight into what the rows need, or
    `begin_from(tensors, base)` with what it reads in the weight; beside the tensors these hold at most
    `begin_nbytes`, and `update` at most `scratch_nbytes`.

    The functions are those of a module, with what else they need bound by `partial`: nothing that decides the
    update is hidden in a closure, so that two patches can be compared.
    """

    def __init__(
        self,
        store: Store,
        keys: Mapping[str, str],
        update: UpdateRows,
        *,
        begin: Callable[[Tensors], Tensors] | None = None,
        begin_from: Callable[[Tensors, Base], Tensors] | None = None,
        begin_nbytes: int = 0,
        scratch_nbytes: int = 0,
        row_multiple: int = 1,
        holds_weight: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._store, self._keys = store, dict(keys)
        self._update, self._begin, self._begin_from = update, begin, begin_from
        self._formula = tuple(_bound(function) for function in (update, begin, begin_from))
        self._facts = dict(facts or {})
        self._tensors: Tensors = {}
        tensors_nbytes = sum(loaded_nbytes(store.tensors[key].spec) for key in self._keys.values())
        self.needs = PatchNeeds(
            nbytes=begin_nbytes + tensors_nbytes,
            scratch_nbytes=scratch_nbytes,
            row_multiple=row_multiple,
            reads_base=begin_from is not None,
            holds_weight=holds_weight,
        )
        self.traits = PatchTraits()

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def prepare(self, base: Base, arena: Arena) -> None:
        tensors = {name: load(self._store, key, arena.device) for name, key in self._keys.items()}
        if self._begin is not None:
            tensors = self._begin(tensors)
        if self._begin_from is not None:
            tensors = self._begin_from(tensors, base)
        self._tensors = tensors

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        self._update(tile, first_row, self._tensors)

    def release(self) -> None:
        self._tensors = {}

    def same_as(self, other: Patch) -> bool:
        """By the functions, what is bound to them, and the adapter's tensors, read in pieces."""
        return (
            isinstance(other, RowFunction)
            and self._formula == other._formula
            and self.needs.row_multiple == other.needs.row_multiple
            and self._keys.keys() == other._keys.keys()
            and all(
                same_tensor(self._store, key, other._store, other._keys[name])
                for name, key in self._keys.items()
            )
        )


def _bound(function: Callable[..., Any] | None) -> object:
    """What decides the result of a function, beside its arguments, as a value that can be compared."""
    if isinstance(function, partial):
        return _bound(function.func), function.args, function.keywords
    assert function is None or (function.__closure__ is None and function.__defaults__ is None), (
        "bind by partial"
    )
    return function


def product_added(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    """rows += scale · left[rows] @ right, for a `begin` that makes `left` [n_rows, r] and `right` [r,
    n_cols]."""
    tile.addmm_(tensors["left"][first_row : first_row + tile.shape[0]], tensors["right"], alpha=scale)


def sparse_added(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    """W.flat[positions] += scale · values, for a `begin` that makes both in the order of `positions`; these
    may repeat."""
    first = first_row * tile.shape[1]
    bounds = torch.tensor([first, first + tile.numel()], dtype=torch.int64, device=tile.device)
    start, stop = torch.searchsorted(tensors["positions"], bounds).tolist()
    tile.view(-1).index_add_(
        0, tensors["positions"][start:stop] - first, tensors["values"][start:stop], alpha=scale
    )


def oriented(left: torch.Tensor, right: torch.Tensor, transposed: bool) -> Tensors:
    """The factors of left @ right, or of its transpose."""
    return {"left": right.T, "right": left.T} if transposed else {"left": left, "right": right}


def read_whole(base: Base) -> torch.Tensor:
    """float32 [n_rows, n_cols], the weight before any patch, for those that need its decomposition."""
    weight = torch.empty(base.shape, dtype=torch.float32, device=base.arena.device)
    for start, rows in base.tiles():
        weight[start : start + rows.shape[0]] = rows
    return weight


def tile_nbytes(weight: TensorSpec, row_multiple: int = 1) -> int:
    """Bytes of a tile of that weight in fp32, what a temporary of a tile's size takes."""
    return 4 * min(max(TILE_NUMEL, row_multiple * weight.n_cols), weight.numel)


def reading_nbytes(weight: TensorSpec) -> int:
    """Bytes that `Base` takes to read a weight in tiles: packed, and decoded in two dtypes."""
    return 3 * tile_nbytes(weight)
