"""PEFT's BEFT: `beft_bias` (1, out) is added to the bias (arXiv:2509.15974; PEFT 0.21 beft/layer.py, merge).

A layer without a bias has no place for it in a checkpoint of this architecture, and is refused, as in PEFT.
"""

from lorafuse.adapters.factor import Factor
from lorafuse.adapters.lowrank import AddVector
from lorafuse.adapters.patch import Patch, Target, Update
from lorafuse.adapters.shared import NAMED, Found, Leaves, Warn, each_module, expect, misfit, read_modules, shape_of, take
from lorafuse.adapters.store import AdapterDir

_LEAVES = rf"beft_bias{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the bias of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        taken = take(adapter, module, leaves, ("beft_bias",))
        if taken is None:
            return []
        key = taken["beft_bias"]
        shape = shape_of(adapter, key)
        expect(adapter, key, len(shape) == 2 and shape[0] == 1, "[1, out]")
        return [Update(f"{module}.bias", (key,), make=lambda target: _patch(adapter, key, scale, target))]

    return each_module(adapter, modules, of_module), ignored


def _patch(adapter: AdapterDir, key: str, scale: float, target: Target) -> Patch:
    if target.spec.shape != shape_of(adapter, key)[1:]:
        raise misfit(adapter, key, target)
    return AddVector(Factor(adapter.store, key, transposed=True), scale)
