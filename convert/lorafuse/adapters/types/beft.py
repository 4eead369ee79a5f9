"""PEFT's BEFT: `beft_bias` (1, out) is added to the bias (arXiv:2509.15974; PEFT 0.21 beft/layer.py, merge).

A layer without a bias has no place for it in a checkpoint of this architecture, and is refused, as in PEFT.
"""

from lorafuse.adapters.reading.check_tensors import check_shapes, misfit
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.patches.factor import Factor
from lorafuse.patches.lowrank import AddVector
from lorafuse.patches.patch import Patch
from lorafuse.patches.target import Target

SUPPORTED = "biases of layers that have one"
MEMORY = "tiles"

_LEAVES = rf"beft_bias{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the bias of each module."""

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        key = leaves.pop("beft_bias", None)
        return [] if key is None else [_update(adapter, module, key, scale)]

    return collect(adapter, _LEAVES, of_module, warn)


def _update(adapter: AdapterDir, module: str, key: str, scale: float) -> Update:
    n_out = check_shapes(adapter, (key, (1, "out")))["out"]

    def make(target: Target) -> Patch:
        if target.spec.shape != (n_out,):
            raise misfit(adapter, target, key)
        return AddVector(Factor(adapter.store, key, transposed=True), scale)

    return Update(f"{module}.bias", (key,), make=make)
