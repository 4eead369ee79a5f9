"""PEFT's Super-Tuning: a few elements of the weight get a value of their own, and in its Supra form a LoRA update beside it.

W.flat[indices] += values; with `r`, ΔW = B A · lora_alpha / r too (arXiv 2607.09287; PEFT 0.21 supertuning/layer.py,
get_delta_weight). Only Linear exists. Without saved indices PEFT takes the largest elements of the base, in an order that equal
magnitudes leave open, so the value of each is not known.
"""

from collections.abc import Callable

import torch

from lorafuse.adapters.factor import Factor, load
from lorafuse.adapters.fit import check_shape, is_transposed, misfit, number, take
from lorafuse.adapters.keys import check_float, drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.lowrank import LowRank
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import AdapterDir
from lorafuse.errors import AdapterError, shown

SUPPORTED = "Linear, with and without a low-rank part; saved indices only"
MEMORY = "the sparse values of a weight"

_LORA = ("supertuning_lora_A.weight", "supertuning_lora_B.weight")


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    modules = group(adapter, r"supertuning_(indices|values)|supertuning_lora_[AB]\.weight")
    ignored = drop_copies(modules)
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        result += _sparse(adapter, module, leaves, scale) + _low_rank(adapter, module, leaves, scale)
        refuse_left_over(adapter, leaves)
    return result, ignored


def _sparse(adapter: AdapterDir, module: str, leaves: dict[str, str], scale: float) -> list[Update]:
    if "supertuning_values" in leaves and "supertuning_indices" not in leaves:
        raise AdapterError(
            f"{adapter.file}: {shown(module)} has supertuning_values but no supertuning_indices (save_precomputed_indices was "
            "off), so it is not known which elements they belong to."
        )
    keys = take(adapter, module, leaves, ("supertuning_indices", "supertuning_values"))
    if keys is None:
        return []
    indices, values = keys
    spec = adapter.store.tensors[indices].spec
    if spec.dtype not in ("I32", "I64") or len(spec.shape) != 1:
        raise AdapterError(f"{adapter.file}: {shown(indices)} is {spec}, expected a vector of I32 or I64.")
    check_shape(adapter, values, spec.shape, f"from {shown(indices)}")
    return [Update(f"{module}.weight", keys, make=lambda target: _sparse_patch(adapter, indices, values, scale, target))]


def _sparse_patch(adapter: AdapterDir, indices: str, values: str, scale: float, target: Target) -> Patch:
    if len(target.spec.shape) != 2 or target.is_conv1d:
        raise misfit(adapter, (indices,), target)
    _check_range(adapter, indices, target)
    n_cols = target.spec.n_cols

    def begin(tensors: Tensors, base: Base) -> Tensors:
        """By position, so that a tile's elements are neighbours."""
        order = tensors["indices"].argsort(stable=True)
        return {"indices": tensors["indices"][order], "values": tensors["values"][order].mul_(scale)}

    def update(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
        first = first_row * n_cols
        bounds = torch.tensor([first, first + tile.numel()], device=tile.device)
        start, stop = torch.searchsorted(tensors["indices"], bounds).tolist()
        tile.view(-1).index_add_(0, tensors["indices"][start:stop] - first, tensors["values"][start:stop])

    n = adapter.store.tensors[indices].spec.numel
    keys = {"indices": indices, "values": values}
    scratch = 16 * min(n, max(1 << 18, n_cols))
    # Beside what is loaded: indices have 8 bytes in memory; sorting makes the order, two copies, and both tensors in that order.
    return RowWise(adapter.store, keys, update, begin=begin, begin_nbytes=40 * n, scratch_nbytes=scratch, facts={"scale": scale})


def _check_range(adapter: AdapterDir, key: str, target: Target) -> None:
    """Raises AdapterError for an index outside of the weight."""
    indices = load(adapter.store, key, torch.device("cpu"))
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= target.spec.numel):
        raise AdapterError(
            f"{adapter.file}: {shown(key)} has positions from {int(indices.min())} to {int(indices.max())}, but "
            f"{shown(target.name)} has {target.spec.numel} elements; is the adapter for another base?"
        )


def _low_rank(adapter: AdapterDir, module: str, leaves: dict[str, str], scale: float) -> list[Update]:
    keys = take(adapter, module, leaves, _LORA)
    if keys is None:
        return []
    key_a, key_b = keys
    a, b = (adapter.store.tensors[key].spec for key in keys)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.numel * b.numel == 0:
        raise AdapterError(
            f"{adapter.file}: {shown(key_a)} is {a} and {shown(key_b)} is {b}; they are not the two factors of one update."
        )
    for key in keys:
        check_float(adapter, key)
    rank = a.shape[0]
    scaling = scale * number(adapter, "lora_alpha", 2 * rank) / rank

    def make(target: Target) -> Patch:
        if is_transposed(adapter, keys, (b.shape[0], a.shape[1]), target):
            raise misfit(adapter, keys, target)
        return LowRank(Factor(adapter.store, key_b), Factor(adapter.store, key_a), scaling)

    return [Update(f"{module}.weight", keys, make=make)]
