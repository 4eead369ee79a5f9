"""PEFT's VB-LoRA: Δ = B @ A, each sub-vector of A and B a mixture of the `topk` vectors of a bank that its logits choose.

(arXiv:2405.15179; PEFT 0.21 vblora/layer.py, _get_lora_matrices.) logits_A [r, in / v, n], logits_B [out / v, r, n], bank [n, v],
weights softmax over the chosen logits. With save_only_topk_weights the file has the indices instead, and all weights but the
last, which is what is missing to 1 (vblora/model.py, _remap_adapter_state_dict_for_load). Linear and HF Conv1D.
"""

import torch

from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors, oriented, product_added
from lorafuse.adapters.shared import (
    NAMED,
    SHARED,
    Found,
    Leaves,
    Warn,
    each_module,
    expect,
    is_transposed,
    read_modules,
    shape_of,
    take,
    whole_number,
)
from lorafuse.adapters.store import AdapterDir
from lorafuse.errors import AdapterError, shown

_BANK = "vblora_vector_bank"
_LEAVES = rf"vblora_logits_[AB](_topk_(indices|weights))?{NAMED}|{_BANK}(\.[^.]+)?"
_INTEGERS = ("U8", "I8", "I16", "I32", "I64")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    topk = whole_number(adapter, "topk", 2)
    shared = modules.get(SHARED, {})
    bank = next((shared.pop(leaf) for leaf in list(shared) if leaf.startswith(_BANK)), None)
    if bank is None:
        raise AdapterError(f"{adapter.file}: holds no base_model.{_BANK}.")
    expect(adapter, bank, len(shape_of(adapter, bank)) == 2, "[num_vectors, vector_length]")
    if shape_of(adapter, bank)[0] < topk:
        raise AdapterError(f"{adapter.file}: {shown(bank)} has {shape_of(adapter, bank)[0]} vectors, fewer than topk, {topk}.")

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        keys = _take_logits(adapter, module, leaves, topk, shape_of(adapter, bank)[0])
        if not keys:
            return []
        keys["bank"] = bank
        used = tuple(keys.values())
        return [Update(f"{module}.weight", used, make=lambda target: _patch(adapter, keys, topk, scale, target))]

    return each_module(adapter, modules, of_module), ignored


def _take_logits(adapter: AdapterDir, module: str, leaves: Leaves, topk: int, n_vectors: int) -> dict[str, str]:
    """{"A": key} of logits, or {"A.indices": key, "A.weights": key}, for A and B."""
    logits = take(adapter, module, leaves, ("vblora_logits_A", "vblora_logits_B"))
    if logits is not None:
        for key in logits.values():
            shape = shape_of(adapter, key)
            expect(adapter, key, len(shape) == 3 and shape[2] == n_vectors, f"three dimensions, the last one {n_vectors}")
        return dict(zip("AB", logits.values(), strict=True))
    indices = [f"vblora_logits_{side}_topk_indices" for side in "AB"]
    chosen = {side: leaves.pop(leaf) for side, leaf in zip("AB", indices, strict=True) if leaf in leaves}
    weights = take(adapter, module, leaves, tuple(f"vblora_logits_{side}_topk_weights" for side in "AB"))
    if weights is None and not chosen:
        return {}
    if weights is None or len(chosen) < 2:
        raise AdapterError(f"{adapter.file}: {shown(module)} lacks some of topk_indices and topk_weights of its two logits.")
    keys: dict[str, str] = {}
    for side, weight in zip("AB", weights.values(), strict=True):
        shape = shape_of(adapter, chosen[side])
        integer = adapter.store.tensors[chosen[side]].spec.dtype in _INTEGERS
        expect(adapter, chosen[side], len(shape) == 3 and shape[2] == topk and integer, f"integers, the last dimension {topk}")
        fits = shape_of(adapter, weight) == (*shape[:2], topk - 1)
        if topk > 1 or not fits:
            expect(adapter, weight, fits, str([*shape[:2], topk - 1]))
        keys |= {f"{side}.indices": chosen[side], f"{side}.weights": weight}
    return keys


def _patch(adapter: AdapterDir, keys: dict[str, str], topk: int, scale: float, target: Target) -> Patch:
    vector = shape_of(adapter, keys["bank"])[1]
    key_a, key_b = (keys.get(side) or keys[f"{side}.indices"] for side in "AB")
    a, b = shape_of(adapter, key_a), shape_of(adapter, key_b)
    rank, n_in, n_out = a[0], a[1] * vector, b[0] * vector
    expect(adapter, key_b, b[1] == rank, f"[out / {vector}, {rank}, …]")
    transposed = is_transposed(adapter, key_b, target, n_out, n_in)

    def begin(t: Tensors, base: Base) -> Tensors:
        A = _mixed(t, "A", topk).reshape(rank, n_in)
        B = _mixed(t, "B", topk).transpose(1, 2).reshape(n_out, rank)
        return oriented(B, A, transposed=transposed)

    mixing_nbytes = 4 * (topk + 2) * rank * (n_in + n_out)  # vectors before they are summed, and the factors
    facts = {"rank": rank, "scale": scale}
    return RowWise(adapter.store, keys, product_added(scale), begin=begin, begin_nbytes=mixing_nbytes, facts=facts)


def _mixed(t: Tensors, side: str, topk: int) -> torch.Tensor:
    """float32 [·, ·, vector]"""
    if side in t:
        top, indices = t[side].topk(topk, dim=-1)
        weights = top.softmax(dim=-1)
    else:
        indices, but_last = t[f"{side}.indices"], t[f"{side}.weights"]
        weights = torch.cat([but_last, 1 - but_last.sum(-1, keepdim=True)], dim=-1)
    return (weights[..., None] * t["bank"][indices]).sum(-2)
