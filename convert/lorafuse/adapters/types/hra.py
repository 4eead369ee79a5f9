"""PEFT's HRA: W' = W · Π (I − 2 u uᵀ), reflections at the columns u of hra_u, on Linear and Conv2d (arXiv
2405.17484; PEFT 0.21 hra/layer.py, get_delta_weight).

The product is I − U T Uᵀ with an upper triangular T (the compact WY form of Schreiber and Van Loan, 1989), so
a row costs two products of rank r, and no in × in matrix is made. With apply_GS the columns are made
orthonormal first, and T is 2 I.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import check_shapes, misfit, n_cols_of, refuse_conv1d
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv2d; Gram-Schmidt"
MEMORY = "tiles"

_LEAVES = rf"hra_\w+{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(
        adapter, _LEAVES, partial(_reflections, adapter, scale, bool(adapter.config.get("apply_GS"))), warn
    )


def _reflections(
    adapter: AdapterDir, scale: float, orthonormal: bool, module: str, leaves: Leaves
) -> list[Update]:
    key = leaves.pop("hra_u", None)
    if key is None:
        return []
    n = check_shapes(adapter, (key, ("in", "r")))

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, key, target)
        if n["in"] != n_cols_of(target):
            raise misfit(adapter, target, key)
        return RowFunction(
            adapter.store,
            {"u": key},
            partial(_reflect, scale=scale),
            begin=partial(_begin, orthonormal=orthonormal),
            begin_nbytes=32 * n["in"] * n["r"] + 24 * n["r"] ** 2,
            scratch_nbytes=-(-n["r"] // n["in"]) * tile_nbytes(target.spec),
            facts={"rank": n["r"], "scale": scale},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _begin(tensors: Tensors, orthonormal: bool) -> Tensors:
    u = tensors["u"].double()  # [in, r]
    rank = u.shape[1]
    if orthonormal:
        for i in range(rank):
            for j in range(i):
                u[:, i] -= (u[:, j] @ u[:, i]) * u[:, j]
            u[:, i] /= u[:, i].norm()
        t = 2 * torch.eye(rank, dtype=u.dtype, device=u.device)
    else:
        u /= u.norm(dim=0)
        gram = u.T @ u
        t = torch.zeros_like(gram)
        for i in range(rank):
            t[:i, i] = -2 * (t[:i, :i] @ gram[:i, i])
            t[i, i] = 2
    return {"left": u.float(), "right": (t @ u.T).float()}


def _reflect(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    tile.addmm_(tile @ tensors["left"], tensors["right"], alpha=-scale)
