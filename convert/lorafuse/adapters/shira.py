"""PEFT's SHiRA: single elements of a Linear's weight plus trained values (arXiv 2406.13175; PEFT 0.21 shira/layer.py,
get_delta_weight).

shira_indices [2, n] are rows and columns, int32, or float32 when saved on Windows; values of an element that occurs twice add up.
"""

import torch

from lorafuse.adapters.keys import check_float
from lorafuse.adapters.modules import Warn, collect, not_one_update, refuse_conv1d, take_all
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import AdapterDir
from lorafuse.errors import AdapterError, shown

_LEAVES = r"shira_\w+(\.(?P<name>[^.]+))?"
_INDEX_DTYPES = ("I32", "I64", "F32")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> tuple[list[Update], dict[str, str]]:
    """Everything the adapter does, and the tensors that it ignores with the reason of each."""
    return collect(adapter, _LEAVES, lambda module, leaves: _sparse(adapter, module, leaves, scale), warn)


def _sparse(adapter: AdapterDir, module: str, leaves: dict[str, str], scale: float) -> list[Update]:
    keys = take_all(adapter, module, leaves, ("shira_weight", "shira_indices"))
    if keys is None:
        return []
    check_float(adapter, keys[0])
    values, indices = (adapter.store.tensors[key].spec for key in keys)
    if len(values.shape) != 1 or indices.shape != (2, *values.shape) or indices.dtype not in _INDEX_DTYPES:
        raise not_one_update(adapter, keys)

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, keys[0], target)
        if len(target.spec.shape) != 2:
            raise AdapterError(
                f"{adapter.file}: {shown(keys[0])} updates {shown(target.name)} {list(target.spec.shape)}, which is not the weight "
                "of a Linear."
            )

        def begin(tensors: Tensors, base: Base) -> Tensors:
            return _begin(adapter, keys[1], target, tensors)

        return RowWise(
            adapter.store,
            {"values": keys[0], "indices": keys[1]},
            lambda tile, first_row, tensors: _add(tile, first_row, tensors, scale),
            begin=begin,
            # Indices are loaded as int64 from 4 bytes each; positions, their order and sorted copies.
            begin_nbytes=44 * values.numel,
            facts={"scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(adapter: AdapterDir, key: str, target: Target, tensors: Tensors) -> Tensors:
    """The values by their position in the flattened weight, in its order."""
    rows, columns = tensors["indices"].long()
    n_rows, n_cols = target.spec.shape
    for what, found, limit in (("row", rows, n_rows), ("column", columns, n_cols)):
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < limit:
            wrong = int(found.min()) if int(found.min()) < 0 else int(found.max())
            raise AdapterError(f"{adapter.file}: {shown(key)} names {what} {wrong} of {shown(target.name)}, which has {limit}.")
    positions, order = (rows * n_cols + columns).sort(stable=True)
    return {"positions": positions, "values": tensors["values"][order]}


def _add(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    n_rows, n_cols = tile.shape
    first = first_row * n_cols
    bounds = torch.tensor([first, first + n_rows * n_cols], device=tile.device)
    start, stop = torch.searchsorted(tensors["positions"], bounds).tolist()
    tile.view(-1).index_add_(0, tensors["positions"][start:stop] - first, tensors["values"][start:stop], alpha=scale)
