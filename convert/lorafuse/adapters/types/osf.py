"""PEFT's OSF: the small singular values of a weight are trained, with their vectors; the large ones stay.

W' = W − U_low diag(S_low) V_low of W itself + the same of the file (arXiv 2504.07097; PEFT 0.21 osf/layer.py,
get_delta_weight). How many are small follows from the tensors, whatever `effective_rank` says. The SVD of W
is in fp32, and its parts are cast to W's dtype before they are multiplied, as in training (osf/utils.py,
decompose_weight_matrix): an adapter that changes nothing then gives W. The signs of singular vectors cancel.
The weight is held whole, several times over while its SVD is made.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import check_shapes, misfit
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, each_module, read_modules, take
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Base, Patch
from lorafuse.patches.row_function import RowFunction, Tensors, read_whole, reading_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear"
MEMORY = "the whole weight and its SVD"

_LEAVES = rf"osf_svd_params{NAMED}\.[USV]_low"
_NAMES = tuple(f"osf_svd_params.{name}_low" for name in "USV")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module of which something is trained."""
    modules, ignored = read_modules(adapter, _LEAVES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        keys = take(adapter, module, leaves, _NAMES)
        if keys is None:
            return []
        u, s, v = keys
        rank = adapter.store.tensors[s].spec.numel
        r = "r" if rank else 0
        n = check_shapes(adapter, (s, (r,)), (u, ("out", r)), (v, (r, "in")))
        if rank == 0:
            ignored.update(dict.fromkeys(keys, "no singular value of the module is trained"))
            return []
        make = partial(_patch, adapter, keys, scale, rank, (n["out"], n["in"]))
        return [Update(f"{module}.weight", keys, make=make)]

    return each_module(adapter, modules, of_module, warn), ignored


def _patch(
    adapter: AdapterDir,
    keys: tuple[str, ...],
    scale: float,
    rank: int,
    shape: tuple[int, int],
    target: Target,
) -> Patch:
    n_rows, n_cols = shape
    least = min(shape)
    if target.spec.shape != shape or rank > least or target.is_conv1d:
        raise misfit(adapter, target, *keys)
    return RowFunction(
        adapter.store,
        dict(zip("USV", keys, strict=True)),
        partial(_add, scale=scale),
        begin_from=partial(_begin, dtype=getattr(torch, target.spec.torch_name)),
        # The weight, LAPACK's copy, U and V, and its workspace (gesdd, 4 · least² + the small factors); later
        # four products.
        begin_nbytes=4 * (5 * n_rows * n_cols + 6 * least * least) + reading_nbytes(target.spec),
        holds_weight=True,
        facts={"rank": rank, "scale": scale},
    )


def _begin(tensors: Tensors, base: Base, dtype: torch.dtype) -> Tensors:
    low = _low(read_whole(base), len(tensors["S"]), dtype)
    return {"delta": (tensors["U"] * tensors["S"]) @ tensors["V"] - (low[0] * low[1]) @ low[2]}


def _low(weight: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The last `rank` singular vectors and values, as fp32 values that `dtype` has."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    high = s.shape[0] - rank
    return tuple(part.to(dtype).float() for part in (u[:, high:], s[high:], v[high:]))


def _add(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    tile.add_(tensors["delta"][first_row : first_row + tile.shape[0]], alpha=scale)
