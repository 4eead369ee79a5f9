"""Which weights of a checkpoint are those of linear layers: of class nn.Linear (of no class made from it), or
Conv1D.

What is a linear layer follows from the name in memory, with the exceptions of `linears.json`, which
fixtures/make_linears.py makes from transformers.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lorafuse.codecs import Sources
from lorafuse.naming.names import Names
from lorafuse.naming.table import Renames
from lorafuse.trained_base.skip_lists import is_skipped

# Names of modules with a matrix that are no linear layers, as a rule: embeddings, routers of mixtures.
_OTHER = re.compile(r".*emb.*|wte|wpe|w|.*norm.*|.*router|gate|.*bias|objective")


@cache
def load_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("linears.json").read_text(encoding="utf-8"))
    return table


def is_other(module: str, exceptions: Mapping[str, Iterable[str]]) -> bool:
    """Whether a module with a matrix is no linear layer."""
    for kind, ends in exceptions.items():
        if any(f".{_starred(module)}".endswith(f".{end}") for end in ends):
            return kind == "other"
    return bool(_OTHER.fullmatch(module.rpartition(".")[2]))


def _starred(name: str) -> str:
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


class LinearLayers:
    """The rule for one checkpoint."""

    def __init__(self, weights: Mapping[str, Sources], config: dict[str, Any]) -> None:
        self.names, self.renames = Names(weights, config), Renames(config)
        types, table = sorted(set(_model_types(config))), load_table()
        self.unknown_types = [name for name in types if name not in table["types"]]
        self._exceptions: dict[str, list[str]] = {"linear": [], "other": []}
        for model_type in types:
            for kind, ends in table["exceptions"].get(model_type, {}).items():
                self._exceptions[kind] += ends
        self._keeps = [keep for model_type in types for keep in table["keeps"].get(model_type, ())]
        self._base = f"{self.renames.base_prefix}."
        prefixed = self.names.has_head and self.renames.model_class not in table["bare"]
        self._adds_prefix = prefixed and not any(name.startswith(self._base) for name in weights)

    def is_linear(self, parameter: str) -> bool:
        """Whether a parameter in memory is the weight of a linear layer; not where it is tied to an
        embedding, nor where transformers keeps it in fp32."""
        if not parameter.endswith(".weight"):
            return False  # a bare parameter, such as a stack of experts
        module = self.in_memory(parameter.removesuffix(".weight"))
        tied = self.names.tied and parameter == self.names.head
        return not (tied or is_other(module, self._exceptions) or self.keeps(module))

    def keeps(self, module: str) -> bool:
        """Whether transformers keeps a module in fp32, in models of any dtype."""
        return is_skipped(module, self._keeps)

    def in_memory(self, module: str) -> str:
        """A checkpoint of a base model lacks the prefix that its modules have below a head."""
        head = self.names.head
        outside = head and module == head.removesuffix(".weight")
        inside = module.startswith(self._base)
        return module if not self._adds_prefix or outside or inside else f"{self._base}{module}"


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Those of the model and of its parts."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, dict):
            yield from _model_types(part)
