"""PEFT's BOFT: the inputs of a layer turned by a product of sparse rotations, and its outputs scaled, on
Linear and Conv2d (arXiv 2311.06243; PEFT 0.21 boft/layer.py, get_delta_weight).

boft_R (m, n, b, b) has m butterfly factors P_i diag(R_i1 … R_in) P_iᵀ, each R the Cayley transform of the
skew part of its block, and each P_i a permutation that spreads a block over 2ⁱ neighbours. W' = s · W (F_m …
F_1)ᵀ; the bias is not scaled. m comes from the tensor, since PEFT without its CUDA extension ignores
boft_n_butterfly_factor.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import (
    check_shapes,
    misfit,
    n_cols_of,
    not_one_update,
    refuse_conv1d,
    shape_of,
)
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.rotation import cayley_minus_identity, excess, excess_nbytes, through
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv2d; several butterfly factors"
MEMORY = "tiles"

_LEAVES = rf"boft_\w+{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_butterfly, adapter, scale), warn)


def _butterfly(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    keys = take(adapter, module, leaves, ("boft_R", "boft_s"))
    if keys is None:
        return []
    s_dims = ("out", 1) if shape_of(adapter, keys[1])[1:] == (1,) else (1, "out")
    n = check_shapes(adapter, (keys[0], ("m", "n", "b", "b")), (keys[1], s_dims))
    n_factors, n_blocks, block = n["m"], n["n"], n["b"]
    if n_factors > 1 and (block % 2 or n_blocks % (1 << (n_factors - 1))):
        raise not_one_update(adapter, *keys)

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, keys[0], target)
        n_cols = n_cols_of(target)
        if n_cols != n_blocks * block or n["out"] != target.spec.shape[0]:
            raise misfit(adapter, target, *keys)
        return RowFunction(
            adapter.store,
            {"r": keys[0], "s": keys[1]},
            partial(_turn, scale=scale),
            begin=_begin,
            begin_nbytes=excess_nbytes(n_factors * n_blocks, block) + n_factors * n_cols * 24,
            scratch_nbytes=4 * tile_nbytes(target.spec),
            facts={"scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(tensors: Tensors) -> Tensors:
    r = tensors["r"]  # [m, n, b, b]
    n_factors, n_blocks, block, _ = r.shape
    turned = excess(r.flatten(0, 1), block, lambda part: cayley_minus_identity((part - part.mT) / 2).mT)
    orders = [
        _spread(n_blocks * block, block, i) if n_factors > 1 else torch.arange(n_blocks * block)
        for i in range(n_factors)
    ]
    order = torch.stack(orders).to(r.device)
    return {
        "excess": turned.view(r.shape),
        "order": order,
        "back": order.argsort(dim=1),
        "s": tensors["s"].flatten(),
    }


def _spread(n: int, block: int, i: int) -> torch.Tensor:
    """P_i as the column of the 1 of each row: in every 2ⁱ blocks, first the even halves of blocks, then the
    odd ones."""
    halves = torch.arange(n).view(-1, 2 ** (i + 1), block // 2)
    return torch.cat([halves[:, ::2], halves[:, 1::2]], 1).flatten()


def _turn(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    rows = tile
    for blocks, order, back in zip(tensors["excess"], tensors["order"], tensors["back"], strict=True):
        rows = rows[:, back]
        turned = through(rows, blocks)
        rows = rows.view(turned.shape).add_(turned).view(tile.shape)[:, order]
    # Towards W' by the share `scale`; lerp ends exactly at W' for 1.
    tile.lerp_(rows.mul_(tensors["s"][first_row : first_row + len(tile), None]), scale)
