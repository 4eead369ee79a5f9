"""What types with tensors that all modules share need beside `modules.py`: their walk, and checks of leaves, shapes and fields."""

import math
from collections.abc import Callable
from typing import Any

from lorafuse.adapters.keys import Modules, check_float, drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.patch import Target, Update
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, listed, shown

Warn = Callable[[str], None]
Leaves = dict[str, str]
Found = tuple[list[Update], dict[str, str]]
# Some trainers leave the adapter's name, which PEFT strips, at the end of a key.
NAMED = r"(\.(?P<name>[^.]+))?"
# PEFT's key of what all modules share, `base_model.vera_A`, is without the prefix of a module.
SHARED = "base_model"


def read_modules(adapter: AdapterDir, leaf_pattern: str) -> tuple[Modules, dict[str, str]]:
    """Keys by module and leaf, and the ignored ones with reasons. Unknown leaves of this type are found to be refused as such."""
    prefix = str(adapter.config["peft_type"]).lower()
    modules = group(adapter, rf"{leaf_pattern}|{prefix}_\w+(\..+)?")
    return modules, drop_copies(modules)


def each_module(adapter: AdapterDir, modules: Modules, of_module: Callable[[str, Leaves], list[Update]]) -> list[Update]:
    """The replaced parameters and what `of_module` makes of the leaves, which it takes. Raises AdapterError for what is left."""
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        result += of_module(module, leaves)
        refuse_left_over(adapter, leaves)
    return result


def take(adapter: AdapterDir, module: str, leaves: Leaves, names: tuple[str, ...]) -> dict[str, str] | None:
    """{name: key} of leaves that come together, taken; None where a module has none of them."""
    present = [name for name in names if name in leaves]
    if not present:
        return None
    for name in names:
        if name not in leaves:
            raise AdapterError(f"{adapter.file}: {shown(module)} has {present[0]} but no {name}.")
    taken = {name: leaves.pop(name) for name in names}
    for key in taken.values():
        check_float(adapter, key)
    return taken


def shape_of(adapter: AdapterDir, key: str) -> tuple[int, ...]:
    return adapter.store.tensors[key].spec.shape


def expect(adapter: AdapterDir, key: str, fits: bool, expected: str) -> None:
    """Raises AdapterError saying what shape was expected; an empty tensor never fits."""
    spec = adapter.store.tensors[key].spec
    if not fits or spec.numel == 0:
        raise AdapterError(f"{adapter.file}: {shown(key)} is {spec}, expected {expected}.")


def misfit(adapter: AdapterDir, key: str, target: Target) -> AdapterError:
    return AdapterError(
        f"{adapter.file}: {shown(key)} {list(shape_of(adapter, key))} does not fit {shown(target.name)} "
        f"{list(target.spec.shape)}; is the adapter for another base?"
    )


def is_transposed(adapter: AdapterDir, key: str, target: Target, n_out: int, n_in: int | None = None) -> bool:
    """Whether the weight is stored (in, out), as HF's Conv1D does it: by the shapes, and by the architecture where it is square.

    Raises AdapterError, naming `key`, where neither orientation fits a matrix.
    """
    shape = target.spec.shape
    if len(shape) != 2:
        raise misfit(adapter, key, target)
    plain, turned = (n_out == a and n_in in (None, b) for a, b in (shape, shape[::-1]))
    if not (plain or turned):
        raise misfit(adapter, key, target)
    return turned and (target.is_conv1d or not plain)


def number(adapter: AdapterDir, field: str, default: float) -> float:
    """A number of the config. Raises AdapterError for anything else."""
    value = adapter.config.get(field, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise AdapterError(f"{adapter.path / CONFIG}: {field} is {shown(value)}, expected a number.")
    return float(value)


def whole_number(adapter: AdapterDir, field: str, default: int, *, minimum: int = 1) -> int:
    value = adapter.config.get(field, default)
    if type(value) is not int or value < minimum:
        raise AdapterError(f"{adapter.path / CONFIG}: {field} is {shown(value)}, expected an integer of at least {minimum}.")
    return value


def one_of(adapter: AdapterDir, field: str, default: str, known: tuple[str, ...]) -> str:
    value: Any = adapter.config.get(field, default)
    if value not in known:
        raise AdapterError(
            f"{adapter.path / CONFIG}: {field} is {shown(value)}, which is not supported; known are {listed(known)}."
        )
    return str(value)
