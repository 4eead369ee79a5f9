"""PEFT's MiSS, the later name of Bone: a small block added to every shard of a Linear's weight (arXiv 2409.15371; PEFT 0.21
miss/layer.py, get_delta_weight and get_delta_weight_miss).

`init_weights` says which: by default miss_block is (r, out) and W[o, c] += block[c mod r, o], the last shard being cut; "mini"
stores only the first mini_r columns of a block that repeats; "bat" has a block M (r, r) for each r rows, and every r × r part P of
those rows becomes P + P M + M.
"""

import torch

from lorafuse.adapters.keys import check_float
from lorafuse.adapters.modules import Warn, collect, misfit, refuse_conv1d, tile_nbytes
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, shown

_LEAVES = r"miss_\w+(\.(?P<name>[^.]+))?"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> tuple[list[Update], dict[str, str]]:
    """Everything the adapter does, and the tensors that it ignores with the reason of each."""
    variant = adapter.config.get("init_weights", True)
    if variant not in (True, False, "bat", "mini"):
        raise AdapterError(
            f"{adapter.path / CONFIG}: init_weights is {shown(variant)}, expected true, false, 'bat' or 'mini', which say how "
            "miss_block is applied."
        )
    return collect(adapter, _LEAVES, lambda module, leaves: _shards(adapter, module, leaves, scale, variant), warn)


def _shards(adapter: AdapterDir, module: str, leaves: dict[str, str], scale: float, variant: bool | str) -> list[Update]:
    key = leaves.pop("miss_block", None)
    if key is None:
        return []
    check_float(adapter, key)
    spec = adapter.store.tensors[key].spec
    bat = variant == "bat"
    if len(spec.shape) != (3 if bat else 2) or spec.numel == 0 or (bat and spec.shape[1] != spec.shape[2]):
        raise AdapterError(
            f"{adapter.file}: {shown(key)} is {spec}, which is not a block of MiSS with init_weights {shown(variant)}."
        )
    rank = spec.shape[1] if bat else spec.shape[0]

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, key, target)
        if len(target.spec.shape) != 2 or not _fits(spec.shape, variant, *target.spec.shape):
            raise misfit(adapter, (key,), target)
        update = _add_bat if bat else _add
        return RowWise(
            adapter.store,
            {"block": key},
            lambda tile, first_row, tensors: update(tile, first_row, tensors["block"], scale),
            begin=None if bat else _begin,
            begin_nbytes=0 if bat else 4 * spec.numel,
            scratch_nbytes=tile_nbytes(target),
            facts={"rank": rank, "scale": scale},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _fits(block: tuple[int, ...], variant: bool | str, n_rows: int, n_cols: int) -> bool:
    if variant == "bat":
        return block[0] * block[1] == n_rows and n_cols % block[1] == 0
    repeats = n_rows % block[1] == 0 if variant == "mini" else n_rows == block[1]
    return repeats and block[0] <= n_cols


def _begin(tensors: Tensors, base: Base) -> Tensors:
    return {"block": tensors["block"].T.contiguous()}  # [out or mini_r, r]


def _add(tile: torch.Tensor, first_row: int, block: torch.Tensor, scale: float) -> None:
    n_rows, n_cols = tile.shape
    rows = torch.arange(first_row, first_row + n_rows, device=tile.device) % block.shape[0]
    shard, rank = block[rows], block.shape[1]  # [n_rows, r]
    whole = n_cols // rank * rank
    tile[:, :whole].view(n_rows, -1, rank).add_(shard[:, None], alpha=scale)
    tile[:, whole:].add_(shard[:, : n_cols - whole], alpha=scale)


def _add_bat(tile: torch.Tensor, first_row: int, blocks: torch.Tensor, scale: float) -> None:
    rank, stop_row = blocks.shape[1], first_row + tile.shape[0]
    for i in range(first_row // rank, (stop_row + rank - 1) // rank):
        start, stop = max(i * rank, first_row), min((i + 1) * rank, stop_row)
        rows = tile[start - first_row : stop - first_row].view(stop - start, -1, rank)  # [n, shards, r]
        own = blocks[i, start - i * rank : stop - i * rank]  # [n, r]
        rows.add_((rows @ blocks[i]).add_(own[:, None]), alpha=scale)
