"""Names of modules as vLLM and compressed-tensors match them, and what the recipes of llm-compressor leave in
full precision.

Both compare an entry of `ignore` with the whole name, or match it as a regular expression from the start if
it begins with "re:". compressed-tensors knows modules by their names in memory, vLLM by those that it makes
of the names on disk.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from lorafuse.codecs.sources import Sources
from lorafuse.files.names import natural_key
from lorafuse.formats.modules import FUSED
from lorafuse.trained_base.linear_layers import LinearLayers

_IN_LAYER = re.compile(r"\.\d+\.")
# Towers of vision and audio, and what connects them; heads.
_OTHER_PARTS = re.compile(r"vision|visual|audio|image|speech|multi_?modal|lm_head")
# Routers; parts of what predicts several tokens at once.
_OTHER_MODULES = frozenset({"gate", "router", "shared_expert_gate", "eh_proj", "head"})
_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")
# All experts of a layer. vLLM looks for the names that they have one by one, also where they are a stack.
_EXPERTS = re.compile(r"[^.]+\.\d+\.(?:.+\.experts|block_sparse_moe(?=\.(?:input|output)_linear))(?=\.)")


def whole_of(module: str) -> str:
    """What vLLM makes of a module, perhaps with others: a matrix of several, or all experts of a layer. All
    of these are quantized, or none."""
    if expert := _EXPERT.fullmatch(module):
        return expert[1]
    parent, dot, last = module.rpartition(".")
    return next((parent + dot + whole for parts, whole in FUSED.items() if last in parts), module)


def siblings(module: str) -> Iterator[str]:
    """The modules that vLLM makes one matrix of, this one among them."""
    parent, dot, last = module.rpartition(".")
    for part in next((parts for parts in FUSED if last in parts), (last,)):
        yield parent + dot + part


def _is_left_out(module: str) -> bool:
    return bool(_OTHER_PARTS.search(module)) or module.rpartition(".")[2] in _OTHER_MODULES


class VllmNames:
    """The modules of one checkpoint."""

    def __init__(self, weights: Mapping[str, Sources], config: dict[str, object]) -> None:
        self._layers = LinearLayers(weights, config)

    def is_quantized(self, weight: str) -> bool:
        """Whether a matrix belongs to a linear layer, or to an expert, that recipes quantize."""
        parameter, component = self._layers.renames.memory_names(weight)[0]
        module = weight.removesuffix(".weight")
        if not weight.endswith(".weight") or not _IN_LAYER.search(weight) or _is_left_out(module):
            return False
        if component is None:
            return self._layers.is_linear(parameter)
        # What is split or joined on loading is another matrix in memory; experts are only stacked.
        return component.ops[0] == "stack0" and not self._layers.keeps(module)

    def ignored(self, dense: Iterable[str]) -> list[str]:
        """The entries of `ignore` for weights that are dense, and for the head, which may be tied and not
        stored."""
        entries: set[str] = set()
        for weight in (*dense, self._layers.names.head or "lm_head.weight"):
            if experts := _EXPERTS.search(weight):
                entries.add(rf"re:.*{re.escape(experts[0])}\..*")
            else:
                entries.update(self._modules(weight))
        return sorted(entries, key=natural_key)

    def _modules(self, weight: str) -> Iterator[str]:
        yield weight.removesuffix(".weight")
        for parameter, _ in self._layers.renames.memory_names(weight):
            yield self._layers.in_memory(parameter.removesuffix(".weight"))
