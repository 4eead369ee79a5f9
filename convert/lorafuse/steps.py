"""What a plan consists of: steps in shards, cut into tiles, within a memory limit."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lorafuse import measure
from lorafuse.adapters import Patch
from lorafuse.adapters.lowrank import LowRank
from lorafuse.adapters.patch import TILE_NUMEL
from lorafuse.checkpoint import SINGLE
from lorafuse.codecs import Sources
from lorafuse.errors import UsageError, shown
from lorafuse.settings import Settings
from lorafuse.tensors import DTYPES, TensorSpec

COPY_NBYTES = 1 << 20
# What a worker holds per element of its tile: packed codes, indexes or the values in the weight's dtype, values in fp32, and the
# sum where it needs a buffer of its own; with a byte to spare.
WORKER_NBYTES_PER_ELEMENT = 12
# Interpreter, libraries' buffers and allocator slack beyond `import torch`, measured by bench/memory.py.
RUNTIME_NBYTES = 25_000_000
STORED_TENSOR_NBYTES = 800  # a stored tensor's name and entries in the tables, measured with 120,000 of them
TILES_PER_WORKER = 6  # so that workers go on while a write waits for the disk
MIN_TILES_AHEAD = 2


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
    def _stacked(self) -> bool:
        return any(patch.stacked for patch in self.patches)

    @property
    def row_numel(self) -> int:
        """Elements per row of a tile: patches see the weight as a matrix of its first dimension (or as a stack of matrices),
        decoding needs only the last."""
        whole_rows = self.patches and not self._stacked
        return max(self.spec.n_cols if whole_rows else math.prod(self.spec.shape[-1:]), 1)

    @property
    def tile_numel(self) -> int:
        if self.verbatim:
            return COPY_NBYTES // DTYPES[self.spec.dtype][0]
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
        return min(self.tile_numel, self.spec.numel) * DTYPES[self.spec.dtype][0]


@dataclass(frozen=True)
class Memory:
    """How the memory limit is spent."""

    n_workers: int
    n_tiles: int  # in the making or waiting to be written, at once
    tile_nbytes: int
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
    memory: Memory
    config_changes: dict[str, Any]
    used: list[str]
    ignored: dict[str, str]
    warnings: list[str]

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
    """Greedy: a weight that does not fit any more starts the next shard, and one larger than the limit has its own."""
    groups: list[list[Step]] = [[]]
    nbytes = 0
    for step in steps:
        if groups[-1] and nbytes + step.spec.nbytes > max_nbytes:
            groups.append([])
            nbytes = 0
        groups[-1].append(step)
        nbytes += step.spec.nbytes
    if len(groups) == 1:
        return [PlannedShard(SINGLE, groups[0])]
    return [PlannedShard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _low_ranks(patches: Iterable[Patch]) -> Iterator[LowRank]:
    """Those whose right factor can be read again."""
    for patch in patches:
        if isinstance(patch, LowRank):
            yield patch
        yield from _low_ranks(patch.members)


def fit_memory(steps: list[Step], held_nbytes: int, settings: Settings) -> Memory:
    """As many workers as the limit allows. A right factor that does not fit beside one worker is read again for each tile."""
    for attempt in ("resident", "some read again", "all read again"):
        worker = max(step.worker_nbytes for step in steps)
        tile = max(step.tile_nbytes for step in steps)
        resident = max(step.resident_nbytes for step in steps)
        for n_workers in range(settings.n_workers, 0, -1):
            n_tiles = n_workers * TILES_PER_WORKER + MIN_TILES_AHEAD
            fixed = RUNTIME_NBYTES + held_nbytes + n_workers * worker + n_tiles * tile
            if fixed + resident <= settings.memory_nbytes:
                return Memory(n_workers, n_tiles, tile, settings.memory_nbytes - fixed)
        for step in steps:
            for patch in _low_ranks(step.patches):
                patch.right_resident = attempt == "resident" and fixed + step.resident_nbytes <= settings.memory_nbytes
    largest = max(steps, key=lambda step: step.worker_nbytes + step.resident_nbytes)
    raise UsageError(
        f"A memory limit of {settings.memory_nbytes / 1e6:.0f} MB is too small: {(fixed + resident) / 1e6:.0f} MB are needed "
        f"beyond `import torch`, most of it for {shown(largest.name)}. Raise --memory-limit."
    )
