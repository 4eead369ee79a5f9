"""Which weights of a checkpoint transformers 5 quantizes when it loads a model with a BitsAndBytesConfig.

Those of nn.Linear (of no class made from it) and Conv1D, unless the module is skipped: by default the output
embedding, tied ones and the last one of the model (transformers 5.23 quantizers/base.py,
get_keys_to_not_convert), or what llm_int8_skip_modules lists instead. Names are those in memory. What is a
linear layer follows from the name, with the exceptions of `linears.json`, which fixtures/make_linears.py
makes from transformers.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lorafuse.codecs import Sources
from lorafuse.errors import CheckpointError, UsageError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.patterns import Pattern
from lorafuse.files.tensors import FLOATS
from lorafuse.naming.names import Names
from lorafuse.naming.table import Component, Renames, v4_name
from lorafuse.settings import BaseQuant

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


def is_skipped(module: str, skip: Iterable[str]) -> bool:
    """transformers 5.23 quantizers/quantizers_utils.py, should_convert_module: an entry is a regular
    expression from the start of the name to a boundary between words, or the end of the name."""
    return any(_skip_pattern(entry).matches(module) or module.endswith(entry) for entry in skip)


@cache
def _skip_pattern(entry: str) -> Pattern:
    try:
        return Pattern(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    except re.error as e:
        raise UsageError(f"quant_skip {shown(entry)!r} cannot be matched: {e}.") from None


def quantized_on_load(
    weights: Mapping[str, Sources], ckpt: Checkpoint, quant: BaseQuant, warn: Callable[[str], None]
) -> list[str]:
    """The names of those weights. Raises CheckpointError where one is stored otherwise than it was
    quantized."""
    chooser = _Chooser(weights, ckpt, quant)
    chosen = [name for name in weights if chooser.quantizes(name)]
    if quant.experts and not chooser.n_experts:
        warn(
            f"{shown(ckpt.folder)}: holds no matrix of a single expert, which --quant-experts would quantize."
        )
    elif quant.experts:
        warn(
            f"{shown(ckpt.folder)}: its routers are left in full precision, although transformers 4, which "
            "quantized experts, quantized those that were linear layers too."
        )
    unknown = sorted(chooser.model_types.difference(load_table()["types"]))
    if unknown:
        warn(
            f"{shown(ckpt.folder)}: of {listed(unknown)} it is not known which layers are quantized on "
            f"loading; {len(chosen)} of {len(weights)} weights are, by their names."
        )
    return chosen


class _Chooser:
    """The rule for one checkpoint."""

    def __init__(self, weights: Mapping[str, Sources], ckpt: Checkpoint, quant: BaseQuant) -> None:
        self._weights, self._ckpt, self._quant = weights, ckpt, quant
        self._names, self._renames = Names(weights, ckpt.config), Renames(ckpt.config)
        self.model_types = set(_model_types(ckpt.config))
        self.n_experts = 0
        table = load_table()
        self._exceptions: dict[str, list[str]] = {"linear": [], "other": []}
        for model_type in sorted(self.model_types):
            for kind, ends in table["exceptions"].get(model_type, {}).items():
                self._exceptions[kind] += ends
        self._skip = [
            keep for model_type in sorted(self.model_types) for keep in table["keeps"].get(model_type, ())
        ]
        self._skip += quant.skip if quant.skip is not None else self._default_skips()
        base = f"{self._renames.base_prefix}."
        prefixed = self._names.has_head and self._renames.model_class not in table["bare"]
        self._adds_prefix = prefixed and not any(name.startswith(base) for name in weights)

    def _default_skips(self) -> list[str]:
        starred = load_table()["skips"].get(self._renames.model_class, ())
        return ["lm_head", *(self._pattern(name) for name in starred)]

    def _pattern(self, starred: str) -> str:
        """A regular expression for a name in which "*" stands for any number and "#" for the largest there
        is."""
        pattern = re.escape(starred).replace(r"\*", r"\d+").replace(r"\#", r"(\d+)") + "$"
        if "#" not in starred:
            return pattern
        numbers = (re.match(pattern, weight.removesuffix(".weight")) for weight in self._weights)
        return pattern.replace(
            r"(\d+)", str(max((int(number[1]) for number in numbers if number), default=0))
        )

    def quantizes(self, weight: str) -> bool:
        spec = self._weights[weight].spec
        if not weight.endswith(".weight") or len(spec.shape) != 2 or spec.dtype not in FLOATS:
            return False
        targets = self._renames.memory_names(weight)
        component = targets[0][1]
        if component and component.ops[0] == "stack0":
            return self._quantizes_expert(weight)
        quantized = [self._quantizes_module(name) for name, _ in targets]
        if component and any(quantized):
            self._refuse(weight, [name for name, _ in targets], component)
        return quantized[0]

    def _quantizes_module(self, parameter: str) -> bool:
        if not parameter.endswith(".weight"):
            return False  # a bare parameter, such as a stack of experts
        module = self._in_memory(parameter.removesuffix(".weight"))
        tied = self._names.tied and parameter == self._names.tied.head
        return not tied and not is_other(module, self._exceptions) and not is_skipped(module, self._skip)

    def _quantizes_expert(self, weight: str) -> bool:
        """transformers 4 had a linear layer for each matrix of an expert, 5 has one parameter for all."""
        self.n_experts += 1
        return self._quant.experts and not is_skipped(
            v4_name(self._renames.model_class, weight.removesuffix(".weight")), self._skip
        )

    def _in_memory(self, module: str) -> str:
        """A checkpoint of a base model lacks the prefix that its modules have below a head."""
        outside = self._names.head and module == self._names.head.removesuffix(".weight")
        return f"{self._renames.base_prefix}.{module}" if self._adds_prefix and not outside else module

    def _refuse(self, weight: str, targets: list[str], component: Component) -> None:
        raise CheckpointError(
            f"{shown(self._ckpt.folder)}: {shown(weight)} is stored in another form than in memory, where "
            f"{listed(targets)} is quantized ({' and '.join(component.ops)}); --base-quant does not support "
            "that. Save the model with transformers, quantized, and merge into that."
        )


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Those of the model and of its parts."""
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in config.values():
        if isinstance(part, dict):
            yield from _model_types(part)
