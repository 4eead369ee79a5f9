"""PEFT's SHiRA: single elements of a Linear's weight plus trained values (arXiv 2406.13175; PEFT 0.21
shira/layer.py, get_delta_weight).

shira_indices [2, n] are rows and columns, int32, or float32 when saved on Windows; values of an element that
occurs twice add up.
"""

from functools import partial

from lorafuse.adapters.reading.check_tensors import check_positions, misfit, not_one_update, refuse_conv1d
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.errors import shown
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, sparse_added
from lorafuse.patches.target import Target

SUPPORTED = "Linear; files that hold their indices"
MEMORY = "tiles"

_LEAVES = rf"shira_\w+{NAMED}"
_INDEX_DTYPES = ("I32", "I64", "F32")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_sparse, adapter, scale), warn)


def _sparse(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    keys = take(adapter, module, leaves, ("shira_weight", "shira_indices"))
    if keys is None:
        return []
    check_float(adapter, keys[0])
    values, indices = (adapter.store.tensors[key].spec for key in keys)
    if len(values.shape) != 1 or indices.shape != (2, *values.shape) or indices.dtype not in _INDEX_DTYPES:
        raise not_one_update(adapter, *keys)
    n = values.numel

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, keys[0], target)
        if len(target.spec.shape) != 2:
            raise misfit(adapter, target, keys[0])
        n_rows, n_cols = target.spec.shape
        check_positions(adapter, keys[1], n_rows, f"rows of {shown(target.name)}", stop=n, in_base=True)
        check_positions(adapter, keys[1], n_cols, f"columns of {shown(target.name)}", start=n, in_base=True)
        return RowFunction(
            adapter.store,
            {"values": keys[0], "indices": keys[1]},
            partial(sparse_added, scale=scale),
            begin=partial(_begin, n_cols=n_cols),
            # The indices as int64, if they were not; positions, their order and sorted copies.
            begin_nbytes=16 * n + 40 * n,
            scratch_nbytes=8 * n,
            facts={"scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(tensors: Tensors, n_cols: int) -> Tensors:
    """The values by their position in the flattened weight, in its order."""
    rows, columns = tensors["indices"].long()
    positions, order = (rows * n_cols + columns).sort(stable=True)
    return {"positions": positions, "values": tensors["values"][order]}
