"""What config.json says of a checkpoint that is quantized in part: its quantization, and which modules are
dense although others like them are not.

transformers 5 reads an entry of such a list as a regular expression from the start of a module's name in
memory, or as the end of the name; transformers 4 as the name, or a part of it that ends before a dot; vLLM as
the name, or the start of it that ends before a dot. So whole names are right for all of them; a name that is
the end of another one is written as an expression, which catches it alone in transformers 5. Where a name in
memory differs from that on disk, both are listed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorafuse.codecs.sources import Sources
from lorafuse.errors import UsageError, shown
from lorafuse.files.names import natural_key
from lorafuse.naming.names import Names
from lorafuse.naming.table import Renames

_ANNOUNCING = ("quantization_config", "compression_config", "_load_in_4bit", "_load_in_8bit")
# quant_method → the field of quantization_config that lists modules which are dense.
LISTS = {"bitsandbytes": "llm_int8_skip_modules"}
FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


def announces(name: str, value: object) -> bool:
    """Whether a field of a config says how weights are quantized; `quantization` is MLX's."""
    return name in _ANNOUNCING or (name == "quantization" and isinstance(value, dict))


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that say how weights are quantized, also those in its sections."""
    found = {name: value for name, value in config.items() if announces(name, value)}
    sections = {
        name: inner
        for name, value in config.items()
        if isinstance(value, dict) and name not in found and (inner := quantization_of(value))
    }
    return found | sections


def with_dense_modules(
    config: Mapping[str, Any],
    dense: Iterable[str],
    quantized: Iterable[str],
    weights: Mapping[str, Sources],
) -> dict[str, Any]:
    """The same of an output whose weights `dense` are quantized no longer, and whose weights `quantized` are;
    `weights`: all that the base has. Raises UsageError for a quantization whose configs have no such list."""
    fields, no_longer = quantization_of(config), list(dense)
    if no_longer:
        names = _Modules(config, weights)
        entries = _catching_nothing_else(names.fused(names.of(no_longer)), names.of(quantized))
        _extend(fields, entries, names)
    return fields


def dense_modules(
    config: Mapping[str, Any],
    dense: Iterable[str],
    quantized: Iterable[str],
    weights: Mapping[str, Sources],
) -> list[str]:
    """The list of an output whose weights are all quantized here or dense: the modules of the weights
    `dense`, and the output embedding, which readers leave dense only where there is no list."""
    names = _Modules(config, weights)
    modules = names.of([*dense, names.head])
    return _catching_nothing_else(names.fused(modules), names.of(quantized))


def _extend(fields: dict[str, Any], entries: list[str], names: "_Modules") -> None:
    """Replaces each quantization_config, wherever it stands, by a copy with the entries."""
    for name, value in fields.items():
        if name == "quantization_config" and isinstance(value, dict):
            fields[name] = _with_entries(value, entries, names)
        elif not announces(name, value):
            _extend(value, entries, names)


def _with_entries(quantization: dict[str, Any], entries: list[str], names: "_Modules") -> dict[str, Any]:
    method = quantization.get("quant_method", "bitsandbytes")  # the oldest configs name none
    if method not in LISTS:
        raise UsageError(
            f"A checkpoint in {shown(method)} that is dense in part cannot be described in config.json by "
            "this version: leave --format out, or --format base without --keep-dense."
        )
    listed = quantization.get(LISTS[method])
    before = names.of(names.dense_matrices()) if listed is None else listed
    return quantization | {LISTS[method]: list(dict.fromkeys([*before, *entries]))}


class _Modules:
    """The modules of a checkpoint by the names that lists use."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Sources]) -> None:
        self._weights, self._renames = weights, Renames(dict(config))
        self.head = Names(weights, dict(config)).head or "lm_head.weight"

    def of(self, weights: Iterable[str]) -> list[str]:
        """Their modules, by their names on disk and in memory, sorted."""
        names: set[str] = set()
        for weight in weights:
            in_memory = (name for name, _ in self._renames.memory_names(weight))
            names.update(name.removesuffix(".weight") for name in (weight, *in_memory))
        return sorted(names, key=natural_key)

    def dense_matrices(self) -> list[str]:
        """Without a list, a reader leaves the output embedding dense, and what is tied; both are dense here,
        if they are stored."""
        dense = [
            name
            for name, sources in self._weights.items()
            if sources.as_stored and len(sources.spec.shape) == 2 and name.endswith(".weight")
        ]
        return [*dense, self.head]

    def fused(self, modules: list[str]) -> list[str]:
        """The same, with the name of each module that vLLM makes of several, where all of them are there."""
        there, fused = set(modules), []
        for parts, whole in FUSED.items():
            parents = {name.removesuffix(parts[0]) for name in modules if name.endswith(f".{parts[0]}")}
            fused += [parent + whole for parent in parents if all(parent + part in there for part in parts)]
        return [*modules, *sorted(fused, key=natural_key)]


def _catching_nothing_else(entries: list[str], quantized: list[str]) -> list[str]:
    """Entries that are the end of a quantized module's name become expressions for a name of their own."""
    lengths = {len(entry) for entry in entries}
    ends = {module[-n:] for module in quantized for n in lengths if n < len(module)}
    return [f"{re.escape(entry)}$" if entry in ends else entry for entry in entries]
