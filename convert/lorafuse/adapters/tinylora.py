"""PEFT's TinyLoRA: singular vectors of the base around a small matrix, which a tiny trained vector makes out of random ones.

ΔW = B R A with R = Σ_i v_i P_i (arXiv 2602.04118; PEFT 0.21 tinylora/layer.py, get_delta_weight). A, B and, with
`save_projection`, P are in the file. Which vector v belongs to a module follows from the module's number among the targets, which
is not in the file; but P was drawn from a generator seeded with `projection_seed` plus that number, and so tells it.
"""

from collections.abc import Callable

import torch

from lorafuse.adapters.factor import load
from lorafuse.adapters.fit import check_shape, is_transposed, number, take
from lorafuse.adapters.keys import check_float, drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import AdapterDir
from lorafuse.errors import AdapterError, shown

SUPPORTED = "Linear, Conv1D, Embedding; saved projections only"
MEMORY = "tiles"

_VECTORS = "base_model.tinylora_v"  # the module that group() finds in base_model.tinylora_v.<number>
_NAMES = ("tinylora_A", "tinylora_B", "tinylora_P")
# P is compared in the lowest precision that it may have been saved in.
_SAME = 2.0**-7
_COMPARED = 256  # elements


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    modules = group(adapter, r"tinylora_[ABP]|\d+")
    ignored = drop_copies(modules)
    vectors = modules.pop(_VECTORS, {})
    if not vectors:
        raise AdapterError(f"{adapter.file}: has no tinylora_v.")
    taken = {module: _take(adapter, module, leaves) for module, leaves in modules.items()}
    vector_of = _vectors_of(adapter, {m: keys[2] for m, keys in taken.items() if keys}, vectors)
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        keys = taken[module]
        if keys is not None:
            result.append(_update(adapter, module, (*keys, vector_of[module]), scale))
        refuse_left_over(adapter, leaves)
    unused = set(vectors.values()) - set(vector_of.values())
    return result, ignored | dict.fromkeys(sorted(unused), "no module uses it")


def _take(adapter: AdapterDir, module: str, leaves: dict[str, str]) -> tuple[str, ...] | None:
    if "tinylora_A" in leaves and "tinylora_P" not in leaves:
        raise AdapterError(
            f"{adapter.file}: {shown(module)} has tinylora_A but no tinylora_P (save_projection was off), so it is not known which "
            "vector belongs to it."
        )
    return take(adapter, module, leaves, _NAMES)


def _vectors_of(adapter: AdapterDir, projections: dict[str, str], vectors: dict[str, str]) -> dict[str, str]:
    """Module → key of its vector, given the key of its P (PEFT 0.21 tinylora/model.py, _create_and_replace)."""
    n = len(projections)
    n_groups = max(1, round(n * (1.0 - number(adapter, "weight_tying", 0.0))))
    group_size = max(1, n // n_groups)
    found: dict[str, str] = {}
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for module, key in projections.items():
        shape = adapter.store.tensors[key].spec.shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise AdapterError(f"{adapter.file}: {shown(key)} is {adapter.store.tensors[key].spec}, expected [u, rank, rank].")
        check_float(adapter, key)
        groups = {0}
        if n_groups > 1:
            if shape not in drawn:
                drawn[shape] = _draw(int(number(adapter, "projection_seed", 42)), n, shape)
            groups = {min(i // group_size, n_groups - 1) for i in _numbers(adapter, key, drawn[shape])}
        if len(groups) != 1:
            raise AdapterError(
                f"{adapter.file}: {shown(key)} is not what projection_seed gives, so it is not known which vector belongs to "
                f"{shown(module)}."
            )
        vector = str(groups.pop())
        if vector not in vectors:
            raise AdapterError(f"{adapter.file}: has no tinylora_v.{vector}, the vector of {shown(module)}.")
        found[module] = vectors[vector]
    return found


def _draw(seed: int, n: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The beginning of the P of each number, [n, at most 256] (_init_projection)."""
    std = 1.0 / shape[1] ** 0.5
    generators = (torch.Generator().manual_seed(seed + i) for i in range(n))
    return torch.stack([torch.normal(0.0, std, shape, generator=g).flatten()[:_COMPARED].clone() for g in generators])


def _numbers(adapter: AdapterDir, key: str, drawn: torch.Tensor) -> list[int]:
    """The numbers whose P that is."""
    projection = load(adapter.store, key, torch.device("cpu")).flatten()[:_COMPARED]
    return torch.isclose(drawn, projection, rtol=_SAME, atol=1e-6).all(dim=1).nonzero().flatten().tolist()


def _update(adapter: AdapterDir, module: str, keys: tuple[str, ...], scale: float) -> Update:
    key_a, key_b, key_p, key_v = keys
    u, rank, _ = adapter.store.tensors[key_p].spec.shape
    a, b = (adapter.store.tensors[key].spec for key in (key_a, key_b))
    check_shape(adapter, key_a, (rank, a.n_cols), f"from {shown(key_p)}")
    check_shape(adapter, key_b, (*b.shape[:1], rank), f"from {shown(key_p)}")
    check_shape(adapter, key_v, (u,), f"from {shown(key_p)}")
    return Update(f"{module}.weight", keys, make=lambda target: _patch(adapter, keys, scale, target))


def _patch(adapter: AdapterDir, keys: tuple[str, ...], scale: float, target: Target) -> Patch:
    a, b, p = (adapter.store.tensors[key].spec for key in keys[:3])
    transposed = is_transposed(adapter, keys[:2], (b.shape[0], a.shape[1]), target)

    def begin(tensors: Tensors, base: Base) -> Tensors:
        r = torch.einsum("i,ijk->jk", tensors["v"].double(), tensors["P"].double())
        right = (r @ tensors["A"].double()).float()
        return {"left": right.T, "right": tensors["B"].T} if transposed else {"left": tensors["B"], "right": right}

    def update(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
        tile.addmm_(tensors["left"][first_row : first_row + tile.shape[0]], tensors["right"], alpha=scale)

    named = dict(zip(("A", "B", "P", "v"), keys, strict=True))
    nbytes = 8 * p.numel + 20 * a.numel
    return RowWise(adapter.store, named, update, begin=begin, begin_nbytes=nbytes, facts={"rank": p.shape[1], "scale": scale})
