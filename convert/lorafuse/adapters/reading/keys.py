"""What the keys of every PEFT type have in common: the prefix, module and leaf, and parameters that are saved
whole."""

import re

from lorafuse.adapters.reading.directory import AdapterDir, is_mlx
from lorafuse.adapters.updates import Update
from lorafuse.codecs.dense import DenseSources
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.tensors import FLOATS

PREFIX = "base_model.model."
# Leaves that any type may have: copies of the base, and modules trained whole.
_SAVED_WHOLE = (
    r"base_layer\.(weight|bias)|modules_to_save(\.[^.]+)?\.(weight|bias)|original_module\.(weight|bias)"
)

# What all modules of an adapter share, PEFT keeps beside the model: base_model.vera_A,
# base_model.tinylora_v.0.
_SHARED = re.compile(r"base_model(\.[^.]+){1,2}")

COUNTER = "I64"  # BatchNorm counts the batches that it saw; no weight has this dtype

Modules = dict[str, dict[str, str]]  # module → {leaf: key}


# Modules that other libraries wrap around a model or its layers when it is trained, and a PEFT prefix too
# many.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# What keeps the model as a part of it: NeMo's biencoder, and TRL's models with a value head.
_HOLDER = r"(?:(?:lm_q|pretrained_model)\.)?"
# OpenRLHF's actor keeps the model as its own `model`.
_BEFORE = rf"(?:{'|'.join(map(re.escape, _WRAPPERS))})*(?:model\.)?{_HOLDER}{re.escape(PREFIX)}"
_OUTER = re.compile(rf"(?:{_BEFORE})*(?:base_model\.(?=lm_q\.))?{_HOLDER}")
_INNER = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, _WRAPPERS[1:]))})")


def plain_name(key: str) -> str:
    """A key without PEFT's prefix, however often and wherever it has it, and without what wrappers put into
    it."""
    match = _OUTER.match(key)
    name = key[match.end() :] if match else key
    if name == key:
        name = re.sub(rf"^(?:{re.escape(_WRAPPERS[0])})+", "", name)
    name = _INNER.sub("", name)
    return name.replace(f".{PREFIX}", ".")  # PEFT around a part of the model


def unwrapped(module: str) -> str:
    """A module's name without those under which PEFT's layers keep the module that they wrap."""
    return module.replace(".base_layer", "").replace(".token_adapter", "")


def unusual_prefixes(adapter: AdapterDir) -> str | None:
    """What to say about keys that PEFT itself would not load, since it expects its prefix and nothing
    else."""
    if is_mlx(adapter.config):
        return None
    for key in adapter.store.tensors:
        name = plain_name(key)
        if key in adapter.beside_tensors:  # PEFT loads none of these
            continue
        if key != PREFIX + name and not _SHARED.fullmatch(key):
            return (
                f"{adapter.file}: {shown(key)} is taken for {shown(PREFIX + name)}; PEFT itself would not "
                "load keys of this form."
            )
    return None


def group(adapter: AdapterDir, leaf_pattern: str) -> Modules:
    """Keys by module and leaf, a leaf being what the regular expression matches at the end of a key, after a
    dot.

    A parameter that is saved whole is the leaf "" of a module of its own name. The adapter's name, which PEFT
    strips on saving and other trainers leave in (`lora_A.default.weight`), is dropped from a leaf when the
    pattern has it as the group `name`. Prefixes of wrappers are dropped (`plain_name`).
    """
    pattern = re.compile(rf"(?:(?P<module>.+)\.)?(?P<leaf>{_SAVED_WHOLE}|{leaf_pattern})")
    modules: Modules = {}
    for key in adapter.store.tensors:
        name = plain_name(key)
        match = pattern.fullmatch(name)
        module, leaf = (match["module"] or "", match["leaf"]) if match else (name, "")
        if leaf.startswith("modules_to_save."):
            leaf = f"modules_to_save.{leaf.rpartition('.')[2]}"
        elif match and match.groupdict().get("name"):
            leaf = leaf.replace(f".{match['name']}", "", 1)
        leaves = modules.setdefault(module, {})
        if leaf in leaves:
            raise AdapterError(
                f"{adapter.file}: {shown(leaves[leaf])} and {shown(key)} are the same tensor; which is meant?"
            )
        leaves[leaf] = key
    if not modules:
        raise AdapterError(f"{adapter.file}: holds no tensor.")
    return modules


def drop_copies(modules: Modules) -> dict[str, str]:
    """Take out keys that only repeat others, with the reason of each: bias="all" beside modules_to_save saves
    a bias up to three times; the trained one is that of modules_to_save."""
    ignored: dict[str, str] = {}
    for module, leaves in list(modules.items()):
        for leaf in list(leaves):
            kind, _, parameter = leaf.partition(".")
            plain = modules.get(f"{module}.{parameter}", {})
            if kind == "original_module":
                ignored[leaves.pop(leaf)] = "a copy of the module that modules_to_save replaces"
            elif kind == "modules_to_save" and "" in plain:
                ignored[plain.pop("")] = "modules_to_save has the same parameter"
    return ignored


def take_one(adapter: AdapterDir, leaves: dict[str, str], name: str) -> str | None:
    """The key of the leaf `name`, perhaps with more after a dot (the adapter's name, "weight"), taken; None
    where there is none. Raises AdapterError where there are several."""
    named = [leaf for leaf in leaves if leaf.partition(".")[0] == name]
    if len(named) > 1:
        both = " and ".join(shown(leaves[leaf]) for leaf in named[:2])
        raise AdapterError(f"{adapter.file}: {both} are the same tensor; which is meant?")
    return leaves.pop(named[0]) if named else None


def replacements(adapter: AdapterDir, module: str, leaves: dict[str, str]) -> list[Update]:
    """Parameters saved whole, which replace those of the checkpoint; takes their leaves."""
    whole: dict[str, str] = {}
    if "" in leaves:
        whole[module] = leaves.pop("")
    for parameter in ("weight", "bias"):
        for kind in ("base_layer", "modules_to_save"):
            key = leaves.pop(f"{kind}.{parameter}", None)
            if key is not None:
                whole[f"{module}.{parameter}"] = key
    for key in whole.values():
        if adapter.store.tensors[key].spec.dtype != COUNTER:
            check_float(adapter, key)
    return [Update(name, (key,), replaced=DenseSources(adapter.store, key)) for name, key in whole.items()]


def refuse_left_over(adapter: AdapterDir, leaves: dict[str, str]) -> None:
    """Raises AdapterError for a leaf that nothing took: every adapter tensor is used or ignored for a
    reason."""
    for key in leaves.values():
        raise AdapterError(f"{adapter.file}: {shown(key)} is of a kind that is not supported.")


def check_float(adapter: AdapterDir, key: str) -> None:
    spec = adapter.store.tensors[key].spec
    if spec.dtype not in FLOATS:
        raise AdapterError(
            f"{adapter.file}: {shown(key)} has the dtype {spec.dtype}; expected one of {listed(FLOATS)}."
        )
