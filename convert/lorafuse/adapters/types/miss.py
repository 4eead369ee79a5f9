"""PEFT's MiSS, the later name of Bone: a small block added to every shard of a Linear's weight (arXiv
2409.15371; PEFT 0.21 miss/layer.py, get_delta_weight and get_delta_weight_miss).

`init_weights` says which: by default miss_block is (r, out) and W[o, c] += block[c mod r, o], the last shard
being cut; "mini" stores only the first mini_r columns of a block that repeats; "bat" has a block M (r, r) for
each r rows, and every r × r part P of those rows becomes P + P M + M.
"""

import math
from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import check_shapes, misfit, refuse_conv1d, shape_of
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear; bat and mini"
MEMORY = "tiles"

_LEAVES = rf"miss_\w+{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    variant = adapter.config.get("init_weights", True)
    if variant not in (True, False, "bat", "mini"):
        raise AdapterError(
            f"{adapter.folder / CONFIG}: init_weights is {shown(variant)}, expected true, false, 'bat' or "
            "'mini', which say how miss_block is applied."
        )
    return collect(adapter, _LEAVES, partial(_shards, adapter, scale, variant), warn)


def _shards(
    adapter: AdapterDir, scale: float, variant: bool | str, module: str, leaves: Leaves
) -> list[Update]:
    key = leaves.pop("miss_block", None)
    if key is None:
        return []
    bat = variant == "bat"
    dims = ("n", "r", "r") if bat else ("r", "mini_r" if variant == "mini" else "out")
    rank = check_shapes(adapter, (key, dims), hint=f", since init_weights is {shown(variant)}")["r"]
    block = shape_of(adapter, key)

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, key, target)
        if len(target.spec.shape) != 2 or not _fits(block, variant, *target.spec.shape):
            raise misfit(adapter, target, key)
        return RowFunction(
            adapter.store,
            {"block": key},
            partial(_add_bat if bat else _add, scale=scale),
            begin=None if bat else _begin,
            begin_nbytes=0 if bat else 4 * math.prod(block),
            scratch_nbytes=tile_nbytes(target.spec),
            facts={"rank": rank, "scale": scale},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _fits(block: tuple[int, ...], variant: bool | str, n_rows: int, n_cols: int) -> bool:
    if variant == "bat":
        return block[0] * block[1] == n_rows and n_cols % block[1] == 0
    repeats = n_rows % block[1] == 0 if variant == "mini" else n_rows == block[1]
    return repeats and block[0] <= n_cols


def _begin(tensors: Tensors) -> Tensors:
    return {"block": tensors["block"].T.contiguous()}  # [out or mini_r, r]


def _add(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    block = tensors["block"]
    n_rows, n_cols = tile.shape
    rows = torch.arange(first_row, first_row + n_rows, device=tile.device) % block.shape[0]
    shard, rank = block[rows], block.shape[1]  # [n_rows, r]
    whole = n_cols // rank * rank
    tile[:, :whole].view(n_rows, -1, rank).add_(shard[:, None], alpha=scale)
    tile[:, whole:].add_(shard[:, : n_cols - whole], alpha=scale)


def _add_bat(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    blocks = tensors["block"]
    rank, stop_row = blocks.shape[1], first_row + tile.shape[0]
    for i in range(first_row // rank, (stop_row + rank - 1) // rank):
        start, stop = max(i * rank, first_row), min((i + 1) * rank, stop_row)
        rows = tile[start - first_row : stop - first_row].view(stop - start, -1, rank)  # [n, shards, r]
        own = blocks[i, start - i * rank : stop - i * rank]  # [n, r]
        rows.add_((rows @ blocks[i]).add_(own[:, None]), alpha=scale)
