"""What a plan consists of: steps in shards, cut into tiles, within a memory limit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lorafuse.adapters import Patch
from lorafuse.arithmetic import measure
from lorafuse.codecs import Sources
from lorafuse.files.tensors import DTYPES, TensorSpec
from lorafuse.patches.patch import TILE_NUMEL
from lorafuse.planning.base_check import BaseCopy

COPY_NBYTES = 1 << 20
# What a worker holds per element of its tile: packed codes, indexes or the values in the weight's dtype,
# values in fp32, and the sum where it needs a buffer of its own; with a byte to spare.
WORKER_NBYTES_PER_ELEMENT = 12
STORED_TENSOR_NBYTES = 800  # a stored tensor's name and entries in the tables, measured with 120,000 of them


@dataclass
class Step:
    """One weight of the output: what it is made from and what is done to it."""

    name: str
    spec: TensorSpec
    sources: Sources
    patches: list[Patch] = field(default_factory=list)
    action: str = "copied"

    @property
    def verbatim(self) -> bool:
        """Stored bytes are output bytes."""
        return self.action == "copied"

    @property
    def changes(self) -> bool:
        """An adapter has a say in it."""
        return self.action not in ("copied", "decoded")

    @property
    def _stacked(self) -> bool:
        return any(patch.stacked for patch in self.patches)

    @property
    def row_numel(self) -> int:
        """Elements per row of a tile: patches see the weight as a matrix of its first dimension (or as a
        stack of matrices), decoding needs only the last."""
        whole_rows = self.patches and not self._stacked
        return max(self.spec.n_cols if whole_rows else math.prod(self.spec.shape[-1:]), 1)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.spec.dtype][0]

    @property
    def cut(self) -> tuple[int, bool]:
        """What decides the tiles of a weight of this shape."""
        return self.tile_numel, self._stacked

    @property
    def tile_numel(self) -> int:
        if self.verbatim:
            return COPY_NBYTES // self.itemsize
        rows = math.lcm(*(patch.row_multiple for patch in self.patches))  # 1 without patches
        return max(TILE_NUMEL // (rows * self.row_numel), 1) * rows * self.row_numel

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(start, stop) in elements, in order."""
        step, numel = self.tile_numel, self.spec.numel
        matrix = max(self.spec.n_cols, 1) if self._stacked else numel
        for first in range(0, numel, max(matrix, 1)):
            last = first + matrix
            yield from ((start, min(start + step, last)) for start in range(first, last, step))

    @property
    def resident_nbytes(self) -> int:
        """Held from the weight's first tile to its last."""
        return sum(patch.nbytes for patch in self.patches)

    @property
    def worker_nbytes(self) -> int:
        """Held by each worker while it makes a tile."""
        tile = min(self.tile_numel, self.spec.numel)
        if self.verbatim:
            return 0
        measures = min(tile, measure.CHUNK_NUMEL) * measure.NBYTES_PER_ELEMENT
        patches = sum(patch.scratch_nbytes for patch in self.patches)
        return tile * WORKER_NBYTES_PER_ELEMENT + measures + self.sources.nbytes + patches

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a finished tile."""
        return min(self.tile_numel, self.spec.numel) * self.itemsize


@dataclass(frozen=True)
class Memory:
    """How the memory limit is spent."""

    n_workers: int
    n_tiles: int  # in the making or waiting to be written, at once
    n_variants: int  # of a tile: for so many outputs it differs
    tile_nbytes: int  # of each
    resident_nbytes: int  # for what patches hold from a weight's first tile to its last


@dataclass
class PlannedShard:
    """One output file and its weights in order."""

    file: str
    steps: list[Step]

    @property
    def nbytes(self) -> int:
        return sum(step.spec.nbytes for step in self.steps)


@dataclass
class Plan:
    """Everything that is going to happen."""

    shards: list[PlannedShard]
    plan_id: str
    memory: Memory  # of a run for this output alone
    held_nbytes: int  # by the tables of stored tensors, and by adapters
    config_changes: dict[str, Any]
    used: list[str]
    ignored: dict[str, str]
    warnings: list[str]
    copies: list[BaseCopy]  # compared with the checkpoint before the merge

    def all_warnings(self) -> list[str]:
        """The warnings, and what a comparison of the adapters' copies of base weights says, which reads
        them."""
        return [*self.warnings, *filter(None, (copy.difference() for copy in self.copies))]

    @property
    def steps(self) -> Iterator[Step]:
        return (step for shard in self.shards for step in shard.steps)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)
