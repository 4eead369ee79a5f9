"""PEFT's FRoD: a weight as U (S + diag λ) Vᵀ, V shared by the layers of a kind, U frozen, λ and a sparse S trained.

U has the columns of W V⁻ᵀ divided by their norms (doi 10.1609/aaai.v40i31.39813; PEFT 0.21 frod/layer.py,
_calculate_frod_u_and_lambda and get_delta_weight), found in float64 and cast to W's dtype as in training. V and the places of S are
in the file with `save_projection`; otherwise PEFT makes them from the weights of all layers together. The columns' norms are a
sum over all rows, so the weight is read once before its tiles are made; of a Conv1D, whose rows are inputs, U is held.
"""

from collections.abc import Callable

import torch

from lorafuse.adapters.factor import load
from lorafuse.adapters.fit import check_shape, is_transposed, take
from lorafuse.adapters.keys import drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.store import AdapterDir
from lorafuse.errors import AdapterError, shown

SUPPORTED = "Linear, Conv1D; saved projections only"
MEMORY = "some matrices of inputs × inputs, for a Conv1D also U; the base is read twice"

_NAMES = ("frod_lambda_l", "frod_lambda_s_values")
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
_LEAST_NORM = 1e-12  # PEFT's


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    modules = group(adapter, r"frod_lambda_(l|s_values)|frod_(V|s_indices|s_size)\.[^.]+")
    ignored = drop_copies(modules)
    shared = modules.pop("base_model", {})
    result: list[Update] = []
    used: set[str] = set()
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        keys = take(adapter, module, leaves, _NAMES)
        if keys is not None:
            keys += _shared(adapter, module, shared)
            used |= set(keys)
            result.append(_update(adapter, module, keys, scale))
        refuse_left_over(adapter, leaves)
    return result, ignored | dict.fromkeys(sorted(set(shared.values()) - used), "no module uses it")


def _shared(adapter: AdapterDir, module: str, shared: dict[str, str]) -> tuple[str, ...]:
    names = [f"{name}.{_category(module)}" for name in _SHARED]
    for name in names:
        if name not in shared:
            raise AdapterError(
                f"{adapter.file}: has no {shown(name)} for {shown(module)} (save_projection was off); PEFT would make it from all "
                "layers of that kind together."
            )
    return tuple(shared[name] for name in names)


def _category(module: str) -> str:
    """The kind of a layer: the last two parts of its path, one where the other is a number (frod/model.py, _category_from_key)."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _update(adapter: AdapterDir, module: str, keys: tuple[str, ...], scale: float) -> Update:
    lambdas, values, v, indices, size = keys
    spec = adapter.store.tensors[indices].spec
    n_in = adapter.store.tensors[lambdas].spec.numel
    check_shape(adapter, lambdas, (n_in,), "as a vector")
    check_shape(adapter, v, (n_in, n_in), f"from {shown(lambdas)}")
    found = load(adapter.store, indices, torch.device("cpu"))
    outside = found.is_floating_point() or (found.numel() > 0 and (int(found.min()) < 0 or int(found.max()) >= n_in))
    if outside or len(spec.shape) != 2 or spec.shape[0] != 2:
        raise AdapterError(f"{adapter.file}: {shown(indices)} is {spec}, expected [2, n] positions in {n_in} × {n_in}.")
    check_shape(adapter, values, (spec.shape[1],), f"from {shown(indices)}")
    if load(adapter.store, size, torch.device("cpu")).tolist() != [n_in, n_in]:
        raise AdapterError(f"{adapter.file}: {shown(size)} is not {n_in} × {n_in}, which follows from {shown(lambdas)}.")
    return Update(f"{module}.weight", keys, make=lambda target: _patch(adapter, keys, n_in, scale, target))


def _patch(adapter: AdapterDir, keys: tuple[str, ...], n_in: int, scale: float, target: Target) -> Patch:
    n_out = target.spec.numel // n_in
    transposed = is_transposed(adapter, (keys[2],), (n_out, n_in), target)
    dtype = getattr(torch, target.spec.torch_name)

    def begin(tensors: Tensors, base: Base) -> Tensors:
        v = tensors["V"].double()
        s = torch.diag(tensors["lambda"].double())
        s.index_put_(tuple(tensors["indices"]), tensors["values"].double(), accumulate=True)
        core = (s @ v.T).float()  # [n_in, n_in], W' = U core
        if transposed:
            return {"left": core.T, "right": _u_transposed(_inverse(v), base, dtype)}
        return {"to_u": _to_u(_inverse(v), base), "core": core}

    def update(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
        if transposed:
            new = tensors["left"][first_row : first_row + tile.shape[0]] @ tensors["right"]
        else:
            new = _cast(tile.double() @ tensors["to_u"], dtype) @ tensors["core"]
        tile.add_(new.sub_(tile), alpha=scale)

    # V, S, the inverse and what LAPACK makes of them, in float64; of a Conv1D U in float64, as it is divided, cast, and kept.
    nbytes = 56 * n_in * n_in + (28 * n_in * n_out if transposed else 0)
    named = dict(zip(("lambda", "values", "V", "indices"), keys, strict=False))
    scratch = 32 * max(1 << 18, target.spec.n_cols)
    return RowWise(adapter.store, named, update, begin=begin, begin_nbytes=nbytes, scratch_nbytes=scratch, facts={"scale": scale})


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
