"""What a plan consists of: steps in shards, cut into tiles, within a memory limit."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafuse.adapters import Patch
from lorafuse.arithmetic import measure
from lorafuse.codecs import Sources
from lorafuse.codecs.encoder import Encoder
from lorafuse.files.safetensors_file import header_of
from lorafuse.files.tensors import Box, StoredTensor, TensorSpec
from lorafuse.patches.patch import TILE_NUMEL
from lorafuse.planning.base_check import BaseCopy
from lorafuse.side_files.choose import SideFiles

COPY_NBYTES = 1 << 20
# What a worker holds per element of its tile: packed codes, indexes or the values in the weight's dtype,
# values in fp32, and the sum where it needs a buffer of its own; with a byte to spare.
WORKER_NBYTES_PER_ELEMENT = 12
# Measured with 62,000 tensors, of which a mixture of experts has many, and by tests/merge/test_memory.py: a
# stored tensor's name and entries in the tables; an adapter's tensor, with what it says of a weight; and what
# the receipt says of a weight, once no tile is in the making.
STORED_TENSOR_NBYTES = 800
ADAPTER_TENSOR_NBYTES = 1450
RECEIPT_ENTRY_NBYTES = 250


@dataclass(slots=True)
class Step:
    """One weight of the output: what it is made from, what is done to it, and how it is stored. `spec` is its
    shape and the dtype that a reader gets."""

    name: str
    spec: TensorSpec
    sources: Sources
    encoder: Encoder
    patches: list[Patch] = field(default_factory=list)
    action: str = "copied"

    @property
    def changes(self) -> bool:
        """An adapter has a say in it."""
        return self.action not in ("copied", "decoded")

    @property
    def nbytes(self) -> int:
        """Of all stored tensors that it becomes."""
        return sum(tensor.nbytes for tensor in self.encoder.tensors)

    @property
    def _stacked(self) -> bool:
        return any(patch.needs.stacked for patch in self.patches)

    @property
    def row_numel(self) -> int:
        """Elements per row of a tile: patches see the weight as a matrix of its first dimension (or as a
        stack of matrices), decoding needs only the last."""
        whole_rows = self.patches and not self._stacked
        return max(self.spec.n_cols if whole_rows else math.prod(self.spec.shape[-1:]), 1)

    @property
    def size(self) -> int:
        """What tiles divide: the weight's elements, or where these are not needed the bytes that are
        copied."""
        return self.spec.numel if self.encoder.needs_values else self.nbytes

    def _row_multiple(self, row_numel: int) -> int:
        needed = math.lcm(self.encoder.row_multiple, *(patch.needs.row_multiple for patch in self.patches))
        wanted = math.lcm(needed, self.sources.rows_at_once)
        fits = (row_numel,) == self.spec.shape[-1:] and wanted * row_numel <= TILE_NUMEL
        return wanted if fits else needed

    @property
    def cut(self) -> tuple[int, bool] | None:
        """What decides the tiles of a weight of this shape; None where any tiles of whole rows will do."""
        if self.encoder.needs_values and not self.patches and self.encoder.row_multiple == 1:
            return None
        return self.tile_size, self._stacked

    @property
    def tile_size(self) -> int:
        """Of the tiles, in the units of `size`."""
        if not self.encoder.needs_values:
            return COPY_NBYTES
        row_numel = self.row_numel
        least = self._row_multiple(row_numel) * row_numel
        return max(TILE_NUMEL // least, 1) * least

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(start, stop) in the units of `size`, in order."""
        step, size = self.tile_size, self.size
        matrix = max(self.spec.n_cols, 1) if self._stacked else size
        for first in range(0, size, max(matrix, 1)):
            last = first + matrix
            yield from ((start, min(start + step, last)) for start in range(first, last, step))

    def box(self, start: int, stop: int) -> Box:
        """The tile [start, stop), where values are needed, as rows of one matrix: of a stack, or of all
        rows."""
        width = self.row_numel
        height = (self.spec.n_cols if self._stacked else self.spec.numel) // width
        matrix, first = divmod(start // width, max(height, 1))
        return Box(range(first, first + (stop - start) // width), range(width), height, width, matrix)

    @property
    def resident_nbytes(self) -> int:
        """Held from the weight's first tile to its last."""
        return self.encoder.held_nbytes + sum(patch.needs.nbytes for patch in self.patches)

    @property
    def worker_nbytes(self) -> int:
        """Held by each worker while it makes a tile."""
        if not self.encoder.needs_values:
            return 0
        tile = min(self.tile_size, self.size)
        measures = min(tile, measure.CHUNK_NUMEL) * measure.NBYTES_PER_ELEMENT
        scratch = self.encoder.scratch_nbytes(tile) + sum(
            patch.needs.scratch_nbytes for patch in self.patches
        )
        return tile * WORKER_NBYTES_PER_ELEMENT + measures + self.sources.nbytes + scratch

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a finished tile."""
        return self.encoder.tile_nbytes(min(self.tile_size, self.size))


@dataclass(frozen=True)
class Memory:
    """How the memory limit is spent."""

    n_workers: int
    n_tiles: int  # in the making or waiting for those before them, at once
    n_variants: int  # of a tile: for so many outputs it differs
    tile_nbytes: int  # of each
    resident_nbytes: int  # for what patches hold from a weight's first tile to its last
    worker_nbytes: int = 0  # of each worker, beside its finished tile
    largest_nbytes: int = 0  # that a weight holds, of `resident_nbytes`

    @property
    def of_tile_nbytes(self) -> int:
        """What a tile takes where it is computed."""
        return self.worker_nbytes + self.tile_nbytes


@dataclass
class PlannedShard:
    """One output file: its weights, and the stored tensors that these become, in order."""

    file: str
    steps: list[Step]

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        return (tensor for step in self.steps for tensor in step.encoder.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_nbytes(self) -> int:
        """With the header."""
        return len(header_of(list(self.tensors))) + self.nbytes


@dataclass
class Plan:
    """Everything that is going to happen."""

    shards: list[PlannedShard]
    plan_id: str
    memory: Memory  # of a run for this output alone
    held_nbytes: int  # by the tables of stored tensors, and by adapters
    config_changes: dict[str, Any]
    stored_config: Mapping[str, Any]  # the fields of config.json that readers of the stored tensors need
    used: list[str]
    ignored: dict[str, str]
    dropped: dict[str, str]  # stored tensors of the checkpoint that are no weights → why
    warnings: list[str]
    notes: list[str]  # what to ask oneself about a merge in which nothing is wrong
    copies: list[BaseCopy]  # compared with the checkpoint before the merge
    side_files: SideFiles
    sizes: dict[str, int]  # bytes of all weights in each format that the base allows, where that was asked

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
