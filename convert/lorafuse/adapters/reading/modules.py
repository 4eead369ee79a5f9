"""The walk over the modules of an adapter, which all types but LoRA share: the leaves of each module, the
parameters that the adapter replaces, and the refusal of tensors that no update takes."""

from collections.abc import Callable, Sequence

from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import Modules, drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.updates import Choice, Update
from lorafuse.errors import AdapterError, shown

Warn = Callable[[str], None]
Leaves = dict[str, str]  # leaf → key
# What an adapter says, and the tensors that it ignores, with the reason of each.
Updates = tuple[Sequence[Update | Choice], dict[str, str]]
# (module, its leaves) → updates; takes the leaves that it uses.
OfModule = Callable[[str, Leaves], list[Update]]

# Some trainers leave the adapter's name, which PEFT strips, at the end of a key.
NAMED = r"(\.(?P<name>[^.]+))?"
# PEFT's key of what all modules share, `base_model.vera_A`, is without the prefix of a module.
SHARED = "base_model"


def collect(adapter: AdapterDir, leaf_pattern: str, of_module: OfModule, warn: Warn) -> Updates:
    """What a type says whose modules have nothing in common: `of_module` of each."""
    modules, ignored = read_modules(adapter, leaf_pattern)
    return each_module(adapter, modules, of_module, warn), ignored


def read_modules(adapter: AdapterDir, leaf_pattern: str) -> tuple[Modules, dict[str, str]]:
    """Leaves by module, and the ignored tensors. Leaves of this type that the pattern does not know are
    found, to be refused."""
    prefix = str(adapter.config["peft_type"]).lower()
    modules = group(adapter, rf"{leaf_pattern}|{prefix}_\w+(\..+)?")
    return modules, drop_copies(modules)


def each_module(adapter: AdapterDir, modules: Modules, of_module: OfModule, warn: Warn) -> list[Update]:
    """The replaced parameters and what `of_module` makes of the leaves. Raises AdapterError for a leaf that
    is left."""
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        result += of_module(module, leaves)
        refuse_left_over(adapter, leaves)
    bias = adapter.config.get("bias")
    if (
        isinstance(bias, str)
        and bias.endswith("_only")
        and not any(".bias" in key for key in adapter.store.tensors)
    ):
        warn(
            f"{adapter.file}: bias is {shown(bias)!r}, but no trained bias is in the file; peft before 0.21 "
            "did not save them."
        )
    return result


def take(adapter: AdapterDir, module: str, leaves: Leaves, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The keys of leaves that come together, taken; None when the module has none of them. Raises
    AdapterError when one is missing."""
    present = [name for name in names if name in leaves]
    if not present:
        return None
    missing = [name for name in names if name not in leaves]
    if missing:
        raise AdapterError(f"{adapter.file}: {shown(module)} has {present[0]} but no {missing[0]}.")
    return tuple(leaves.pop(name) for name in names)


def take_shared(modules: Modules, *names: str) -> Leaves:
    """What all modules share under these names, perhaps followed by a dot and more; taken."""
    leaves = modules.get(SHARED, {})
    return {leaf: leaves.pop(leaf) for leaf in [*leaves] if leaf.partition(".")[0] in names}


def once(warn: Warn) -> Warn:
    """Says each thing once: a mismatch in the config concerns hundreds of modules alike."""
    said: set[str] = set()

    def warn_once(message: str) -> None:
        if message not in said:
            said.add(message)
            warn(message)

    return warn_once
