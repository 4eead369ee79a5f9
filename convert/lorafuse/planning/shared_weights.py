"""Which weights of several outputs are made together.

Outputs of one base differ in what their adapters change. A shared weight is one weight in all outputs that
take it from the same sources and cut it into the same tiles, so that a tile is read and decoded once. One
output alone has a shared weight for each of its steps.
"""

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, repeat

from lorafuse.adapters import Patch
from lorafuse.arithmetic.measure import Measures
from lorafuse.codecs import Sources
from lorafuse.files.names import natural_key
from lorafuse.files.tensors import Box
from lorafuse.planning.plan import Step


@dataclass(slots=True)
class Variant:
    """One content of a weight's tiles, and the outputs, by number, that get it."""

    step: Step
    outputs: list[int]
    measures: Measures = field(default_factory=Measures)  # of the tiles that are finished


@dataclass(slots=True)
class SharedWeight:
    """A weight, made for one or more outputs."""

    sources: Sources
    variants: list[Variant] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.variants[0].step.name

    @property
    def _cutter(self) -> Step:
        """The step that decides the tiles of all."""
        steps = [variant.step for variant in self.variants]
        return next((step for step in steps if step.cut is not None), steps[0])

    @property
    def needs_values(self) -> bool:
        """Whether tiles are decoded; else stored bytes are copied."""
        return self.variants[0].step.encoder.needs_values

    @property
    def size(self) -> int:
        """What tiles divide: elements or, where no values are needed, bytes."""
        return self.variants[0].step.size

    @property
    def patches(self) -> Iterator[Patch]:
        return (patch for variant in self.variants for patch in variant.step.patches)

    def add(self, output: int, step: Step) -> None:
        """One more output. Outputs that take the weight without an update, stored alike, share a variant."""
        if not step.patches:
            for variant in self.variants:
                if not variant.step.patches and variant.step.encoder.key == step.encoder.key:
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
        """(start, stop) in the units of `size`, in order."""
        return self._cutter.tiles()

    def will_need(self, start: int, stop: int) -> None:
        """Hint that a tile is made soon."""
        if self.needs_values:
            self.sources.will_need(self.box(start, stop))
        else:
            self.variants[0].step.encoder.will_need(start, stop)

    @property
    def held_nbytes(self) -> int:
        """Held by the sources from the first tile to the last."""
        return self.sources.held_nbytes if self.needs_values else 0

    def box(self, start: int, stop: int) -> Box:
        """The part of the weight that the tile [start, stop) is."""
        return self._cutter.box(start, stop)

    @property
    def resident_nbytes(self) -> int:
        """Held from the first tile to the last."""
        windows = self.sources.window_nbytes if self.needs_values else 0
        return self.held_nbytes + windows + sum(variant.step.resident_nbytes for variant in self.variants)

    @property
    def worker_nbytes(self) -> int:
        """Held by each worker while it makes a tile."""
        return max(variant.step.worker_nbytes for variant in self.variants)

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a finished tile in the largest of its forms."""
        size = min(self._cutter.tile_size, self.size)
        return max(variant.step.encoder.tile_nbytes(size) for variant in self.variants)


class SharedWeights:
    """Every step of every output in one shared weight, the weights in their natural order. They are made anew
    whenever they are gone through: all of them at once would be tens of megabytes for a model of many
    experts."""

    def __init__(self, outputs: Sequence[Iterable[Step]]) -> None:
        self._outputs = [sorted(steps, key=_order) for steps in outputs]

    def __iter__(self) -> Iterator[SharedWeight]:
        numbered = [zip(repeat(number), steps, strict=False) for number, steps in enumerate(self._outputs)]
        members = heapq.merge(*numbered, key=lambda member: _order(member[1]))
        for _, of_one_name in groupby(members, key=lambda member: member[1].name):
            yield from _made_together(list(of_one_name))


def _order(step: Step) -> str:
    return natural_key(step.name)


def _made_together(members: list[tuple[int, Step]]) -> list[SharedWeight]:
    """The shared weights of one name: first the steps that decide how it is cut."""
    weights: dict[tuple[object, ...], SharedWeight] = {}
    for number, step in members:
        if step.cut is not None:
            copied = None if step.encoder.needs_values else step.encoder.key
            key = (id(step.sources), step.cut, copied)
            weights.setdefault(key, SharedWeight(step.sources)).add(number, step)
    for number, step in members:
        if step.cut is None:
            fitting = (
                weight
                for (sources, *_), weight in weights.items()
                if sources == id(step.sources) and weight.needs_values
            )
            weight = next(fitting, None) or weights.setdefault(
                (id(step.sources), None), SharedWeight(step.sources)
            )
            weight.add(number, step)
    return list(weights.values())
