"""PEFT's LoHa: W += alpha / r · (w1_a @ w1_b) ⊙ (w2_a @ w2_b), on Linear, Conv1d and Conv2d (FedPara, arXiv
2108.06098; PEFT 0.21 loha/layer.py, get_delta_weight).

With use_effective_conv2d each of the two matrices has a core (hada_t1, hada_t2) that spans the kernel.
Whether it has one, and the rank, is decided by the tensors. Dropouts concern training only.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import misfit, n_cols_of, not_one_update, refuse_conv1d
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.lycoris import Factors, multiply_out, scaling_of
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect, once, take
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv1d, Conv2d; effective convolutions"
MEMORY = "tiles"

_LEAVES = rf"hada_\w+{NAMED}"
_PLAIN = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_hadamard, adapter, scale, once(warn)), warn)


def _hadamard(adapter: AdapterDir, scale: float, warn: Warn, module: str, leaves: Leaves) -> list[Update]:
    names = _PLAIN + _CORES if any(core in leaves for core in _CORES) else _PLAIN
    keys = take(adapter, module, leaves, names)
    if keys is None:
        return []
    named = dict(zip(names, keys, strict=True))
    w1, w2 = (
        Factors(adapter, named[f"hada_w{i}_a"], named[f"hada_w{i}_b"], named.get(f"hada_t{i}"))
        for i in (1, 2)
    )
    if (w1.n_rows, w1.rank, w1.n_cols, w1.kernel) != (w2.n_rows, w2.rank, w2.n_cols, w2.kernel):
        raise not_one_update(adapter, *keys)
    scaling = scale * scaling_of(adapter, module, w1.rank, warn)

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, keys[0], target)
        if (w1.n_rows, w1.n_cols) != (target.spec.shape[0], n_cols_of(target)) or not w1.is_kernel(
            target.spec.shape
        ):
            raise misfit(adapter, target, *w1.keys)
        return RowFunction(
            adapter.store,
            named,
            partial(_add, scaling=scaling),
            begin=_begin,
            begin_nbytes=w1.begin_nbytes + w2.begin_nbytes,
            scratch_nbytes=2 * tile_nbytes(target.spec),
            facts={"rank": w1.rank, "scale": scaling},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(tensors: Tensors) -> Tensors:
    left1, right1 = multiply_out(tensors, "hada_w1_a", "hada_w1_b", "hada_t1")
    left2, right2 = multiply_out(tensors, "hada_w2_a", "hada_w2_b", "hada_t2")
    return {"left1": left1, "right1": right1, "left2": left2, "right2": right2}


def _add(tile: torch.Tensor, first_row: int, tensors: Tensors, scaling: float) -> None:
    rows = slice(first_row, first_row + tile.shape[0])
    tile.addcmul_(
        tensors["left1"][rows] @ tensors["right1"], tensors["left2"][rows] @ tensors["right2"], value=scaling
    )
