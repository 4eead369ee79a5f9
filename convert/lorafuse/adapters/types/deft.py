"""PEFT's DEFT: a subspace of the outputs is taken out of the weight and another content put in.

ΔW = Q (s·R − rightᵀ W), with Q = P and right = relu(P), or with `decomposition_method` "qr" Q = right = the
orthogonal factor of P; s = alpha / r, or 1 without alpha; with `para`, ΔW = −Q rightᵀ W (PEFT 0.21
deft/layer.py, get_delta_weight). rightᵀ W is a sum over all rows, so the weight is read once before its tiles
are made.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_config import number, one_of
from lorafuse.adapters.reading.check_tensors import check_shapes, is_transposed, unexpected
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Base, Patch
from lorafuse.patches.row_function import (
    RowFunction,
    Tensors,
    oriented,
    product_added,
    reading_nbytes,
    tile_nbytes,
)
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv1D; relu and qr, para"
MEMORY = "tiles, and the base is read twice"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    qr = one_of(adapter, "decomposition_method", "relu", ("relu", "qr")) == "qr"
    return collect(adapter, r"deft_[PR]", partial(_injection, adapter, scale, qr), warn)


def _injection(adapter: AdapterDir, scale: float, qr: bool, module: str, leaves: Leaves) -> list[Update]:
    keys = take(adapter, module, leaves, ("deft_P",) if adapter.config.get("para") else ("deft_P", "deft_R"))
    if keys is None:
        return []
    n = check_shapes(adapter, *zip(keys, (("out", "r"), ("r", "in")), strict=False))
    n_out, rank = n["out"], n["r"]
    if rank > n_out:
        raise unexpected(adapter, keys[0], "at most as many columns as rows")
    alpha = number(adapter, "alpha", 0, null=True)
    s = alpha / rank if alpha else 1.0

    def make(target: Target) -> Patch:
        n_in = n.get("in", target.spec.numel // n_out)
        transposed = is_transposed(adapter, keys, (n_out, n_in), target)
        return RowFunction(
            adapter.store,
            dict(zip("PR", keys, strict=False)),
            partial(product_added, scale=scale),
            begin_from=partial(_begin, qr=qr, s=s, transposed=transposed),
            # In float64: P, its factor and LAPACK's copies, and of Q W three; then rows of W, and their
            # product.
            begin_nbytes=32 * rank * (n_out + n_in)
            + reading_nbytes(target.spec)
            + 2 * tile_nbytes(target.spec),
            facts={"rank": rank, "scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(tensors: Tensors, base: Base, qr: bool, s: float, transposed: bool) -> Tensors:
    p = tensors["P"].double()
    q = torch.linalg.qr(p).Q if qr else p
    taken = _project(q if qr else p.relu(), base, transposed)
    put = tensors["R"].double() * s if "R" in tensors else torch.zeros_like(taken)
    return oriented(q.float(), (put - taken).float(), transposed)


def _project(right: torch.Tensor, base: Base, transposed: bool) -> torch.Tensor:
    """rightᵀ W, float64 [rank, inputs], in float64 since it is a difference to R that counts."""
    n_in = base.shape[0] if transposed else base.shape[1]
    product = torch.zeros(right.shape[1], n_in, dtype=torch.float64, device=right.device)
    for start, rows in base.tiles():
        stop = start + rows.shape[0]
        if transposed:
            product[:, start:stop] = (rows.double() @ right).T
        else:
            product.addmm_(right[start:stop].T, rows.double())
    return product
