"""PEFT's HRA: W' = W · Π (I − 2 u uᵀ), reflections at the columns u of hra_u, on Linear and Conv2d (arXiv 2405.17484; PEFT 0.21
hra/layer.py, get_delta_weight).

The product is I − U T Uᵀ with an upper triangular T (the compact WY form of Schreiber and Van Loan, 1989), so a row costs two
products of rank r, and no in × in matrix is made. With apply_GS the columns are made orthonormal first, and T is 2 I.
"""

import torch

from lorafuse.adapters.keys import check_float
from lorafuse.adapters.modules import Warn, collect, misfit, n_cols_of, not_one_update, refuse_conv1d, tile_nbytes
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import AdapterDir

_LEAVES = r"hra_\w+(\.(?P<name>[^.]+))?"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> tuple[list[Update], dict[str, str]]:
    """Everything the adapter does, and the tensors that it ignores with the reason of each."""
    return collect(adapter, _LEAVES, lambda module, leaves: _reflections(adapter, module, leaves, scale), warn)


def _reflections(adapter: AdapterDir, module: str, leaves: dict[str, str], scale: float) -> list[Update]:
    key = leaves.pop("hra_u", None)
    if key is None:
        return []
    check_float(adapter, key)
    spec = adapter.store.tensors[key].spec
    if len(spec.shape) != 2 or spec.numel == 0:
        raise not_one_update(adapter, (key,))
    orthonormal = bool(adapter.config.get("apply_GS"))

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, key, target)
        if spec.shape[0] != n_cols_of(target):
            raise misfit(adapter, (key,), target)
        return RowWise(
            adapter.store,
            {"u": key},
            lambda tile, first_row, tensors: _reflect(tile, tensors, scale),
            begin=lambda tensors, base: _begin(tensors, base, orthonormal),
            begin_nbytes=32 * spec.numel,
            scratch_nbytes=tile_nbytes(target),
            facts={"rank": spec.shape[1], "scale": scale},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _begin(tensors: Tensors, base: Base, orthonormal: bool) -> Tensors:
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


def _reflect(tile: torch.Tensor, tensors: Tensors, scale: float) -> None:
    tile.addmm_(tile @ tensors["left"], tensors["right"], alpha=-scale)
