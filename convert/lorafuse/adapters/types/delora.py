"""PEFT's DeLoRA: Δ = B · diag(λ / r / (‖A_i‖ ‖B^i‖)) · A · diag(w_norm), A_i a row of A, B^i a column of B.

(arXiv:2503.18225; PEFT 0.21 delora/layer.py, _compute_delta.) Norms are at least 1e-4, `delora_w_norm` holds
the norms of the base's columns when training began, and r is the rank of the tensors. Linear only.
"""

from functools import partial

from lorafuse.adapters.reading.check_tensors import Dims, check_shapes, misfit
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect, take
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, product_added
from lorafuse.patches.target import Target

SUPPORTED = "Linear; files that hold delora_w_norm"
MEMORY = "tiles"

_NAMES = ("A", "B", "lambda", "w_norm")
_LEAVES = rf"delora_(A|B|lambda|w_norm){NAMED}"
_LEAST_NORM = 1e-4


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_normalized, adapter, scale), warn)


def _normalized(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    keys = take(adapter, module, leaves, tuple(f"delora_{name}" for name in _NAMES))
    if keys is None:
        return []
    dims: tuple[Dims, ...] = (("r", "in"), ("out", "r"), (1,), ("in",))
    n = check_shapes(adapter, *zip(keys, dims, strict=True))

    def make(target: Target) -> Patch:
        if target.spec.shape != (n["out"], n["in"]):
            raise misfit(adapter, target, keys[1])
        return RowFunction(
            adapter.store,
            dict(zip(_NAMES, keys, strict=True)),
            partial(product_added, scale=scale),
            begin=_begin,
            begin_nbytes=8 * n["r"] * (n["in"] + n["out"]),
            facts={"rank": n["r"], "scale": scale},
        )

    return [Update(f"{module}.weight", keys, make=make)]


def _begin(t: Tensors) -> Tensors:
    A, B = t["A"], t["B"]
    norms = A.norm(dim=1).clamp(min=_LEAST_NORM) * B.norm(dim=0).clamp(min=_LEAST_NORM)  # float32 [r]
    return {"left": B * (t["lambda"] / len(A) / norms), "right": A * t["w_norm"]}
