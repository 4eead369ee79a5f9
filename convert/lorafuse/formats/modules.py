"""The modules of an output by the names that configs use: those that are dense, and those that are
quantized."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorafuse.codecs.sources import Sources
from lorafuse.files.names import natural_key
from lorafuse.naming.names import Names
from lorafuse.naming.table import Renames

EXPERTS = re.compile(r"(.*\.experts)\..+")
# What vLLM makes one matrix of.
FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


class Modules:
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


def catching_nothing_else(entries: list[str], quantized: list[str]) -> list[str]:
    """Entries that are the end of a quantized module's name become expressions for a name of their own."""
    lengths = {len(entry) for entry in entries}
    ends = {module[-n:] for module in quantized for n in lengths if n < len(module)}
    return [f"{re.escape(entry)}$" if entry in ends else entry for entry in entries]


class Parts(NamedTuple):
    """Modules of an output: those that are quantized no longer, and those that are. `on_disk`: the former by
    their names on disk alone."""

    names: Modules
    dense: list[str]
    quantized: list[str]
    on_disk: list[str]
