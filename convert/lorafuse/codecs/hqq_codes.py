"""Codes in units, a run of codes at the same place of as many units: what HQQ stores (hqq.py has the
format)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.units import Numbers, decode_units
from lorafuse.codecs.conv1d import CHUNK_NBYTES_PER_ELEMENT, CHUNK_NUMEL
from lorafuse.codecs.sources import Raw, Scheme, Sources
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, Box, TensorSpec


class Packing(NamedTuple):
    """Codes of so many bits, so many in a unit of so many bytes, the first in the highest bits."""

    bits: int
    n_codes: int
    unit_nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a flattened weight is stored. Groups are runs of `group_size` elements, or with `by_columns` what
    lies `n_groups` elements apart."""

    packing: Packing
    dtype: str
    n_units: int
    n_groups: int
    group_size: int
    by_columns: bool

    def places(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(place in a unit, first unit, last unit + 1) of each run of elements [start, stop)."""
        for place in range(start // self.n_units, -(-stop // self.n_units)):
            first = place * self.n_units
            yield place, max(start - first, 0), min(stop - first, self.n_units)

    def groups(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Runs of groups [first, last) that elements [start, stop) are of; by columns, one element after
        another, unless these are all."""
        if not self.by_columns:
            return [(start // self.group_size, -(-stop // self.group_size))]
        if stop - start >= self.n_groups:
            return [(0, self.n_groups)]
        first, n = start % self.n_groups, stop - start
        wrapped = first + n - self.n_groups
        return [(first, first + n)] if wrapped <= 0 else [(first, self.n_groups), (0, wrapped)]

    def numbers(self, zeros: torch.Tensor, scales: torch.Tensor, run: range, start: int) -> Numbers:
        """Those of elements [start, …), out of what `groups` gives for `run`."""
        if not self.by_columns:
            first = run.start // self.group_size * self.group_size
            return Numbers(zeros, scales, self.group_size, start - first)
        first = run.start if len(run) < self.n_groups else 0
        return Numbers(zeros, scales, 0, (start - first) % self.n_groups)


class PackedUnits(Sources):
    """A weight of HQQ. `names`: codes, scales, zero points, and what says how."""

    def __init__(
        self, store: Store, names: tuple[str, ...], spec: TensorSpec, scheme: Scheme, layout: Layout
    ) -> None:
        self.store, self.names, self.scheme = store, names, scheme
        self.spec, self.out_dtype, self._layout = spec, spec.dtype, layout
        self.nbytes = CHUNK_NUMEL * CHUNK_NBYTES_PER_ELEMENT
        self._dtype = getattr(torch, DTYPES[layout.dtype][1])
        self._unit = torch.int32 if layout.packing.unit_nbytes == 4 else torch.uint8

    def will_need(self, box: Box) -> None:
        size = self._layout.packing.unit_nbytes
        for _, first, last in self._layout.places(*box.run):
            self.store.will_need(self.names[0], first * size, (last - first) * size)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """Units of each run of codes, then scales and zero points."""
        (start, stop), layout = box.run, self._layout
        size = layout.packing.unit_nbytes
        if start == stop:
            return ()
        raw = [
            arena.fetch(f"hqq.units{place}", self.store, self.names[0], first * size, (last - first) * size)
            for place, first, last in layout.places(start, stop)
        ]
        return (*raw, *(self._of_groups(name, start, stop, arena) for name in self.names[1:3]))

    def _of_groups(self, name: str, start: int, stop: int, arena: Arena) -> torch.Tensor:
        itemsize = DTYPES[self._layout.dtype][0]
        parts = [
            arena.fetch(f"{role}{number}", self.store, name, first * itemsize, (last - first) * itemsize)
            for role in [f"hqq.{name.rpartition('.')[2]}"]
            for number, (first, last) in enumerate(self._layout.groups(start, stop))
        ]
        return torch.cat(parts).view(self._dtype) if len(parts) > 1 else parts[0].view(self._dtype)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        run, layout = range(*box.run), self._layout
        made = arena.get("hqq.made", len(run), getattr(torch, self.spec.torch_name))
        if not run:
            return made
        *units, scales, zeros = (arena.place(tensor) for tensor in raw)
        bits, n_codes, _ = layout.packing
        for tensor, (place, first, last) in zip(units, layout.places(run.start, run.stop), strict=True):
            start = place * layout.n_units + first
            part = made[start - run.start : start - run.start + last - first]
            numbers = layout.numbers(zeros, scales, run, start)
            shift = bits * (n_codes - 1 - place)
            decode_units(tensor.view(self._unit), shift, (1 << bits) - 1, numbers, part, arena)
        return made
