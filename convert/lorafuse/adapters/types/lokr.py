"""PEFT's LoKr: W += alpha / r · kron(w1, w2), on Linear, Conv1d and Conv2d (KronA, arXiv 2212.10650; LyCORIS;
PEFT 0.21 lokr/layer.py, get_delta_weight).

Each factor is stored whole (lokr_w1, lokr_w2) or as a product (`_a`, `_b`), lokr_w2 also with a core
(lokr_t2); the tensors say which. When both are whole, r is in no shape and comes from the config. Dropouts
concern training only.
"""

import math
from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import misfit, n_cols_of, not_one_update, refuse_conv1d, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.adapters.reading.lycoris import Factors, multiply_out, scaling_of
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect, once, take
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv1d, Conv2d; whole and factored w1, w2"
MEMORY = "tiles"

_LEAVES = rf"lokr_\w+{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_kronecker, adapter, scale, once(warn)), warn)


def _kronecker(adapter: AdapterDir, scale: float, warn: Warn, module: str, leaves: Leaves) -> list[Update]:
    if not any(leaf.startswith("lokr_") for leaf in leaves):
        return []
    w1, w2 = (
        _Side(adapter, module, leaves, "lokr_w1", None),
        _Side(adapter, module, leaves, "lokr_w2", "lokr_t2"),
    )
    keys = w1.keys + w2.keys
    if len(w1.shape) != 2 or (w1.rank and w2.rank and w1.rank != w2.rank):
        raise not_one_update(adapter, *keys)
    rank = w2.rank or w1.rank
    scaling = scale * scaling_of(adapter, module, rank, warn)

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, keys[0], target)
        n_rows, n_cols = w1.shape[0] * w2.shape[0], w1.shape[1] * math.prod(w2.shape[1:])
        if (n_rows, n_cols) != (target.spec.shape[0], n_cols_of(target)) or not w2.is_kernel(
            target.spec.shape
        ):
            raise misfit(adapter, target, *keys)
        return RowFunction(
            adapter.store,
            w1.named | w2.named,
            partial(_add_swapped if w2.swapped else _add, scaling=scaling),
            begin=partial(_begin, shape2=w2.shape),
            begin_nbytes=math.prod(w1.shape) * 12 + w2.begin_nbytes,
            scratch_nbytes=2 * tile_nbytes(target.spec),
            facts={"scale": scaling} | ({"rank": rank} if rank else {}),
        )

    return [Update(f"{module}.weight", keys, make=make)]


class _Side:
    """One factor of the Kronecker product: its keys by leaf, logical shape and rank (None when it is stored
    whole)."""

    def __init__(self, adapter: AdapterDir, module: str, leaves: Leaves, name: str, core: str | None) -> None:
        whole = leaves.pop(name, None)
        self.rank: int | None = None
        self.begin_nbytes = 0
        self._factors: Factors | None = None
        if whole is not None:
            check_float(adapter, whole)
            self.named, self.shape = {name: whole}, shape_of(adapter, whole)
            if len(self.shape) < 2 or math.prod(self.shape) == 0:
                raise not_one_update(adapter, whole)
        else:
            pair = take(adapter, module, leaves, (f"{name}_a", f"{name}_b"))
            if pair is None:
                raise AdapterError(f"{adapter.file}: {shown(module)} has no {name} and no {name}_a.")
            t = leaves.pop(core, None) if core else None
            self._factors = Factors(adapter, pair[0], pair[1], t)
            self.named = {f"{name}_a": pair[0], f"{name}_b": pair[1]} | ({core: t} if core and t else {})
            self.shape = (self._factors.n_rows, self._factors.n_cols)
            self.rank, self.begin_nbytes = self._factors.rank, self._factors.begin_nbytes
        self.keys = tuple(self.named.values())

    @property
    def swapped(self) -> bool:
        """A whole w2 of Conv1d, 3-D: kron then takes w1 for (1, rows, cols), and the product (b, a·d, c·k) is
        read as (a·b, c·d, k) in memory order, in training too."""
        return len(self.shape) == 3

    def is_kernel(self, shape: tuple[int, ...]) -> bool:
        if self._factors is not None:
            return self._factors.is_kernel(shape)
        return len(self.shape) == 2 or self.shape[2:] == shape[2:]


def _begin(tensors: Tensors, shape2: tuple[int, ...]) -> Tensors:
    ready = {}
    ready["w1"] = (
        tensors["lokr_w1"] if "lokr_w1" in tensors else _product(tensors["lokr_w1_a"], tensors["lokr_w1_b"])
    )
    if "lokr_w2" in tensors:
        ready["w2"] = tensors["lokr_w2"].view(shape2[0], shape2[1], -1)
    else:
        ready["left2"], ready["right2"] = multiply_out(tensors, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return ready


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double()).float()


def _add(tile: torch.Tensor, first_row: int, tensors: Tensors, scaling: float) -> None:
    """Row i·b + p, column j·m + q: w1[i, j] · w2[p, q], w2 being a matrix [b, m]."""
    whole, w1 = tensors.get("w2"), tensors["w1"]
    rows = torch.arange(first_row, first_row + tile.shape[0], device=tile.device)
    b = (tensors["left2"] if whole is None else whole).shape[0]
    p = rows % b
    w2 = tensors["left2"][p] @ tensors["right2"] if whole is None else whole.flatten(1)[p]  # [n, m]
    w1 = w1[rows.div(b, rounding_mode="floor")]  # [n, c]
    tile.view(len(rows), w1.shape[1], -1).addcmul_(w1[:, :, None], w2[:, None, :], value=scaling)


def _add_swapped(tile: torch.Tensor, first_row: int, tensors: Tensors, scaling: float) -> None:
    """Row p·a + i, column (q·c + j)·k + l: w1[i, j] · w2[p, q, l]."""
    w1, w2 = tensors["w1"], tensors["w2"]  # [a, c], [b, d, k]
    rows = torch.arange(first_row, first_row + tile.shape[0], device=tile.device)
    a, c = w1.shape
    w1, w2 = w1[rows % a], w2[rows.div(a, rounding_mode="floor")]  # [n, c], [n, d, k]
    tile.view(len(rows), w2.shape[1], c, -1).addcmul_(w1[:, None, :, None], w2[:, :, None, :], value=scaling)
