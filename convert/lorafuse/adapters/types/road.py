"""PEFT's RoAd: W' = R @ W and b' = R @ b, R rotating pairs of outputs and scaling them.

Within each group of `group_size` outputs, output i of the first half is paired with output i of the second:
x₁' = c₁x₁ − s₁x₂, x₂' = c₂x₂ + s₂x₁ with c = α cos θ and s = α sin θ (arXiv:2409.00119, equation 4; PEFT 0.21
road/layer.py, _prepare_cols). road_1 has one θ and α a pair, road_2 one an output, road_4 one for c and one
for s of each output. Linear only.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_config import integer, one_of
from lorafuse.adapters.reading.check_tensors import check_shapes, misfit
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear: weight and bias; road_1, road_2, road_4"
MEMORY = "tiles"

_LEAVES = rf"road_(theta|alpha){NAMED}"
_VARIANTS = ("road_1", "road_2", "road_4")  # the number is that of the angles of a pair


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module, and one for its bias if the checkpoint has it."""
    variant = one_of(adapter, "variant", "road_1", _VARIANTS)
    group_size = integer(adapter, "group_size", 64, least=2)
    if group_size % 2:
        raise AdapterError(f"{adapter.folder / CONFIG}: group_size is {group_size}, expected an even number.")
    return collect(adapter, _LEAVES, partial(_rotated, adapter, scale, variant, group_size), warn)


def _rotated(
    adapter: AdapterDir, scale: float, variant: str, group_size: int, module: str, leaves: Leaves
) -> list[Update]:
    keys = take(adapter, module, leaves, ("road_theta", "road_alpha"))
    if keys is None:
        return []
    n_angles = check_shapes(adapter, (keys[0], ("angles",)), (keys[1], ("angles",)))["angles"]

    def make(target: Target) -> Patch:
        shape = target.spec.shape
        if len(shape) > 2 or shape[0] % group_size or n_angles != shape[0] // 2 * int(variant[-1]):
            raise misfit(adapter, target, keys[0])
        return RowFunction(
            adapter.store,
            {"theta": keys[0], "alpha": keys[1]},
            partial(_rotate, group_size=group_size, scale=scale),
            begin=partial(_begin, variant=variant, group_size=group_size),
            begin_nbytes=4 * 6 * shape[0],
            scratch_nbytes=tile_nbytes(target.spec, group_size),
            row_multiple=group_size,
            facts={"scale": scale},
        )

    return [
        Update(f"{module}.weight", keys, make=make),
        Update(f"{module}.bias", keys, make=make, optional=True),
    ]


def _begin(t: Tensors, variant: str, group_size: int) -> Tensors:
    """What each output is multiplied by, and what its partner is, float32 [out] each."""
    theta, alpha = t["theta"], t["alpha"]
    if variant == "road_4":
        theta, alpha = theta.view(-1, 2, group_size), alpha.view(-1, 2, group_size)
        return {
            "first": (alpha[:, 0] * theta[:, 0].cos()).flatten(),
            "second": (alpha[:, 1] * theta[:, 1].sin()).flatten(),
        }
    if variant == "road_1":
        theta, alpha = (x.view(-1, 1, group_size // 2).expand(-1, 2, -1).flatten() for x in (theta, alpha))
    return {"first": alpha * theta.cos(), "second": alpha * theta.sin()}


def _rotate(tile: torch.Tensor, first_row: int, t: Tensors, group_size: int, scale: float) -> None:
    rows = slice(first_row, first_row + tile.shape[0])
    halves = tile.view(-1, 2, group_size // 2, tile.shape[1])
    first, second = (t[name][rows].view(-1, 2, group_size // 2, 1) for name in ("first", "second"))
    rotated = halves * first
    rotated[:, 0].addcmul_(halves[:, 1], second[:, 0], value=-1)
    rotated[:, 1].addcmul_(halves[:, 0], second[:, 1])
    halves.add_(rotated.sub_(halves), alpha=scale) if scale != 1 else halves.copy_(rotated)
