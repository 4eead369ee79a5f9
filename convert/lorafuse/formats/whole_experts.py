"""The experts of a layer, where config.json has words for all of them alone: if some become dense, the others
do too."""

from collections.abc import Iterable, Mapping
from typing import Any

from lorafuse.codecs.sources import Sources
from lorafuse.errors import listed, sized
from lorafuse.files.names import natural_key
from lorafuse.formats.modules import EXPERTS, Modules


class WholeExperts:
    """Which weights of an output become dense with others."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Sources]) -> None:
        self._names, self._layers = Modules(config, weights), set[str]()
        self._weights: dict[str, Sources] = {}

    def take_beside(self, dense: Iterable[str], quantized: Mapping[str, Sources]) -> None:
        """Finds the weights of `quantized` that are experts of a layer of which others are in `dense`."""
        self._layers = {layer for weight in dense for layer in self._of(weight)}
        if self._layers:
            self._weights = {
                name: sources for name, sources in quantized.items() if self._layers & self._of(name)
            }

    def _of(self, weight: str) -> set[str]:
        """The experts that a weight belongs to, by their names on disk and in memory."""
        return {match[1] for module in self._names.of([weight]) if (match := EXPERTS.fullmatch(module))}

    def __contains__(self, weight: object) -> bool:
        return weight in self._weights

    def warnings(self, word: str) -> list[str]:
        """`word`: of --format."""
        if not self._weights:
            return []
        more = sum(_growth(sources) for sources in self._weights.values())
        layers = sorted({layer for name in self._weights for layer in self._of(name)}, key=natural_key)
        return [
            f"--format {word}: config.json has all experts of a layer in one form, so that those of "
            f"{listed(layers)} become dense with the ones that do, which takes {sized(more)} more. --format "
            "base without --keep-dense keeps them all quantized."
        ]


def _growth(sources: Sources) -> int:
    """Bytes that a weight has more as a dense one."""
    tensors = sources.store.tensors
    return sources.spec.nbytes - sum(tensors[name].spec.nbytes for name in sources.names)
