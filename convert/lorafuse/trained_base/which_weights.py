"""Which weights of a checkpoint transformers 5 quantizes when it loads a model with a BitsAndBytesConfig.

Those of nn.Linear (of no class made from it) and Conv1D, unless the module is skipped: by default the output
embedding, tied ones and the last one of the model (transformers 5.23 quantizers/base.py,
get_keys_to_not_convert), or what llm_int8_skip_modules lists instead. Names are those in memory.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from lorafuse.codecs import Sources
from lorafuse.errors import CheckpointError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import FLOATS
from lorafuse.naming.table import Component, v4_name
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.linear_layers import LinearLayers, load_table
from lorafuse.trained_base.skip_lists import SkipList


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
    unmatched = chooser.entries_without_match()
    if unmatched:
        version = quant.skip_version or "5"
        warn(
            f"{shown(ckpt.folder)}: {listed(unmatched)}: of the names of modules that training did not "
            f"quantize, these match no module, by the rule of transformers {shown(version)}."
        )
    unknown = chooser.unknown_types
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
        self._layers = LinearLayers(weights, ckpt.config)
        self._names, self._renames = self._layers.names, self._layers.renames
        self.unknown_types = self._layers.unknown_types
        self.n_experts = 0
        entries = quant.skip if quant.skip is not None else self._default_skips()
        self._list = SkipList(entries, quant.skip_version, self._renames.model_class)

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
        """Raises CheckpointError for a weight that is stored otherwise than it was quantized."""
        spec = self._weights[weight].spec
        if self._quant.stacked_experts and spec.dtype in FLOATS:
            self._refuse_stacked(weight)
        if not weight.endswith(".weight") or len(spec.shape) != 2 or spec.dtype not in FLOATS:
            return False
        targets = self._renames.memory_names(weight)
        component = targets[0][1]
        if component and component.ops[0] == "stack0":
            return self._quantizes_expert(weight)
        quantized = [self._quantizes_module(weight, name) for name, _ in targets]
        if component and any(quantized):
            self._refuse(weight, [name for name, _ in targets], component)
        return quantized[0]

    def _quantizes_module(self, weight: str, parameter: str) -> bool:
        if not self._layers.is_linear(parameter):
            return False
        module = self._layers.in_memory(parameter.removesuffix(".weight"))
        return not self._list.skips(self._listed_name(weight.removesuffix(".weight"), module))

    def _listed_name(self, stored: str, module: str) -> str:
        """The name of a module on the list: `stored` is its name on disk, `module` that in memory."""
        return self._list.name_of(self._layers.in_memory(self._v4(stored)), module)

    def entries_without_match(self) -> list[str]:
        """The entries of a list that was given which match no module. An output embedding that is not stored,
        since it is tied, counts."""
        if self._quant.skip is None:
            return []
        return self._list.without_match(self._all_names())

    def _all_names(self) -> Iterator[str]:
        for weight in (*self._weights, self._names.head or "lm_head.weight", "lm_head.weight"):
            stored = weight.rpartition(".")[0]
            for parameter, _ in self._renames.memory_names(weight):
                yield self._listed_name(stored, self._layers.in_memory(parameter.rpartition(".")[0]))
            yield self._v4(stored)  # of an expert, which 5 has no module for

    def _quantizes_expert(self, weight: str) -> bool:
        """transformers 4 had a linear layer for each matrix of an expert, 5 has one parameter for all."""
        self.n_experts += 1
        name = self._v4(weight.removesuffix(".weight"))
        on_list = self._list.skips(self._listed_name(weight.removesuffix(".weight"), name))
        return self._quant.experts and not self._layers.keeps(name) and not on_list

    def _v4(self, module: str) -> str:
        return v4_name(self._renames.model_class, module)

    def _refuse_stacked(self, weight: str) -> None:
        """Of what transformers 5 holds as one parameter with a dimension of experts."""
        component = self._renames.memory_names(weight)[0][1]
        alone = component is not None and component.ops[0] == "stack0"
        if not alone and len(self._weights[weight].spec.shape) < 3:
            return
        one_by_one = (
            f" --base-quant {self._quant.kind} --quant-experts quantizes each expert by itself: only the "
            "second quantization, that of the scales, then differs."
        )
        raise CheckpointError(
            f"{shown(self._ckpt.folder)}: {shown(weight)} is of an expert. axolotl's quantize_moe_experts "
            "quantized the experts of a layer together, which --base-quant-from does not simulate."
            + (one_by_one if alone and self._quant.kind != "int8" else "")
        )

    def _refuse(self, weight: str, targets: list[str], component: Component) -> None:
        raise CheckpointError(
            f"{shown(self._ckpt.folder)}: {shown(weight)} is stored in another form than in memory, where "
            f"{listed(targets)} is quantized ({' and '.join(component.ops)}); --base-quant does not support "
            "that. Save the model with transformers, quantized, and merge into that."
        )
