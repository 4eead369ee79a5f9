"""PEFT's GraLoRA: a grid of k × k blocks, each with low-rank factors of its own, on Linear and HF Conv1D.

Block (m, n) of Δ [out, in] is (A[n][:, mq:(m+1)q] @ B[m][nq:(n+1)q])ᵀ with A [k, in/k, r], B [k, r, out/k]
and q = r / k; `hybrid_r` adds a plain product B_general @ A_general, and all of it is scaled by alpha / (r +
hybrid_r) (arXiv:2505.20355; PEFT 0.21 gralora/layer.py, get_delta_weight). k and the ranks are those of the
tensors.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_config import number
from lorafuse.adapters.reading.check_tensors import check_shapes, is_transposed, unexpected
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, oriented, product_added
from lorafuse.patches.target import Target

SUPPORTED = "Linear, HF Conv1D; hybrid part"
MEMORY = "tiles"

_LEAVES = r"gralora_[AB](_general)?(\.(?P<name>(?!weight$)[^.]+))?(\.weight)?"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_grid, adapter, scale * number(adapter, "alpha", 64)), warn)


def _grid(adapter: AdapterDir, alpha: float, module: str, leaves: Leaves) -> list[Update]:
    keys = take(adapter, module, leaves, ("gralora_A", "gralora_B"))
    general = take(adapter, module, leaves, ("gralora_A_general.weight", "gralora_B_general.weight"))
    if keys is None:
        return []
    n = check_shapes(adapter, (keys[0], ("k", "in / k", "r")), (keys[1], ("k", "r", "out / k")))
    n_blocks, rank = n["k"], n["r"]
    if rank % n_blocks:
        raise unexpected(adapter, keys[0], "[k, in / k, r] with r a multiple of k")
    n_in, n_out, hybrid = n_blocks * n["in / k"], n_blocks * n["out / k"], 0
    if general is not None:
        hybrid = check_shapes(adapter, (general[0], ("hybrid_r", n_in)), (general[1], (n_out, "hybrid_r")))[
            "hybrid_r"
        ]
    used = keys + (general or ())
    scale = alpha / (rank + hybrid)

    def make(target: Target) -> Patch:
        transposed = is_transposed(adapter, (keys[1],), (n_out, n_in), target)
        return RowFunction(
            adapter.store,
            dict(zip(("A", "B", "A_general", "B_general"), used, strict=False)),
            partial(_add, scale=scale),
            begin=partial(_begin, transposed=transposed),
            facts={"rank": rank + hybrid, "scale": scale},
        )

    return [Update(f"{module}.weight", used, make=make)]


def _begin(t: Tensors, transposed: bool) -> Tensors:
    # Factors by (block row, block column) of the weight as it is stored: left [rows, q], right [q, cols].
    n_blocks, in_block, rank = t["A"].shape
    q = rank // n_blocks
    A = t["A"].view(n_blocks, in_block, n_blocks, q).permute(2, 0, 1, 3)  # [m, n, in / k, q]
    B = t["B"].view(n_blocks, n_blocks, q, -1)  # [m, n, q, out / k]
    if transposed:
        grid = {"rows": A.transpose(0, 1), "cols": B.transpose(0, 1)}
    else:
        grid = {"rows": B.transpose(2, 3), "cols": A.transpose(2, 3)}
    return grid | (oriented(t["B_general"], t["A_general"], transposed) if "A_general" in t else {})


def _add(tile: torch.Tensor, first_row: int, t: Tensors, scale: float) -> None:
    rows, cols = t["rows"], t["cols"]
    height, width = rows.shape[2], cols.shape[3]
    stop_row = first_row + tile.shape[0]
    for m in range(first_row // height, (stop_row - 1) // height + 1):
        start, stop = max(first_row, m * height), min(stop_row, (m + 1) * height)
        part = tile[start - first_row : stop - first_row]
        for n in range(rows.shape[1]):
            left = rows[m, n, start - m * height : stop - m * height]
            part[:, n * width : (n + 1) * width].addmm_(left, cols[m, n], alpha=scale)
    if "left" in t:
        product_added(tile, first_row, t, scale)
