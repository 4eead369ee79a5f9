"""The checks that the PEFT types have in common: a module's tensors are all there, fit each other and the weight, and a
config field has the type that a formula needs."""

import math
from collections.abc import Mapping

from lorafuse.adapters.keys import check_float
from lorafuse.adapters.patch import Target
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, shown


def take(adapter: AdapterDir, module: str, leaves: dict[str, str], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The keys of all `names`, taken out of `leaves`; None when none is there. Raises AdapterError when only some are."""
    present = [name for name in names if name in leaves]
    if not present:
        return None
    missing = [name for name in names if name not in leaves]
    if missing:
        raise AdapterError(f"{adapter.file}: {shown(module)} has {present[0]} but no {missing[0]}.")
    return tuple(leaves.pop(name) for name in names)


def check_shape(adapter: AdapterDir, key: str, expected: tuple[int, ...], why: str) -> None:
    """A float tensor of that shape, or AdapterError; `why` says what the shape follows from."""
    check_float(adapter, key)
    found = adapter.store.tensors[key].spec
    if found.shape != expected:
        raise AdapterError(f"{adapter.file}: {shown(key)} is {found}, expected {list(expected)} {why}.")


def is_transposed(adapter: AdapterDir, keys: tuple[str, ...], out_in: tuple[int, int], target: Target) -> bool:
    """Whether the weight is stored as (in, out), as HF Conv1D does; decided by its shape and, when that is square, by the
    architecture, since the saved `fan_in_fan_out` is that of the last layer which PEFT touched. Raises AdapterError when an
    update of `out_in` fits neither way."""
    matrix = (target.spec.shape[0], target.spec.n_cols)
    if out_in == matrix and not (out_in[0] == out_in[1] and target.is_conv1d):
        return False
    if out_in[::-1] == matrix and len(target.spec.shape) == 2:
        return True
    raise misfit(adapter, keys, target)


def misfit(adapter: AdapterDir, keys: tuple[str, ...], target: Target) -> AdapterError:
    found = " and ".join(f"{shown(key)} {list(adapter.store.tensors[key].spec.shape)}" for key in keys)
    verb = "does" if len(keys) == 1 else "do"
    return AdapterError(
        f"{adapter.file}: {found} {verb} not fit {shown(target.name)} {list(target.spec.shape)}; is the adapter for another base?"
    )


def number(adapter: AdapterDir, field: str, default: float) -> float:
    """A config field that must be a finite number; null means the default."""
    value = adapter.config.get(field)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value):
        raise AdapterError(f"{adapter.path / CONFIG}: {field} is {shown(value)}, expected a number.")
    return float(value)


def refuse_fields(adapter: AdapterDir, refused: Mapping[str, str]) -> None:
    """Raises AdapterError for a config field that is set and changes what is computed: field → what PEFT does with it."""
    for field, what in refused.items():
        if adapter.config.get(field):
            raise AdapterError(f"{adapter.path / CONFIG}: {field} is set, which is not supported: {what}.")
