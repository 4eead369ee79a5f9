"""PEFT's GraLoRA: a grid of k × k blocks, each with low-rank factors of its own, on Linear and HF Conv1D.

Block (m, n) of Δ [out, in] is (A[n][:, mq:(m+1)q] @ B[m][nq:(n+1)q])ᵀ with A [k, in/k, r], B [k, r, out/k] and q = r / k;
`hybrid_r` adds a plain product B_general @ A_general, and all of it is scaled by alpha / (r + hybrid_r)
(arXiv:2505.20355; PEFT 0.21 gralora/layer.py, get_delta_weight). k and the ranks are those of the tensors.
"""

import torch

from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors, oriented, product_added
from lorafuse.adapters.shared import (
    Found,
    Leaves,
    Warn,
    each_module,
    expect,
    is_transposed,
    number,
    read_modules,
    shape_of,
    take,
)
from lorafuse.adapters.store import AdapterDir

_LEAVES = r"gralora_[AB](_general)?(\.(?P<name>(?!weight$)[^.]+))?(\.weight)?"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    alpha = number(adapter, "alpha", 64)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        blocks = take(adapter, module, leaves, ("gralora_A", "gralora_B"))
        general = take(adapter, module, leaves, ("gralora_A_general.weight", "gralora_B_general.weight"))
        if blocks is None:
            return []
        keys = {"A": blocks["gralora_A"], "B": blocks["gralora_B"]}
        if general is not None:
            keys |= dict(zip(("A_general", "B_general"), general.values(), strict=True))
        _check(adapter, keys)
        used = tuple(keys.values())
        return [Update(f"{module}.weight", used, make=lambda target: _patch(adapter, keys, scale * alpha, target))]

    return each_module(adapter, modules, of_module), ignored


def _check(adapter: AdapterDir, keys: dict[str, str]) -> None:
    a, b = (shape_of(adapter, keys[name]) for name in "AB")
    expect(adapter, keys["A"], len(a) == 3 and a[0] > 0 and a[2] % a[0] == 0, "[k, in / k, r] with r a multiple of k")
    expect(adapter, keys["B"], len(b) == 3 and b[:2] == (a[0], a[2]), f"[{a[0]}, {a[2]}, out / {a[0]}]")
    if "A_general" in keys:
        a_general, b_general = (shape_of(adapter, keys[name]) for name in ("A_general", "B_general"))
        n_in, n_out = a[0] * a[1], b[0] * b[2]
        expect(adapter, keys["A_general"], len(a_general) == 2 and a_general[1] == n_in, f"[hybrid_r, {n_in}]")
        expect(adapter, keys["B_general"], b_general == (n_out, a_general[0]), f"[{n_out}, {a_general[0]}]")


def _patch(adapter: AdapterDir, keys: dict[str, str], alpha: float, target: Target) -> Patch:
    n_blocks, in_block, rank = shape_of(adapter, keys["A"])
    out_block = shape_of(adapter, keys["B"])[2]
    hybrid = shape_of(adapter, keys["A_general"])[0] if "A_general" in keys else 0
    scale = alpha / (rank + hybrid)
    transposed = is_transposed(adapter, keys["B"], target, n_blocks * out_block, n_blocks * in_block)

    def begin(t: Tensors, base: Base) -> Tensors:
        # Factors by (block row, block column) of the weight as it is stored: left [rows, q], right [q, cols].
        q = rank // n_blocks
        A = t["A"].view(n_blocks, in_block, n_blocks, q).permute(2, 0, 1, 3)  # [m, n, in / k, q]
        B = t["B"].view(n_blocks, n_blocks, q, out_block)  # [m, n, q, out / k]
        if transposed:
            grid = {"rows": A.transpose(0, 1), "cols": B.transpose(0, 1)}
        else:
            grid = {"rows": B.transpose(2, 3), "cols": A.transpose(2, 3)}
        return grid | (oriented(t["B_general"], t["A_general"], transposed=transposed) if hybrid else {})

    def update(tile: torch.Tensor, first_row: int, t: Tensors) -> None:
        rows, cols = t["rows"], t["cols"]
        height, width = rows.shape[2], cols.shape[3]
        stop_row = first_row + tile.shape[0]
        for m in range(first_row // height, (stop_row - 1) // height + 1):
            start, stop = max(first_row, m * height), min(stop_row, (m + 1) * height)
            part = tile[start - first_row : stop - first_row]
            for n in range(n_blocks):
                left = rows[m, n, start - m * height : stop - m * height]
                part[:, n * width : (n + 1) * width].addmm_(left, cols[m, n], alpha=scale)
        if hybrid:
            product_added(scale)(tile, first_row, t)

    return RowWise(adapter.store, keys, update, begin=begin, facts={"rank": rank + hybrid, "scale": scale})
