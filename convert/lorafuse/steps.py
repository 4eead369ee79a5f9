"""What a plan consists of: steps in shards, cut into tiles, within a memory limit."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lorafuse import measure
from lorafuse.adapters import Patch
from lorafuse.adapters.patch import TILE_NUMEL
from lorafuse.checkpoint import SINGLE
from lorafuse.codecs import Sources
from lorafuse.right_base import BaseCopy
from lorafuse.tensors import DTYPES, TensorSpec

COPY_NBYTES = 1 << 20
MIN_SHARED_NBYTES = 100_000_000
# What a worker holds per element of its tile: packed codes, indexes or the values in the weight's dtype, values in fp32, and the
# sum where it needs a buffer of its own; with a byte to spare.
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
        """Elements per row of a tile: patches see the weight as a matrix of its first dimension (or as a stack of matrices),
        decoding needs only the last."""
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
    n_results: int  # of a tile: for so many outputs it differs
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
        """The warnings, and what a comparison of the adapters' copies of base weights says, which reads them."""
        return [*self.warnings, *filter(None, (copy.difference() for copy in self.copies))]

    @property
    def steps(self) -> Iterator[Step]:
        return (step for shard in self.shards for step in shard.steps)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def natural_key(name: str) -> list[str | int]:
    """Sorts layers.2 before layers.10: the order of a model's execution, and independent of how the input is sharded."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", name))]


def split_shards(steps: list[Step], max_nbytes: int) -> list[PlannedShard]:
    """The steps in files of at most `max_nbytes` each; a weight that is larger has a file of its own.

    What the adapter does not change lies in files of its own, so that the outputs of many adapters can share them. A model that
    fits one file is cut in two only if there is much to share: most of it, and not just a few bytes.
    """
    changed, unchanged = [s for s in steps if s.changes], [s for s in steps if not s.changes]
    nbytes, shared_nbytes = (sum(step.spec.nbytes for step in some) for some in (steps, unchanged))
    if nbytes <= max_nbytes and shared_nbytes < max(nbytes / 2, MIN_SHARED_NBYTES):
        return [PlannedShard(SINGLE, steps)]
    groups = [*_filled(changed, max_nbytes), *_filled(unchanged, max_nbytes)]
    if len(groups) == 1:
        return [PlannedShard(SINGLE, groups[0])]
    return [PlannedShard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _filled(steps: list[Step], max_nbytes: int) -> list[list[Step]]:
    """Greedy: a weight that does not fit any more starts the next group."""
    groups: list[list[Step]] = []
    room = -1
    for step in steps:
        room -= step.spec.nbytes
        if not groups or room < 0:
            groups.append([])
            room = max_nbytes - step.spec.nbytes
        groups[-1].append(step)
    return groups
