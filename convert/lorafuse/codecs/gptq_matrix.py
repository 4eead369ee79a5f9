"""The matrix of a GPTQ weight: read by outputs, and for HF Conv1D by inputs (gptq.py has the format)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.bit_stream import pack, unpack
from lorafuse.arithmetic.coded_rows import decode_rows, decode_turned
from lorafuse.arithmetic.codes import Numbers, packed_codes, whole_numbers
from lorafuse.arithmetic.draws import Draws, of_run
from lorafuse.arithmetic.on_grid import round_tile
from lorafuse.arithmetic.word_columns import columns_as_rows, gptq_zeros, rows_as_columns
from lorafuse.codecs.bands import CHUNK_NBYTES_PER_ELEMENT, dtypes_of
from lorafuse.codecs.conv1d import CHUNK_NUMEL
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.held import read_runs, read_turned
from lorafuse.codecs.own_grid import GridSources, Recoded
from lorafuse.codecs.scaled_grid import ScaledGrid, levels_of
from lorafuse.codecs.sources import Raw, Scheme
from lorafuse.codecs.strips import Run
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, Box, TensorSpec

WORDS = 32  # codes of so many inputs, or zero points of so many outputs, fill whole words


@dataclass
class GptqMatrix:
    """`group_of`: the group of each input (int32 [K]), or how many inputs in a row share one."""

    store: Store
    names: tuple[str, ...]
    spec: TensorSpec
    scheme: Scheme
    bits: int
    less_one: bool
    group_of: torch.Tensor | int

    multiple: ClassVar[int] = WORDS
    unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.n_word_rows = self.store.tensors[self.names[0]].spec.shape[0]
        scales = self.store.tensors[self.names[2]].spec
        self.n_groups, self.scales_dtype = scales.shape[0], scales.dtype
        self.via = (scales.dtype,)

    @property
    def itemsize(self) -> int:
        """Bytes of a scale."""
        return DTYPES[self.scales_dtype][0]

    def nbytes(self, n_outputs: int) -> int:
        of_zeros = -(-n_outputs * self.bits // 32) * 4 + n_outputs
        return 4 * self.n_word_rows * n_outputs + self.n_groups * (n_outputs * self.itemsize + of_zeros)

    def read(self, outputs: range, arena: Arena) -> Raw:
        """Words int32 [outputs, word rows], scales [groups, outputs], zeros uint8 [groups, outputs]."""
        n_outputs, width = self.spec.shape[0], len(outputs)
        starts = [(row * n_outputs + outputs.start) * 4 for row in range(self.n_word_rows)]
        words = read_turned(self.store, self.names[0], starts, width, arena)
        return (words, *self.read_groups(range(self.n_groups), outputs))

    def read_groups(self, groups: range, outputs: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points of some groups and outputs, which begin at a multiple of WORDS."""
        n_outputs, width, size = self.spec.shape[0], len(outputs), self.itemsize
        starts = [(group * n_outputs + outputs.start) * size for group in groups]
        scales = read_runs(self.store, self.names[2], starts, width * size)
        row_nbytes, first = n_outputs * self.bits // 8, outputs.start * self.bits // 8
        n_words = -(-width * self.bits // 32)
        starts = [group * row_nbytes + first for group in groups]
        stored = read_runs(self.store, self.names[1], starts, 4 * n_words).view(torch.int32)
        zeros = gptq_zeros(stored, self.bits, less_one=self.less_one)
        return scales.view(getattr(torch, DTYPES[self.scales_dtype][1])), zeros[:, :width]

    def by_outputs(self, raw: Raw, at: range, arena: Arena) -> Raw:
        numbers = (arena.place(tensor[:, at.start : at.stop]).T.float().contiguous() for tensor in raw[1:])
        return arena.place(raw[0][at.start : at.stop]), *numbers

    def decode(self, by_outputs: Raw, at: range, values: torch.Tensor, arena: Arena) -> None:
        words, scales, zeros = (tensor[at.start : at.stop] for tensor in by_outputs)
        numbers = Numbers(scales, zeros, self.group_of)
        codes = packed_codes(self.spec.shape[1], self.bits, offset=0)
        decode_rows(words.view(torch.uint8), codes, numbers, list(dtypes_of(self)), values, arena)

    def codes(self, words: torch.Tensor) -> torch.Tensor:
        return unpack(words.view(torch.uint8), self.bits, self.spec.shape[1])

    def words(self, codes: torch.Tensor) -> torch.Tensor:
        return pack(codes, self.bits, 4 * self.n_word_rows).view(torch.int32)


class GptqRows(GridSources):
    """The weight of an HF Conv1D, (in, out): its rows are rows of what is stored."""

    grid_rows = WORDS
    grid_nbytes_per_element = 32  # codes before and after, their change, gaps, scales and zero points

    def __init__(self, matrix: GptqMatrix) -> None:
        self._matrix = matrix
        self.names, self.store, self.scheme = matrix.names, matrix.store, matrix.scheme
        self.spec = TensorSpec(matrix.spec.dtype, matrix.spec.shape[::-1])
        self.out_dtype = self.spec.dtype
        n_outputs = self.spec.shape[1]
        self._step = max(CHUNK_NUMEL // n_outputs // WORDS, 1) * WORDS
        of_groups = matrix.n_groups * n_outputs * (matrix.itemsize + 8)
        self.nbytes = self._step * n_outputs * CHUNK_NBYTES_PER_ELEMENT + of_groups

    def _rows(self, box: Box) -> range:
        start, stop = box.run
        return range(start // self.spec.n_cols, stop // self.spec.n_cols)

    def _chunks(self, rows: range) -> list[tuple[range, range]]:
        """(chunk, rows of it that are asked for): chunks begin with whole words."""
        first = rows.start // WORDS * WORDS
        starts = range(first, rows.stop, self._step)
        chunks = [range(start, min(start + self._step, rows.stop)) for start in starts]
        return [(chunk, range(max(chunk.start, rows.start), chunk.stop)) for chunk in chunks]

    def will_need(self, box: Box) -> None:
        rows, row_nbytes = self._rows(box), self.spec.shape[1] * self._matrix.bits // 8
        first = rows.start // WORDS * WORDS
        self.store.will_need(self.names[0], first * row_nbytes, (rows.stop - first) * row_nbytes)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        rows, (_, n_outputs) = self._rows(box), self.spec.shape
        first = rows.start // WORDS * self._matrix.bits
        last = -(-rows.stop * self._matrix.bits // 32)
        words = arena.fetch(
            "gptq.words", self.store, self.names[0], first * n_outputs * 4, (last - first) * n_outputs * 4
        )
        groups = self._matrix.read_groups(range(self._matrix.n_groups), range(n_outputs))
        return (words.view(torch.int32).view(-1, n_outputs), *groups)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        rows, n_outputs = self._rows(box), self.spec.shape[1]
        made = arena.get("gptq.made", box.numel, getattr(torch, self.spec.torch_name))
        words, *numbers = (arena.place(tensor) for tensor in raw)
        scales, zeros = (of_groups.T.float().contiguous() for of_groups in numbers)
        group_of, bits, dtypes = self._group_of(arena), self._matrix.bits, list(dtypes_of(self._matrix))
        for chunk, part in self._chunks(rows):
            first = (chunk.start - rows.start // WORDS * WORDS) // WORDS * bits
            last = first + -(-len(chunk) * bits // 32)
            groups = group_of[chunk.start : chunk.stop]
            columns = columns_as_rows(words[first:last])
            codes, of_chunk = packed_codes(len(chunk), bits, offset=0), Numbers(scales, zeros, groups)
            values = made.view(-1, n_outputs)[part.start - rows.start : part.stop - rows.start]
            skip = part.start - chunk.start
            decode_turned(columns, codes, len(chunk), of_chunk, dtypes, skip, values, arena)
        return made

    def _group_of(self, arena: Arena) -> torch.Tensor:
        """int32 [in]."""
        size = self._matrix.group_of
        if not isinstance(size, int):
            return arena.place(size)
        inputs = torch.arange(self.spec.shape[0], dtype=torch.int32, device="cpu")
        return arena.place(inputs.div_(size, rounding_mode="floor"))

    def codes_nbytes(self, n: int) -> int:
        n_words = -(-n // self.spec.shape[1] * self._matrix.bits // 32)
        return 4 * n_words * self.spec.shape[1]

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        rows, n_outputs, bits = self._rows(tile.box), self.spec.shape[1], self._matrix.bits
        words, *numbers = (arena.place(tensor) for tensor in tile.raw)
        groups = self._group_of(arena)[rows.start : rows.stop]
        scales, zeros = (of_groups.float().index_select(0, groups).view(-1) for of_groups in numbers)
        columns = columns_as_rows(words)
        before = unpack(columns, bits, len(rows)).T.contiguous()
        after = before.clone()
        dtypes = dtypes_of(self._matrix)
        levels = levels_of(whole_numbers(bits, 0), dtypes, zeros=True).on(arena)
        values, n_clipped, _ = round_tile(
            ScaledGrid(after.view(-1), scales, zeros, levels, 1),
            tile.base,
            tile.values,
            of_run(draws, tile.start),
            arena,
        )
        change = before.bitwise_xor_(after).T.contiguous()
        stored = words ^ rows_as_columns(pack(change, bits, columns.shape[1]))
        buffer[: 4 * stored.numel()].copy_(stored.view(torch.uint8).view(-1))
        first = rows.start // WORDS * bits
        return Recoded((Run(4 * first * n_outputs, 0, 4 * stored.numel()),), values, n_clipped)
