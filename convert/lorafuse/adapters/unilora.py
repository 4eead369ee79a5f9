"""PEFT's Uni-LoRA: every element of all LoRA factors is an element of one trained vector, times a fixed number.

A = θ[indices_A] · scales_A, B = θ[indices_B] · scales_B, ΔW = B A (arXiv 2506.00799; PEFT 0.21 unilora/layer.py,
_get_lora_matrices). Indices and scales are in the file with `save_indices` only. PEFT makes them again from a seed otherwise, in
the order in which the model's modules were made, which neither the adapter nor the checkpoint tells.
"""

from collections.abc import Callable

import torch

from lorafuse.adapters.factor import load
from lorafuse.adapters.fit import check_shape, is_transposed, take
from lorafuse.adapters.keys import drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import AdapterDir
from lorafuse.errors import AdapterError, shown

SUPPORTED = "Linear, Conv1D; saved indices only"
MEMORY = "tiles"

_NAMES = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    modules = group(adapter, r"unilora_theta_d|unilora_(indices|scales)_[AB]")
    ignored = drop_copies(modules)
    theta = modules.get("base_model", {}).pop("unilora_theta_d", None)
    if theta is None:
        raise AdapterError(f"{adapter.file}: has no unilora_theta_d.")
    if not any(name in leaves for leaves in modules.values() for name in _NAMES):
        raise AdapterError(
            f"{adapter.file}: has no unilora_indices_A (save_indices was off), so it is not known which elements of "
            "unilora_theta_d belong to which module."
        )
    check_shape(adapter, theta, (adapter.store.tensors[theta].spec.numel,), "as a vector")
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        keys = take(adapter, module, leaves, _NAMES)
        if keys is not None:
            result.append(_update(adapter, module, (*keys, theta), scale))
        refuse_left_over(adapter, leaves)
    return result, ignored


def _update(adapter: AdapterDir, module: str, keys: tuple[str, ...], scale: float) -> Update:
    indices_a, indices_b, scales_a, scales_b, theta = keys
    a, b = (adapter.store.tensors[key].spec for key in (indices_a, indices_b))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.numel * b.numel == 0:
        raise AdapterError(
            f"{adapter.file}: {shown(indices_a)} is {a} and {shown(indices_b)} is {b}; they are not those of two factors."
        )
    n = adapter.store.tensors[theta].spec.numel
    for indices, scales in ((indices_a, scales_a), (indices_b, scales_b)):
        spec = adapter.store.tensors[indices].spec
        check_shape(adapter, scales, spec.shape, f"from {shown(indices)}")
        found = load(adapter.store, indices, torch.device("cpu"))
        if found.is_floating_point() or int(found.min()) < 0 or int(found.max()) >= n:
            raise AdapterError(f"{adapter.file}: {shown(indices)} is {spec}, expected positions in the {n} of {shown(theta)}.")
    return Update(f"{module}.weight", keys, make=lambda target: _patch(adapter, keys, scale, target))


def _patch(adapter: AdapterDir, keys: tuple[str, ...], scale: float, target: Target) -> Patch:
    a, b = (adapter.store.tensors[key].spec for key in keys[:2])
    transposed = is_transposed(adapter, keys[:2], (b.shape[0], a.n_cols), target)

    def begin(tensors: Tensors, base: Base) -> Tensors:
        a, b = (tensors["theta"][tensors[f"indices_{x}"]] * tensors[f"scales_{x}"] for x in "AB")
        return {"left": a.T, "right": b.T} if transposed else {"left": b, "right": a}

    def update(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
        tile.addmm_(tensors["left"][first_row : first_row + tile.shape[0]], tensors["right"], alpha=scale)

    named = dict(zip(("indices_A", "indices_B", "scales_A", "scales_B", "theta"), keys, strict=True))
    nbytes = 12 * (a.numel + b.numel)
    return RowWise(adapter.store, named, update, begin=begin, begin_nbytes=nbytes, facts={"rank": a.shape[0], "scale": scale})
