"""PEFT's OSF: the small singular values of a weight are trained, with their vectors; the large ones stay.

W' = W − U_low diag(S_low) V_low of W itself + the same of the file (arXiv 2504.07097; PEFT 0.21 osf/layer.py, get_delta_weight).
How many are small follows from the tensors, whatever `effective_rank` says. The SVD of W is in fp32, and its parts are cast to
W's dtype before they are multiplied, as in training (osf/utils.py, decompose_weight_matrix): an adapter that changes nothing then
gives W. The signs of singular vectors cancel. The weight is held whole, several times over while its SVD is made.
"""

from collections.abc import Callable

import torch

from lorafuse.adapters.fit import check_shape, misfit, take
from lorafuse.adapters.keys import check_float, drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import AdapterDir
from lorafuse.errors import AdapterError, shown

SUPPORTED = "Linear"
MEMORY = "the whole weight and its SVD"

_NAMES = ("U_low", "S_low", "V_low")


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    modules = group(adapter, r"osf_svd_params(\.(?P<name>[^.]+))?\.[USV]_low")
    ignored = drop_copies(modules)
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        keys = take(adapter, module, leaves, tuple(f"osf_svd_params.{name}" for name in _NAMES))
        if keys is not None and _rank(adapter, keys) == 0:
            ignored |= dict.fromkeys(keys, "no singular value of the module is trained")
        elif keys is not None:
            result.append(_update(adapter, module, keys, scale))
        refuse_left_over(adapter, leaves)
    return result, ignored


def _rank(adapter: AdapterDir, keys: tuple[str, ...]) -> int:
    """How many singular values are trained. Raises AdapterError when the tensors differ in that."""
    s = adapter.store.tensors[keys[1]].spec
    if len(s.shape) != 1:
        raise AdapterError(f"{adapter.file}: {shown(keys[1])} is {s}, expected a vector.")
    check_float(adapter, keys[1])
    u, v = (adapter.store.tensors[key].spec for key in (keys[0], keys[2]))
    check_shape(adapter, keys[0], (*u.shape[:1], s.shape[0]), f"from {shown(keys[1])}")
    check_shape(adapter, keys[2], (s.shape[0], v.n_cols), f"from {shown(keys[1])}")
    return s.shape[0]


def _update(adapter: AdapterDir, module: str, keys: tuple[str, ...], scale: float) -> Update:
    return Update(f"{module}.weight", keys, make=lambda target: _patch(adapter, keys, scale, target))


def _patch(adapter: AdapterDir, keys: tuple[str, ...], scale: float, target: Target) -> Patch:
    n_rows, n_cols = target.spec.shape[0], target.spec.n_cols
    u, s, v = (adapter.store.tensors[key].spec for key in keys)
    rank, least = s.shape[0], min(n_rows, n_cols)
    if (u.shape[0], v.n_cols) != (n_rows, n_cols) or rank > least or len(target.spec.shape) != 2 or target.is_conv1d:
        raise misfit(adapter, keys, target)
    dtype = getattr(torch, target.spec.torch_name)

    def begin(tensors: Tensors, base: Base) -> Tensors:
        weight = torch.empty(base.shape, device=base.arena.device)
        for start, rows in base.tiles():
            weight[start : start + rows.shape[0]] = rows
        low = _low(weight, rank, dtype)
        return {"delta": (tensors["U"] * tensors["S"]) @ tensors["V"] - (low[0] * low[1]) @ low[2]}

    def update(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
        tile.add_(tensors["delta"][first_row : first_row + tile.shape[0]], alpha=scale)

    # The weight, LAPACK's copy, U and V, and its workspace (gesdd, 4 · least² + the small factors); later four products.
    nbytes = 4 * (5 * n_rows * n_cols + 6 * least * least)
    named = {"U": keys[0], "S": keys[1], "V": keys[2]}
    return RowWise(adapter.store, named, update, begin=begin, begin_nbytes=nbytes, facts={"rank": rank, "scale": scale})


def _low(weight: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The last `rank` singular vectors and values, as fp32 values that `dtype` has."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    high = s.shape[0] - rank
    return tuple(part.to(dtype).float() for part in (u[:, high:], s[high:], v[high:]))
