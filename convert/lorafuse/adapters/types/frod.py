"""PEFT's FRoD: a weight as U (S + diag λ) Vᵀ, V shared by the layers of a kind, U frozen, λ and a sparse S
trained.

U has the columns of W V⁻ᵀ divided by their norms (doi 10.1609/aaai.v40i31.39813; PEFT 0.21 frod/layer.py,
_calculate_frod_u_and_lambda and get_delta_weight), found in float64 and cast to W's dtype as in training. V
and the places of S are in the file with `save_projection`; otherwise PEFT makes them from the weights of all
layers together. The columns' norms are a sum over all rows, so the weight is read once before its tiles are
made; of a Conv1D, whose rows are inputs, U is held.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import check_positions, check_shapes, is_transposed, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import (
    Leaves,
    Updates,
    Warn,
    each_module,
    read_modules,
    take,
    take_shared,
)
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.factor import load
from lorafuse.patches.patch import Base, Patch
from lorafuse.patches.row_function import RowFunction, Tensors, reading_nbytes, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv1D; saved projections only"
MEMORY = "some matrices of inputs × inputs, for a Conv1D also U; the base is read twice"

_LEAVES = r"frod_lambda_(l|s_values)|frod_(V|s_indices|s_size)\.[^.]+"
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
_LEAST_NORM = 1e-12  # PEFT's


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    shared = take_shared(modules, *_SHARED)
    result = each_module(adapter, modules, partial(_decomposed, adapter, scale, shared), warn)
    used = {key for update in result for key in update.keys}
    return result, ignored | dict.fromkeys(sorted(set(shared.values()) - used), "no module uses it")


def _decomposed(
    adapter: AdapterDir, scale: float, shared: Leaves, module: str, leaves: Leaves
) -> list[Update]:
    own = take(adapter, module, leaves, ("frod_lambda_l", "frod_lambda_s_values"))
    if own is None:
        return []
    keys = own + _shared(adapter, module, shared)
    n_in = _check(adapter, *keys)

    def make(target: Target) -> Patch:
        n_out = target.spec.numel // n_in
        transposed = is_transposed(adapter, (keys[2],), (n_out, n_in), target)
        dtype = getattr(torch, target.spec.torch_name)
        # V, S, the inverse and what LAPACK makes of them, in float64; of a Conv1D U in float64, as it is
        # divided, cast, and kept.
        nbytes = 56 * n_in * n_in + (28 * n_in * n_out if transposed else 0)
        return RowFunction(
            adapter.store,
            dict(zip(("lambda", "values", "V", "indices"), keys, strict=False)),
            partial(_replace, scale=scale, transposed=transposed, dtype=dtype),
            begin_from=partial(_begin, transposed=transposed, dtype=dtype),
            begin_nbytes=nbytes + reading_nbytes(target.spec) + 4 * tile_nbytes(target.spec),
            scratch_nbytes=7 * tile_nbytes(target.spec),
            facts={"scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _shared(adapter: AdapterDir, module: str, shared: Leaves) -> tuple[str, ...]:
    names = [f"{name}.{_category(module)}" for name in _SHARED]
    for name in names:
        if name not in shared:
            raise AdapterError(
                f"{adapter.file}: has no {shown(name)} for {shown(module)} (save_projection was off); PEFT "
                "would make it from all layers of that kind together."
            )
    return tuple(shared[name] for name in names)


def _category(module: str) -> str:
    """The kind of a layer: the last two parts of its path, one where the other is a number (frod/model.py,
    _category_from_key)."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _check(adapter: AdapterDir, lambdas: str, values: str, v: str, indices: str, size: str) -> int:
    """The number of inputs."""
    n = "n" if adapter.store.tensors[values].spec.numel else 0
    expected = ((lambdas, ("in",)), (v, ("in", "in")), (values, (n,)), (indices, (2, n)))
    n_in = check_shapes(adapter, *expected, integers=(indices,))["in"]
    check_positions(adapter, indices, n_in, f"inputs of {shown(lambdas)}")
    if shape_of(adapter, size) != (2,) or load(adapter.store, size, torch.device("cpu")).tolist() != [
        n_in,
        n_in,
    ]:
        raise AdapterError(
            f"{adapter.file}: {shown(size)} is not {n_in} × {n_in}, which follows from {shown(lambdas)}."
        )
    return n_in


def _begin(tensors: Tensors, base: Base, transposed: bool, dtype: torch.dtype) -> Tensors:
    v = tensors["V"].double()
    s = torch.diag(tensors["lambda"].double())
    s.index_put_(tuple(tensors["indices"]), tensors["values"].double(), accumulate=True)
    core = (s @ v.T).float()  # [n_in, n_in], W' = U core
    if transposed:
        return {"left": core.T, "right": _u_transposed(_inverse(v), base, dtype)}
    return {"to_u": _to_u(_inverse(v), base), "core": core}


def _replace(
    tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float, transposed: bool, dtype: torch.dtype
) -> None:
    if transposed:
        new = tensors["left"][first_row : first_row + tile.shape[0]] @ tensors["right"]
    else:
        new = _cast(tile.double() @ tensors["to_u"], dtype) @ tensors["core"]
    tile.add_(new.sub_(tile), alpha=scale)


def _inverse(v: torch.Tensor) -> torch.Tensor:
    inverse: torch.Tensor
    try:
        inverse = torch.linalg.inv(v)
    except RuntimeError:  # V is singular
        inverse = torch.linalg.pinv(v, rtol=1e-6)  # as in PEFT
    return inverse


def _to_u(inverse: torch.Tensor, base: Base) -> torch.Tensor:
    """What W is multiplied by to make U: V⁻ᵀ, each column divided by the norm of its product."""
    squares = torch.zeros(inverse.shape[0], dtype=torch.float64, device=inverse.device)
    for _, rows in base.tiles():
        squares += (rows.double() @ inverse.T).square_().sum(dim=0)
    return inverse.T * _reciprocal(squares.sqrt())


def _u_transposed(inverse: torch.Tensor, base: Base, dtype: torch.dtype) -> torch.Tensor:
    """Uᵀ from Wᵀ, whose rows are inputs."""
    product = torch.zeros(base.shape, dtype=torch.float64, device=inverse.device)  # (W V⁻ᵀ)ᵀ
    for start, rows in base.tiles():
        product.addmm_(inverse[:, start : start + rows.shape[0]], rows.double())
    return _cast(product * _reciprocal(product.norm(dim=1))[:, None], dtype)


def _reciprocal(norms: torch.Tensor) -> torch.Tensor:
    return torch.where(norms > _LEAST_NORM, 1 / norms, 0.0)


def _cast(u: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 → fp32 values that `dtype` has, through fp32 as in PEFT."""
    return u.float().to(dtype).float()
