"""PEFT's LN tuning: a layer, usually a layer norm, is trained whole and replaces that of the base.

The new parameter is the stored one (PEFT 0.21 ln_tuning/layer.py, merge, swaps the modules). A module with
children is saved with the adapter's name in its keys (`self_attn.ln_tuning_layers.default.q_proj.weight`), a
single layer without.
"""

from functools import partial

from lorafuse.adapters.reading.check_tensors import misfit, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.codecs.dense import DenseSources
from lorafuse.patches.factor import Factor
from lorafuse.patches.patch import Patch
from lorafuse.patches.replace_rows import ReplaceRows
from lorafuse.patches.target import Target

SUPPORTED = "layers of any kind, their parameters replaced"
MEMORY = "tiles"

_MARKER = "ln_tuning_layers"
_LEAVES = rf"{_MARKER}{NAMED}(\.[^.]+)*?\.[^.]+"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for each parameter of each layer."""
    return collect(adapter, _LEAVES, partial(_layer, adapter, scale), warn)


def _layer(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    trained = [leaf for leaf in leaves if leaf.startswith(f"{_MARKER}.")]
    return [
        _update(adapter, module + leaf.removeprefix(_MARKER), leaves.pop(leaf), scale) for leaf in trained
    ]


def _update(adapter: AdapterDir, parameter: str, key: str, scale: float) -> Update:
    check_float(adapter, key)
    if scale == 1.0:
        return Update(parameter, (key,), replaced=DenseSources(adapter.store, key))
    return Update(parameter, (key,), make=partial(_blend, adapter, key, scale))


def _blend(adapter: AdapterDir, key: str, scale: float, target: Target) -> Patch:
    """W + scale · (W' − W)."""
    shape = shape_of(adapter, key)
    if shape != target.spec.shape:
        raise misfit(adapter, target, key)
    return ReplaceRows(Factor(adapter.store, key), range(shape[0]), scale)
