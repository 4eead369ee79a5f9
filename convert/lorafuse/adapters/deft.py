"""PEFT's DEFT: a subspace of the outputs is taken out of the weight and another content put in.

ΔW = Q (s·R − rightᵀ W), with Q = P and right = relu(P), or with `decomposition_method` "qr" Q = right = the orthogonal factor of
P; s = alpha / r, or 1 without alpha; with `para`, ΔW = −Q rightᵀ W (PEFT 0.21 deft/layer.py, get_delta_weight). rightᵀ W is a sum
over all rows, so the weight is read once before its tiles are made.
"""

from collections.abc import Callable

import torch

from lorafuse.adapters.fit import check_shape, is_transposed, number, take
from lorafuse.adapters.keys import check_float, drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, shown

SUPPORTED = "Linear, Conv1D; relu and qr, para"
MEMORY = "tiles, and the base is read twice"


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    method = adapter.config.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise AdapterError(f"{adapter.path / CONFIG}: decomposition_method is {shown(method)}, expected relu or qr.")
    modules = group(adapter, r"deft_[PR]")
    ignored = drop_copies(modules)
    names = ("deft_P",) if adapter.config.get("para") else ("deft_P", "deft_R")
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        keys = take(adapter, module, leaves, names)
        if keys is not None:
            result.append(_update(adapter, module, keys, method == "qr", scale))
        refuse_left_over(adapter, leaves)
    return result, ignored


def _update(adapter: AdapterDir, module: str, keys: tuple[str, ...], qr: bool, scale: float) -> Update:
    p = adapter.store.tensors[keys[0]].spec
    if len(p.shape) != 2 or p.numel == 0 or p.shape[1] > p.shape[0]:
        raise AdapterError(f"{adapter.file}: {shown(keys[0])} is {p}, expected a matrix [outputs, rank].")
    check_float(adapter, keys[0])
    if len(keys) == 2:
        n_cols = adapter.store.tensors[keys[1]].spec.n_cols
        check_shape(adapter, keys[1], (p.shape[1], n_cols), f"from {shown(keys[0])}")
    alpha = number(adapter, "alpha", 0)
    s = alpha / p.shape[1] if alpha else 1.0
    return Update(f"{module}.weight", keys, make=lambda target: _patch(adapter, keys, qr, s, scale, target))


def _patch(adapter: AdapterDir, keys: tuple[str, ...], qr: bool, s: float, scale: float, target: Target) -> Patch:
    n_out, rank = adapter.store.tensors[keys[0]].spec.shape
    n_in = adapter.store.tensors[keys[1]].spec.n_cols if len(keys) == 2 else target.spec.numel // n_out
    transposed = is_transposed(adapter, keys, (n_out, n_in), target)

    def begin(tensors: Tensors, base: Base) -> Tensors:
        p = tensors["P"].double()
        q = torch.linalg.qr(p).Q if qr else p
        taken = _project(q if qr else p.relu(), base, transposed)
        put = tensors["R"].double() * s if "R" in tensors else torch.zeros_like(taken)
        q, core = q.float(), (put - taken).float()
        return {"left": core.T, "right": q.T} if transposed else {"left": q, "right": core}

    def update(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
        tile.addmm_(tensors["left"][first_row : first_row + tile.shape[0]], tensors["right"], alpha=scale)

    nbytes = 8 * (3 * rank * (n_out + n_in)) + 8 * max(1 << 18, target.spec.n_cols)
    named = dict(zip(("P", "R"), keys, strict=False))
    return RowWise(adapter.store, named, update, begin=begin, begin_nbytes=nbytes, facts={"rank": rank, "scale": scale})


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
