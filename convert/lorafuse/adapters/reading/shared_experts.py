"""LoRA on all experts of a layer at once, as Tinker saves it: `experts.w1`, `w2` and `w3` with lora_A
[E, r, in] and lora_B [E, out, r], of which one is the same for all experts and is stored once, [1, …].

Expert e's update is lora_B[e] @ lora_A[e], scaled as ever (tinker-cookbook, weights/_merge.py).
"""

import re
from collections.abc import Callable
from functools import partial

from lorafuse.adapters.reading.check_tensors import is_transposed, not_one_update, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import Modules, check_float
from lorafuse.adapters.updates import Update
from lorafuse.patches.factor import Factor
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.target import Target

_MODULE = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<kind>w1|w2|w3)")
_KINDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_LEAVES = ("lora_A.weight", "lora_B.weight")
_EMPTY = "it is empty: experts of this model have no such matrix"

Scaling = Callable[[str, int], float]  # (module, rank) → scale


def take_shared_experts(
    adapter: AdapterDir, modules: Modules, scaling: Scaling
) -> tuple[list[Update], dict[str, str]]:
    """An update for each expert, and the ignored tensors; takes their leaves. Raises AdapterError where the
    tensors do not make updates."""
    updates: list[Update] = []
    ignored: dict[str, str] = {}
    for module, leaves in modules.items():
        match = _MODULE.fullmatch(module)
        if not match or leaves.keys() != set(_LEAVES):
            continue
        shapes = [shape_of(adapter, leaves[leaf]) for leaf in _LEAVES]
        if any(len(shape) != 3 for shape in shapes):
            continue
        keys = (leaves.pop(_LEAVES[0]), leaves.pop(_LEAVES[1]))
        if all(0 in shape for shape in shapes):
            ignored |= dict.fromkeys(keys, _EMPTY)
            continue
        updates += _of_experts(adapter, f"{match['experts']}.{{}}.{_KINDS[match['kind']]}", keys, scaling)
    return updates, ignored


def _of_experts(adapter: AdapterDir, name: str, keys: tuple[str, str], scaling: Scaling) -> list[Update]:
    """`name`: of a module, with a place for the expert's number."""
    (n_a, rank, _), (n_b, _, same_rank) = (shape_of(adapter, key) for key in keys)
    for key in keys:
        check_float(adapter, key)
    n_experts = max(n_a, n_b)
    empty = any(0 in shape_of(adapter, key) for key in keys)
    if empty or rank != same_rank or {n_a, n_b} - {1, n_experts}:
        raise not_one_update(adapter, *keys)
    updates = []
    for expert in range(n_experts):
        module = name.format(expert)
        scale = scaling(module, rank)
        places = (min(expert, n_a - 1), min(expert, n_b - 1))
        make = partial(_patch, adapter, keys, places, scale)
        updates.append(Update(f"{module}.weight", keys, make=make, facts={"rank": rank, "scale": scale}))
    return updates


def _patch(
    adapter: AdapterDir, keys: tuple[str, str], places: tuple[int, int], scale: float, target: Target
) -> LowRank:
    """W += scale · B A, of the matrices at `places` in the two tensors."""
    (_, _, n_in), (_, n_out, _) = (shape_of(adapter, key) for key in keys)
    transposed = is_transposed(adapter, keys, (n_out, n_in), target)
    a, b = (
        Factor(adapter.store, key, matrix=place, transposed=transposed)
        for key, place in zip(keys, places, strict=True)
    )
    return LowRank(a, b, scale) if transposed else LowRank(b, a, scale)
