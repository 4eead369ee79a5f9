"""PEFT's VB-LoRA: Δ = B @ A, each sub-vector of A and B a mixture of the `topk` vectors of a bank that its
logits choose.

(arXiv:2405.15179; PEFT 0.21 vblora/layer.py, _get_lora_matrices.) logits_A [r, in / v, n], logits_B [out / v,
r, n], bank [n, v], weights softmax over the chosen logits. With save_only_topk_weights the file has the
indices instead, and all weights but the last, which is what is missing to 1 (vblora/model.py,
_remap_adapter_state_dict_for_load). Linear and HF Conv1D.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_config import integer
from lorafuse.adapters.reading.check_tensors import check_positions, check_shapes, is_transposed
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import (
    NAMED,
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

SUPPORTED = "Linear, HF Conv1D; whole logits or top k"
MEMORY = "tiles"

_BANK = "vblora_vector_bank"
_LEAVES = rf"vblora_logits_[AB](_topk_(indices|weights))?{NAMED}|{_BANK}(\.[^.]+)?"
_INDICES = ("A_topk_indices", "B_topk_indices")
_WEIGHTS = ("A_topk_weights", "B_topk_weights")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    topk = integer(adapter, "topk", 2)
    bank = next(iter(take_shared(modules, _BANK).values()), None)
    if bank is None:
        raise AdapterError(f"{adapter.file}: holds no base_model.{_BANK}.")
    n_vectors = check_shapes(adapter, (bank, ("n", "v")))["n"]
    if n_vectors < topk:
        raise AdapterError(f"{adapter.file}: {shown(bank)} has {n_vectors} vectors, fewer than topk, {topk}.")
    return each_module(adapter, modules, partial(_mixtures, adapter, scale, topk, bank), warn), ignored


def _mixtures(
    adapter: AdapterDir, scale: float, topk: int, bank: str, module: str, leaves: Leaves
) -> list[Update]:
    names: tuple[str, ...] = ("A", "B")
    own = _take(adapter, module, leaves, names)
    integers: tuple[str, ...] = ()
    last: tuple[int | str, ...] = ("n", "n")
    if own is None:
        names = _INDICES + _WEIGHTS
        own = _take(adapter, module, leaves, names)
        if own is None:
            return []
        integers, last = own[:2], (topk, topk, topk - 1, topk - 1)
    dims = [
        (*(("r", "in / v") if name[0] == "A" else ("out / v", "r")), k)
        for name, k in zip(names, last, strict=True)
    ]
    n = check_shapes(adapter, (bank, ("n", "v")), *zip(own, dims, strict=True), integers=integers)
    for key in integers:
        check_positions(adapter, key, n["n"], f"vectors of {shown(bank)}")
    rank, n_in, n_out = n["r"], n["in / v"] * n["v"], n["out / v"] * n["v"]
    keys = (*own, bank)

    def make(target: Target) -> Patch:
        transposed = is_transposed(adapter, (own[1],), (n_out, n_in), target)
        return RowFunction(
            adapter.store,
            dict(zip((*names, "bank"), keys, strict=True)),
            partial(product_added, scale=scale),
            begin=partial(_begin, topk=topk, transposed=transposed),
            # Vectors before they are summed, and the factors.
            begin_nbytes=4 * (topk + 2) * rank * (n_in + n_out),
            facts={"rank": rank, "scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _take(adapter: AdapterDir, module: str, leaves: Leaves, names: tuple[str, ...]) -> tuple[str, ...] | None:
    return take(adapter, module, leaves, tuple(f"vblora_logits_{name}" for name in names))


def _begin(t: Tensors, topk: int, transposed: bool) -> Tensors:
    A, B = _mixed(t, "A", topk), _mixed(t, "B", topk)  # [r, in / v, v], [out / v, r, v]
    rank = A.shape[0]
    return oriented(B.transpose(1, 2).reshape(-1, rank), A.reshape(rank, -1), transposed)


def _mixed(t: Tensors, side: str, topk: int) -> torch.Tensor:
    """float32 [·, ·, v]"""
    if side in t:
        top, indices = t[side].topk(topk, dim=-1)
        weights = top.softmax(dim=-1)
    else:
        indices, but_last = t[f"{side}_topk_indices"], t[f"{side}_topk_weights"]
        weights = torch.cat([but_last, 1 - but_last.sum(-1, keepdim=True)], dim=-1)
    return (weights[..., None] * t["bank"][indices]).sum(-2)
