"""PEFT's TinyLoRA: singular vectors of the base around a small matrix, which a tiny trained vector makes out
of random ones.

ΔW = B R A with R = Σ_i v_i P_i (arXiv 2602.04118; PEFT 0.21 tinylora/layer.py, get_delta_weight). A, B and,
with `save_projection`, P are in the file. Which vector v belongs to a module follows from the module's number
among the targets, which is not in the file; but P was drawn from a generator seeded with `projection_seed`
plus that number, and so tells it.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_config import integer, number
from lorafuse.adapters.reading.check_tensors import check_shapes, is_transposed, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import Modules
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
from lorafuse.patches.factor import pieces
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, oriented, product_added
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv1D, Embedding; saved projections only"
MEMORY = "tiles"

_LEAVES = r"tinylora_[ABP]|tinylora_v\.\d+"
_NAMES = ("tinylora_A", "tinylora_B", "tinylora_P")
# P is compared in the lowest precision that it may have been saved in.
_SAME = 2.0**-7
_COMPARED = 256  # elements


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    vectors = take_shared(modules, "tinylora_v")
    if not vectors:
        raise AdapterError(f"{adapter.file}: has no tinylora_v.")
    vector_of = _vectors_of(adapter, modules, vectors)
    result = each_module(adapter, modules, partial(_tiny, adapter, scale, vector_of), warn)
    unused = set(vectors.values()) - set(vector_of.values())
    return result, ignored | dict.fromkeys(sorted(unused), "no module uses it")


def _tiny(
    adapter: AdapterDir, scale: float, vector_of: dict[str, str], module: str, leaves: Leaves
) -> list[Update]:
    own = take(adapter, module, leaves, _NAMES)
    if own is None:
        return []
    keys = (*own, vector_of[module])
    key_a, key_b, key_p, key_v = keys
    expected = (
        (key_p, ("u", "rank", "rank")),
        (key_a, ("rank", "in")),
        (key_b, ("out", "rank")),
        (key_v, ("u",)),
    )
    n = check_shapes(adapter, *expected)

    def make(target: Target) -> Patch:
        transposed = is_transposed(adapter, own[:2], (n["out"], n["in"]), target)
        return RowFunction(
            adapter.store,
            dict(zip("ABPv", keys, strict=True)),
            partial(product_added, scale=scale),
            begin=partial(_begin, transposed=transposed),
            begin_nbytes=8 * n["u"] * n["rank"] ** 2 + 20 * n["rank"] * n["in"],
            facts={"rank": n["rank"], "scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(tensors: Tensors, transposed: bool) -> Tensors:
    r = torch.einsum("i,ijk->jk", tensors["v"].double(), tensors["P"].double())
    return oriented(tensors["B"], (r @ tensors["A"].double()).float(), transposed)


def _vectors_of(adapter: AdapterDir, modules: Modules, vectors: Leaves) -> dict[str, str]:
    """Module → key of its vector, by its P (PEFT 0.21 tinylora/model.py, _create_and_replace)."""
    for module, leaves in modules.items():
        if "tinylora_A" in leaves and "tinylora_P" not in leaves:
            raise AdapterError(
                f"{adapter.file}: {shown(module)} has tinylora_A but no tinylora_P (save_projection was "
                "off), so it is not known which vector belongs to it."
            )
    projections = {
        module: leaves["tinylora_P"] for module, leaves in modules.items() if "tinylora_P" in leaves
    }
    n = len(projections)
    n_groups = max(1, round(n * (1.0 - number(adapter, "weight_tying", 0.0))))
    group_size = max(1, n // n_groups)
    vector_of: dict[str, str] = {}
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for module, key in projections.items():
        check_shapes(adapter, (key, ("u", "rank", "rank")))
        shape = shape_of(adapter, key)
        groups = {0}
        if n_groups > 1:
            if shape not in drawn:
                drawn[shape] = _draw(integer(adapter, "projection_seed", 42, least=0), n, shape)
            groups = {min(i // group_size, n_groups - 1) for i in _numbers(adapter, key, drawn[shape])}
        if len(groups) != 1:
            raise AdapterError(
                f"{adapter.file}: {shown(key)} is not what projection_seed gives, so it is not known which "
                f"vector belongs to {shown(module)}."
            )
        vector = f"tinylora_v.{groups.pop()}"
        if vector not in vectors:
            raise AdapterError(f"{adapter.file}: has no {vector}, the vector of {shown(module)}.")
        vector_of[module] = vectors[vector]
    return vector_of


def _draw(seed: int, n: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The beginning of the P of each number, [n, at most 256] (_init_projection)."""
    std = 1.0 / shape[1] ** 0.5
    generators = (torch.Generator().manual_seed(seed + i) for i in range(n))
    return torch.stack(
        [torch.normal(0.0, std, shape, generator=g).flatten()[:_COMPARED].clone() for g in generators]
    )


def _numbers(adapter: AdapterDir, key: str, drawn: torch.Tensor) -> list[int]:
    """The numbers whose P that is."""
    _, projection = next(pieces(adapter.store, key, 0, drawn.shape[1]))
    return (
        torch.isclose(drawn, projection.float(), rtol=_SAME, atol=1e-6)
        .all(dim=1)
        .nonzero()
        .flatten()
        .tolist()
    )
