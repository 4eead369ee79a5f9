"""PEFT's HiRA: W' = W + W ∘ (B @ A) on Linear, HF Conv1D, Embedding and Conv1d/2d/3d, without any scaling.

(openreview TwJrTz9cRS; PEFT 0.21 hira/layer.py, get_delta_weight.) For a convolution A has the kernel's
dimensions and B a 1×1 kernel; for an Embedding the product is transposed, since A belongs to the tokens.
"""

import math
from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import check_shapes, is_transposed, misfit, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, oriented, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, HF Conv1D, Embedding, Conv1d/2d/3d"
MEMORY = "tiles"

_LEAVES = rf"hira_(embedding_)?[AB]{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_factor, adapter, scale), warn)


def _factor(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    embedding = "hira_embedding_A" in leaves or "hira_embedding_B" in leaves
    prefix = "hira_embedding_" if embedding else "hira_"
    keys = take(adapter, module, leaves, (f"{prefix}A", f"{prefix}B"))
    if keys is None:
        return []
    kernel = shape_of(adapter, keys[0])[2:]
    n = check_shapes(adapter, (keys[0], ("r", "in", *kernel)), (keys[1], ("out", "r", *[1] * len(kernel))))
    out_in = n["out"], n["in"] * math.prod(kernel)

    def make(target: Target) -> Patch:
        transposed = embedding
        if kernel or embedding:
            if target.spec.shape != ((n["out"], n["in"], *kernel) if kernel else out_in[::-1]):
                raise misfit(adapter, target, keys[0])
        else:
            transposed = is_transposed(adapter, (keys[1],), out_in, target)
        return RowFunction(
            adapter.store,
            dict(zip("AB", keys, strict=True)),
            partial(_scale_up, scale=scale),
            begin=partial(_begin, transposed=transposed),
            scratch_nbytes=tile_nbytes(target.spec),
            facts={"rank": n["r"], "scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(t: Tensors, transposed: bool) -> Tensors:
    return oriented(t["B"].flatten(1), t["A"].flatten(1), transposed)


def _scale_up(tile: torch.Tensor, first_row: int, t: Tensors, scale: float) -> None:
    factor = t["left"][first_row : first_row + tile.shape[0]] @ t["right"]
    tile.addcmul_(tile, factor, value=scale)
