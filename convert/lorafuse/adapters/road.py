"""PEFT's RoAd: W' = R @ W and b' = R @ b, R rotating pairs of outputs and scaling them.

Within each group of `group_size` outputs, output i of the first half is paired with output i of the second:
x₁' = c₁x₁ − s₁x₂, x₂' = c₂x₂ + s₂x₁ with c = α cos θ and s = α sin θ (arXiv:2409.00119, equation 4; PEFT 0.21 road/layer.py,
_prepare_cols). road_1 has one θ and α a pair, road_2 one an output, road_4 one for c and one for s of each output. Linear only.
"""

import torch

from lorafuse.adapters.patch import TILE_NUMEL, Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.shared import (
    NAMED,
    Found,
    Leaves,
    Warn,
    each_module,
    expect,
    misfit,
    one_of,
    read_modules,
    shape_of,
    take,
    whole_number,
)
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError

_NAMES = ("road_theta", "road_alpha")
_LEAVES = rf"road_(theta|alpha){NAMED}"
_VARIANTS = ("road_1", "road_2", "road_4")  # the number is that of the angles of a pair


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module, and one for its bias if the checkpoint has it."""
    variant = one_of(adapter, "variant", "road_1", _VARIANTS)
    group_size = whole_number(adapter, "group_size", 64, minimum=2)
    if group_size % 2:
        raise AdapterError(f"{adapter.path / CONFIG}: group_size is {group_size}, expected an even number.")
    modules, ignored = read_modules(adapter, _LEAVES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        keys = take(adapter, module, leaves, _NAMES)
        if keys is None:
            return []
        shape = shape_of(adapter, keys["road_theta"])
        expect(adapter, keys["road_theta"], len(shape) == 1, "a vector")
        expect(adapter, keys["road_alpha"], shape_of(adapter, keys["road_alpha"]) == shape, str(list(shape)))

        def make(target: Target) -> Patch:
            return _patch(adapter, keys, variant, group_size, scale, target)

        used = tuple(keys.values())
        return [Update(f"{module}.weight", used, make=make), Update(f"{module}.bias", used, make=make, optional=True)]

    return each_module(adapter, modules, of_module), ignored


def _patch(adapter: AdapterDir, keys: dict[str, str], variant: str, group_size: int, scale: float, target: Target) -> Patch:
    n_out = target.spec.shape[0]
    n_angles = n_out // 2 * int(variant[-1])
    if len(target.spec.shape) > 2 or n_out % group_size or shape_of(adapter, keys["road_theta"]) != (n_angles,):
        raise misfit(adapter, keys["road_theta"], target)

    def begin(t: Tensors, base: Base) -> Tensors:
        first, second = _columns(t["road_theta"], t["road_alpha"], variant, group_size)
        return {"first": first, "second": second}

    def update(tile: torch.Tensor, first_row: int, t: Tensors) -> None:
        rows = slice(first_row, first_row + tile.shape[0])
        halves = tile.view(-1, 2, group_size // 2, tile.shape[1])
        first, second = (t[name][rows].view(-1, 2, group_size // 2, 1) for name in ("first", "second"))
        rotated = halves * first
        rotated[:, 0].addcmul_(halves[:, 1], second[:, 0], value=-1)
        rotated[:, 1].addcmul_(halves[:, 0], second[:, 1])
        halves.add_(rotated.sub_(halves), alpha=scale) if scale != 1 else halves.copy_(rotated)

    return RowWise(
        adapter.store,
        keys,
        update,
        begin=begin,
        begin_nbytes=4 * 4 * n_out,
        scratch_nbytes=4 * max(TILE_NUMEL, group_size * target.spec.n_cols),
        row_multiple=group_size,
        facts={"scale": scale},
    )


def _columns(theta: torch.Tensor, alpha: torch.Tensor, variant: str, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each output is multiplied by, and what its partner is, float32 [out] each."""
    if variant == "road_4":
        theta, alpha = theta.view(-1, 2, group_size), alpha.view(-1, 2, group_size)
        return (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
    if variant == "road_1":
        theta, alpha = (x.view(-1, 1, group_size // 2).expand(-1, 2, -1).flatten() for x in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()
