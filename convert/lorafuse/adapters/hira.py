"""PEFT's HiRA: W' = W + W ∘ (B @ A) on Linear, HF Conv1D, Embedding and Conv1d/2d/3d, without any scaling.

(openreview TwJrTz9cRS; PEFT 0.21 hira/layer.py, get_delta_weight.) For a convolution A has the kernel's dimensions and B a 1×1
kernel; for an Embedding the product is transposed, since A belongs to the tokens.
"""

import math

import torch

from lorafuse.adapters.patch import TILE_NUMEL, Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors, oriented
from lorafuse.adapters.shared import (
    NAMED,
    Found,
    Leaves,
    Warn,
    each_module,
    expect,
    is_transposed,
    misfit,
    read_modules,
    shape_of,
    take,
)
from lorafuse.adapters.store import AdapterDir

_LEAVES = rf"hira_(embedding_)?[AB]{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        embedding = "hira_embedding_A" in leaves or "hira_embedding_B" in leaves
        prefix = "hira_embedding_" if embedding else "hira_"
        taken = take(adapter, module, leaves, (f"{prefix}A", f"{prefix}B"))
        if taken is None:
            return []
        keys = dict(zip("AB", taken.values(), strict=True))
        _check(adapter, keys)
        used = tuple(keys.values())
        return [Update(f"{module}.weight", used, make=lambda target: _patch(adapter, keys, embedding, scale, target))]

    return each_module(adapter, modules, of_module), ignored


def _check(adapter: AdapterDir, keys: dict[str, str]) -> None:
    a, b = (shape_of(adapter, keys[name]) for name in "AB")
    expect(adapter, keys["A"], len(a) >= 2, "[r, in]")
    expect(adapter, keys["B"], len(b) == len(a) and b[1] == a[0] and math.prod(b[2:]) == 1, f"[out, {a[0]}]")


def _patch(adapter: AdapterDir, keys: dict[str, str], embedding: bool, scale: float, target: Target) -> Patch:
    a, b = (shape_of(adapter, keys[name]) for name in "AB")
    n_in = math.prod(a[1:])
    if len(a) > 2:
        transposed = False
        if target.spec.shape != (b[0], *a[1:]):
            raise misfit(adapter, keys["A"], target)
    elif embedding:
        transposed = True
        if target.spec.shape != (n_in, b[0]):
            raise misfit(adapter, keys["A"], target)
    else:
        transposed = is_transposed(adapter, keys["B"], target, b[0], n_in)

    def begin(t: Tensors, base: Base) -> Tensors:
        return oriented(t["B"].flatten(1), t["A"].flatten(1), transposed=transposed)

    def update(tile: torch.Tensor, first_row: int, t: Tensors) -> None:
        factor = t["left"][first_row : first_row + tile.shape[0]] @ t["right"]
        tile.addcmul_(tile, factor, value=scale)

    facts = {"rank": a[0], "scale": scale}
    scratch_nbytes = 4 * max(TILE_NUMEL, target.spec.n_cols)
    return RowWise(adapter.store, keys, update, begin=begin, scratch_nbytes=scratch_nbytes, facts=facts)
