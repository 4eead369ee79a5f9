"""What the loop makes in one weight: a weight for one output or for many, and how the memory limit is spent
on that.

Outputs of one base differ in what their adapters change. A weight is one weight in all outputs that take it
from the same sources and cut it into the same tiles, so that a tile is read and decoded once. One output
alone has a weight for each of its steps.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lorafuse.adapters import Patch
from lorafuse.arithmetic.measure import Measures
from lorafuse.codecs import Sources
from lorafuse.files.names import natural_key
from lorafuse.planning.plan import Step


@dataclass
class Variant:
    """One content of a weight's tiles, and the outputs, by number, that get it."""

    step: Step
    outputs: list[int]
    measures: Measures = field(default_factory=Measures)  # of the tiles that are finished


@dataclass
class SharedWeight:
    """A weight, made for one or more outputs."""

    sources: Sources
    variants: list[Variant] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.variants[0].step.name

    @property
    def _cutter(self) -> Step:
        """Only patches see how a weight is cut into tiles."""
        return next(
            (variant.step for variant in self.variants if variant.step.patches), self.variants[0].step
        )

    @property
    def verbatim(self) -> bool:
        return all(variant.step.verbatim for variant in self.variants)

    @property
    def patches(self) -> Iterator[Patch]:
        return (patch for variant in self.variants for patch in variant.step.patches)

    def add(self, output: int, step: Step) -> None:
        """One more output. Those that take the weight without an update, in one dtype, share a variant."""
        if not step.patches:
            for variant in self.variants:
                if not variant.step.patches and variant.step.spec == step.spec:
                    variant.outputs.append(output)
                    return
        self.variants.append(Variant(step, [output]))

    def only(self, outputs: Collection[int]) -> "SharedWeight":
        """The same for some of the outputs; without a variant when it was for none of them."""
        kept = [
            Variant(variant.step, [number for number in variant.outputs if number in outputs])
            for variant in self.variants
        ]
        return SharedWeight(self.sources, [variant for variant in kept if variant.outputs])

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(start, stop) in elements, in order."""
        return self._cutter.tiles()

    @property
    def resident_nbytes(self) -> int:
        """Held from the first tile to the last."""
        return self.sources.held_nbytes + sum(variant.step.resident_nbytes for variant in self.variants)

    @property
    def worker_nbytes(self) -> int:
        """Held by each worker while it makes a tile."""
        return max(variant.step.worker_nbytes for variant in self.variants)

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a finished tile in the largest of its dtypes."""
        numel = min(self._cutter.tile_numel, self._cutter.spec.numel)
        return max(numel * variant.step.itemsize for variant in self.variants)


def shared_weights(outputs: Sequence[Iterable[Step]]) -> list[SharedWeight]:
    """Every step of every output in one weight, the weights in their natural order."""
    members: dict[str, list[tuple[int, Step]]] = {}
    for number, steps in enumerate(outputs):
        for step in steps:
            members.setdefault(step.name, []).append((number, step))
    return [
        weight for name in sorted(members, key=natural_key) for weight in _shared_weights_of(members[name])
    ]


def _shared_weights_of(members: list[tuple[int, Step]]) -> list[SharedWeight]:
    """The turns of one weight: steps with patches first, which decide how it is cut."""
    found: dict[tuple[int, object], SharedWeight] = {}
    for number, step in members:
        if step.patches:
            found.setdefault((id(step.sources), step.cut), SharedWeight(step.sources)).add(number, step)
    for number, step in members:
        if not step.patches:
            same = (weight for (sources, _), weight in found.items() if sources == id(step.sources))
            weight = next(same, None) or found.setdefault(
                (id(step.sources), None), SharedWeight(step.sources)
            )
            weight.add(number, step)
    return list(found.values())
