"""PEFT's LN tuning: a layer, usually a layer norm, is trained whole and replaces that of the base.

The new parameter is the stored one (PEFT 0.21 ln_tuning/layer.py, merge, swaps the modules). A module with children is saved with
the adapter's name in its keys (`self_attn.ln_tuning_layers.default.q_proj.weight`), a single layer without.
"""

from collections.abc import Callable

from lorafuse.adapters.factor import Factor
from lorafuse.adapters.fit import misfit
from lorafuse.adapters.keys import check_float, drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import Patch, Target, Update
from lorafuse.adapters.rows import ReplaceRows
from lorafuse.adapters.store import AdapterDir
from lorafuse.codecs.dense import DenseSources

SUPPORTED = "layers of any kind, their parameters replaced"
MEMORY = "tiles"

_MARKER = "ln_tuning_layers"
_LEAVES = rf"{_MARKER}(\.(?P<name>[^.]+))?(\.[^.]+)*?\.[^.]+"


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    modules = group(adapter, _LEAVES)
    ignored = drop_copies(modules)
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        for leaf in [leaf for leaf in leaves if leaf.startswith(f"{_MARKER}.")]:
            result.append(_update(adapter, module + leaf.removeprefix(_MARKER), leaves.pop(leaf), scale))
        refuse_left_over(adapter, leaves)
    return result, ignored


def _update(adapter: AdapterDir, parameter: str, key: str, scale: float) -> Update:
    check_float(adapter, key)
    if scale == 1.0:
        return Update(parameter, (key,), replaced=DenseSources(adapter.store, key))
    return Update(parameter, (key,), make=lambda target: _blend(adapter, key, scale, target))


def _blend(adapter: AdapterDir, key: str, scale: float, target: Target) -> Patch:
    """W + scale · (W' − W)."""
    spec = adapter.store.tensors[key].spec
    if spec.shape != target.spec.shape:
        raise misfit(adapter, (key,), target)
    return ReplaceRows(Factor(adapter.store, key), range(spec.shape[0]), scale)
