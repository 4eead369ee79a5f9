"""PEFT's Uni-LoRA: every element of all LoRA factors is an element of one trained vector, times a fixed
number.

A = θ[indices_A] · scales_A, B = θ[indices_B] · scales_B, ΔW = B A (arXiv 2506.00799; PEFT 0.21
unilora/layer.py, _get_lora_matrices). Indices and scales are in the file with `save_indices` only. PEFT makes
them again from a seed otherwise, in the order in which the model's modules were made, which neither the
adapter nor the checkpoint tells.
"""

from functools import partial

from lorafuse.adapters.reading.check_tensors import check_positions, check_shapes, is_transposed
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import (
    Leaves,
    Updates,
    Warn,
    each_module,
    read_modules,
    take,
    take_shared,
)
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, oriented, product_added
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv1D; saved indices only"
MEMORY = "tiles"

_LEAVES = r"unilora_theta_d|unilora_(indices|scales)_[AB]"
_NAMES = ("indices_A", "indices_B", "scales_A", "scales_B")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    theta = take_shared(modules, "unilora_theta_d").get("unilora_theta_d")
    if theta is None:
        raise AdapterError(f"{adapter.file}: has no unilora_theta_d.")
    if not any(f"unilora_{name}" in leaves for leaves in modules.values() for name in _NAMES):
        raise AdapterError(
            f"{adapter.file}: has no unilora_indices_A (save_indices was off), so it is not known which "
            "elements of unilora_theta_d belong to which module."
        )
    return each_module(adapter, modules, partial(_low_rank, adapter, scale, theta), warn), ignored


def _low_rank(adapter: AdapterDir, scale: float, theta: str, module: str, leaves: Leaves) -> list[Update]:
    own = take(adapter, module, leaves, tuple(f"unilora_{name}" for name in _NAMES))
    if own is None:
        return []
    keys, a, b = (*own, theta), ("r", "in"), ("out", "r")
    n = check_shapes(adapter, *zip(keys, (a, b, a, b, ("theta_d",)), strict=True), integers=own[:2])
    for key in own[:2]:
        check_positions(adapter, key, n["theta_d"], f"elements of {shown(theta)}")

    def make(target: Target) -> Patch:
        transposed = is_transposed(adapter, own[:2], (n["out"], n["in"]), target)
        return RowFunction(
            adapter.store,
            dict(zip((*_NAMES, "theta"), keys, strict=True)),
            partial(product_added, scale=scale),
            begin=partial(_begin, transposed=transposed),
            begin_nbytes=12 * n["r"] * (n["in"] + n["out"]),
            facts={"rank": n["r"], "scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(tensors: Tensors, transposed: bool) -> Tensors:
    a, b = (tensors["theta"][tensors[f"indices_{x}"]] * tensors[f"scales_{x}"] for x in "AB")
    return oriented(b, a, transposed)
