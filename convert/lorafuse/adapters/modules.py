"""What the PEFT types beside LoRA share: the walk over an adapter's modules, numbers of its config, refusals, scratch memory."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lorafuse.adapters.keys import drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import TILE_NUMEL, Target, Update
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, shown

Warn = Callable[[str], None]
# (module, its {leaf: key}) → updates; takes the leaves that it uses.
OfModule = Callable[[str, dict[str, str]], list[Update]]


def collect(adapter: AdapterDir, leaf_pattern: str, of_module: OfModule, warn: Warn) -> tuple[list[Update], dict[str, str]]:
    """The updates of all modules, parameters saved whole included, and the ignored tensors with the reason of each."""
    modules = group(adapter, leaf_pattern)
    ignored = drop_copies(modules)
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        result += of_module(module, leaves)
        refuse_left_over(adapter, leaves)
    bias = adapter.config.get("bias")
    if isinstance(bias, str) and bias.endswith("_only") and not any(".bias" in key for key in adapter.store.tensors):
        warn(f"{adapter.file}: bias is {shown(bias)!r}, but no trained bias is in the file; peft before 0.21 did not save them.")
    return result, ignored


def once(warn: Warn) -> Warn:
    """A mismatch in the config concerns hundreds of modules alike."""
    said: set[str] = set()

    def warn_once(message: str) -> None:
        if message not in said:
            said.add(message)
            warn(message)

    return warn_once


def take_all(adapter: AdapterDir, module: str, leaves: dict[str, str], names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The keys of leaves that belong together, None when the module has none of them. Raises AdapterError when one is missing."""
    present = [name for name in names if name in leaves]
    missing = [name for name in names if name not in leaves]
    if not present:
        return None
    if missing:
        raise AdapterError(f"{adapter.file}: {shown(module)} has {present[0]} but no {missing[0]}.")
    return tuple(leaves.pop(name) for name in names)


def number(adapter: AdapterDir, what: str, value: Any, *, least: float = -math.inf, integer: bool = False) -> float:
    """A number of the config, checked. Raises AdapterError naming `what`."""
    kinds = (int,) if integer else (int, float)
    if type(value) not in kinds or not math.isfinite(value) or value < least:
        expected = ("an integer" if integer else "a number") + (f" of at least {least:g}" if least > -math.inf else "")
        raise AdapterError(f"{adapter.path / CONFIG}: {what} is {shown(value)}, expected {expected}.")
    return float(value)


def pattern(adapter: AdapterDir, field: str) -> Mapping[str, Any]:
    """A rank_pattern or alpha_pattern; null means none."""
    value = adapter.config.get(field) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{adapter.path / CONFIG}: {field} is {shown(value)}, expected an object.")
    return value


def shapes(adapter: AdapterDir, *keys: str) -> list[tuple[int, ...]]:
    return [adapter.store.tensors[key].spec.shape for key in keys]


def misfit(adapter: AdapterDir, keys: tuple[str, ...], target: Target, hint: str = "") -> AdapterError:
    """The refusal of tensors whose shapes are not those of the weight."""
    named = " and ".join(f"{shown(key)} {list(adapter.store.tensors[key].spec.shape)}" for key in keys)
    verb = "does" if len(keys) == 1 else "do"
    return AdapterError(
        f"{adapter.file}: {named} {verb} not fit {shown(target.name)} {list(target.spec.shape)}; is the adapter for another "
        f"base?{hint}"
    )


def not_one_update(adapter: AdapterDir, keys: tuple[str, ...]) -> AdapterError:
    """The refusal of tensors whose shapes do not fit each other, or the type."""
    named = " and ".join(f"{shown(key)} is {adapter.store.tensors[key].spec}" for key in keys)
    kind = shown(adapter.config.get("peft_type"))
    wrong = "they do not make one update" if len(keys) > 1 else f"{kind} has no such shape"
    return AdapterError(f"{adapter.file}: {named}; {wrong}.")


def refuse_conv1d(adapter: AdapterDir, key: str, target: Target) -> None:
    """PEFT has no such layer of this type, so which way round the tensors are meant is unknown."""
    if target.is_conv1d:
        kind = shown(adapter.config.get("peft_type"))
        raise AdapterError(f"{adapter.file}: {shown(key)} updates {shown(target.name)}, an HF Conv1D, which {kind} does not adapt.")


def n_cols_of(target: Target) -> int:
    """Columns of the weight as a matrix of its first dimension; 0 for a vector, which no matrix update fits."""
    return target.spec.n_cols if len(target.spec.shape) > 1 else 0


def tile_nbytes(target: Target, row_multiple: int = 1) -> int:
    """Bytes of a tile of that weight in fp32, what a patch's temporary of a tile's size takes."""
    return 4 * min(max(TILE_NUMEL, row_multiple * target.spec.n_cols), target.spec.numel)
