"""PEFT's DeLoRA: Δ = B · diag(λ / r / (‖A_i‖ ‖B^i‖)) · A · diag(w_norm), A_i a row of A, B^i a column of B.

(arXiv:2503.18225; PEFT 0.21 delora/layer.py, _compute_delta.) Norms are at least 1e-4, `delora_w_norm` holds the norms of the
base's columns when training began, and r is the rank of the tensors. Linear only.
"""

from lorafuse.adapters.patch import Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors, product_added
from lorafuse.adapters.shared import NAMED, Found, Leaves, Warn, each_module, expect, misfit, read_modules, shape_of, take
from lorafuse.adapters.store import AdapterDir

_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_LEAVES = rf"delora_(A|B|lambda|w_norm){NAMED}"
_LEAST_NORM = 1e-4


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        keys = take(adapter, module, leaves, _NAMES)
        if keys is None:
            return []
        _check(adapter, keys)
        return [Update(f"{module}.weight", tuple(keys.values()), make=lambda target: _patch(adapter, keys, scale, target))]

    return each_module(adapter, modules, of_module), ignored


def _check(adapter: AdapterDir, keys: dict[str, str]) -> None:
    a, b, strength, norms = (shape_of(adapter, keys[name]) for name in _NAMES)
    expect(adapter, keys["delora_A"], len(a) == 2, "[r, in]")
    expect(adapter, keys["delora_B"], len(b) == 2 and b[1] == a[0], f"[out, {a[0]}]")
    expect(adapter, keys["delora_lambda"], strength == (1,), "[1]")
    expect(adapter, keys["delora_w_norm"], norms == (a[1],), f"[{a[1]}]")


def _patch(adapter: AdapterDir, keys: dict[str, str], scale: float, target: Target) -> Patch:
    (rank, n_in), (n_out, _) = shape_of(adapter, keys["delora_A"]), shape_of(adapter, keys["delora_B"])
    if target.spec.shape != (n_out, n_in):
        raise misfit(adapter, keys["delora_B"], target)

    def begin(t: Tensors, base: Base) -> Tensors:
        A, B = t["delora_A"], t["delora_B"]
        norms = A.norm(dim=1).clamp(min=_LEAST_NORM) * B.norm(dim=0).clamp(min=_LEAST_NORM)  # float32 [r]
        return {"left": B * (t["delora_lambda"] / rank / norms), "right": A * t["delora_w_norm"]}

    return RowWise(
        adapter.store,
        keys,
        product_added(scale),
        begin=begin,
        begin_nbytes=4 * rank * (n_in + n_out),
        facts={"rank": rank, "scale": scale},
    )
