"""Weights whose codes are stored transposed, (in, out) where the weight is (out, in): GPTQ, AWQ. A tile's own
bytes are a few of every stored row, so a band of outputs is read at once."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from lorafuse.arithmetic.arena import Arena, to_device_of
from lorafuse.arithmetic.codes import whole_numbers
from lorafuse.arithmetic.draws import Draws, of_run
from lorafuse.arithmetic.on_grid import round_tile
from lorafuse.arithmetic.word_columns import turned
from lorafuse.codecs.conv1d import CHUNK_NUMEL
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.held import N_WINDOWS_HELD, TURNED_NBYTES, WINDOWS_NBYTES, Windows
from lorafuse.codecs.own_grid import GridSources, Recoded
from lorafuse.codecs.scaled_grid import ScaledGrid, levels_of
from lorafuse.codecs.sources import Raw, Scheme
from lorafuse.codecs.strips import Run
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, Box, TensorSpec

# Of a chunk: codes, numbers in fp32, their rounding, and with act-order a scale and a zero point for each.
CHUNK_NBYTES_PER_ELEMENT = 24


class Turned(Protocol):
    """A matrix [out, in] that is stored transposed."""

    names: tuple[str, ...]  # the first holds the codes
    store: Store
    scheme: Scheme
    spec: TensorSpec  # of the weight: [out, in]

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def group_of(self) -> torch.Tensor | int:
        """The group of each input (int32 [in]), or how many inputs in a row share one."""

    @property
    def via(self) -> tuple[str, ...]:
        """The dtypes that values are rounded to before that of the weight."""

    @property
    def multiple(self) -> int:
        """Bands begin at multiples of so many outputs."""

    @property
    def unit(self) -> int:
        """A stored row has a word for so many outputs. Chunks begin at multiples of as many in a band, where
        they may."""

    def nbytes(self, n_outputs: int) -> int:
        """Host bytes of what `read` returns for so many outputs."""

    def read(self, outputs: range, arena: Arena) -> Raw:
        """Returns words, int32 [outputs or units of them, words of one], and what else they need, in tensors
        of their own. Raises CheckpointError, StorageError."""

    def by_outputs(self, raw: Raw, at: range, arena: Arena) -> Raw:
        """Returns what `raw` has of the outputs `at` these places in its band, whole units, on the arena's
        device: words, and float32 [outputs, groups]: scales and zero points, if any."""

    def decode(self, by_outputs: Raw, at: range, values: torch.Tensor, arena: Arena) -> None:
        """values ([outputs, in], of the dtype of the weight) = those of the outputs `at` these places of what
        `by_outputs` returned."""

    def codes(self, words: torch.Tensor) -> torch.Tensor:
        """Returns uint8 [outputs, in], of words as `by_outputs` returns them."""

    def words(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the reverse; bits of no code are 0."""


class _Part(NamedTuple):
    """Some outputs: words (int32 [units of outputs, words of one]), codes (uint8 [outputs, in]), and scales
    and zero points of each run of codes (float32, 1-D)."""

    words: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


class Bands(GridSources):
    """A weight by rows, of what is stored by columns."""

    scattered = True

    def __init__(self, matrix: Turned) -> None:
        self._matrix = matrix
        self.names, self.store, self.scheme = matrix.names, matrix.store, matrix.scheme
        self.spec, self.out_dtype = matrix.spec, matrix.spec.dtype
        n_outputs, n_inputs = self.spec.shape
        width = self._outputs_of_a_band()
        self._windows = Windows(n_outputs, width, matrix.read)
        self.window_nbytes = self._windows.n_held * matrix.nbytes(width)
        # A row is decoded whole, and so is a unit of rows.
        chunk_numel = max(CHUNK_NUMEL, 2 * matrix.unit * n_inputs)
        self.nbytes = chunk_numel * CHUNK_NBYTES_PER_ELEMENT + 2 * TURNED_NBYTES
        self.grid_rows = matrix.unit
        size = matrix.group_of
        self._run = math.gcd(size, n_inputs) if isinstance(size, int) else 1
        # Codes before and after, their change, and the gap of each; scales and zero points of each run.
        self.grid_nbytes_per_element = 16 + 16 // self._run

    def _outputs_of_a_band(self) -> int:
        """All where they may be held, else as many as two bands may have."""
        n_outputs, multiple = self.spec.shape[0], self._matrix.multiple
        if self._matrix.nbytes(n_outputs) <= WINDOWS_NBYTES:
            return n_outputs
        n_multiples = WINDOWS_NBYTES // N_WINDOWS_HELD // self._matrix.nbytes(multiple)
        return max(n_multiples, 1) * multiple

    def _rows(self, box: Box) -> range:
        start, stop = box.run
        return range(start // self.spec.n_cols, stop // self.spec.n_cols)

    def will_need(self, box: Box) -> None:
        if self._windows.n_held == 1 and self._rows(box).start == 0:
            nbytes = self.store.tensors[self.names[0]].spec.nbytes
            self.store.will_need(self.names[0], 0, nbytes)

    def release(self) -> None:
        self._windows.drop()

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return tuple(tensor for raw in self._windows.get(self._rows(box), arena) for tensor in raw)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        rows, (_, n_inputs) = self._rows(box), self.spec.shape
        made = arena.get("bands.made", box.numel, getattr(torch, self.spec.torch_name))
        tile = made.view(len(rows), n_inputs)
        windows, unit = list(self._windows.around(rows)), self._matrix.unit
        n_tensors = len(raw) // max(len(windows), 1)
        step = max(CHUNK_NUMEL // n_inputs // unit, 1) * unit
        for number, (window, part) in enumerate(windows):
            fetched = raw[number * n_tensors : (number + 1) * n_tensors]
            origin = window.start + (part.start - window.start) // unit * unit
            units = range(origin - window.start, -(-(part.stop - window.start) // unit) * unit)
            ours = self._matrix.by_outputs(fetched, units, arena)
            for start in range(origin, part.stop, step):
                first, last = max(start, part.start), min(start + step, part.stop)
                values = tile[first - rows.start : last - rows.start]
                self._matrix.decode(ours, range(first - origin, last - origin), values, arena)
        return made

    def codes_nbytes(self, n: int) -> int:
        stored = self.store.tensors[self.names[0]].spec.nbytes
        return -(-n * stored // self.spec.numel)

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        rows, matrix, parts = self._rows(tile.box), self._matrix, list(self._parts(tile, arena))
        before, scales, zeros = (_joined(of_parts) for of_parts in zip(*(p[1:] for p in parts), strict=True))
        assert before is not None
        assert scales is not None
        after = before.clone()
        levels = levels_of(whole_numbers(matrix.bits, 0), dtypes_of(matrix), zeros=zeros is not None).on(
            arena
        )
        grid = ScaledGrid(after.view(-1), scales, zeros, levels, self._run)
        values, n_clipped, _ = round_tile(grid, tile.base, tile.values, of_run(draws, tile.start), arena)
        stored = turned(torch.cat([words for words, *_ in parts]) ^ matrix.words(before.bitwise_xor_(after)))
        count, n_words = stored.shape
        buffer[: 4 * stored.numel()].copy_(stored.view(torch.uint8).view(-1))
        first, of_row = rows.start // matrix.unit, self.spec.shape[0] // matrix.unit
        return Recoded((Run(4 * first, 0, 4 * n_words, count, 4 * of_row),), values, n_clipped)

    def _parts(self, tile: FinishedTile, arena: Arena) -> Iterator[_Part]:
        """Of each band that the tile touches."""
        matrix, windows = self._matrix, list(self._windows.around(self._rows(tile.box)))
        n_tensors = len(tile.raw) // len(windows)
        for number, (window, part) in enumerate(windows):
            raw = tile.raw[number * n_tensors : (number + 1) * n_tensors]
            at = range(part.start - window.start, part.stop - window.start)
            words, *numbers = matrix.by_outputs(raw, at, arena)
            scales, *zeros = (
                self._by_runs(of_groups, f"bands.runs.{number}.{place}", arena)
                for place, of_groups in enumerate(numbers)
            )
            yield _Part(words, matrix.codes(words), scales, zeros[0] if zeros else None)

    def _by_runs(self, numbers: torch.Tensor, name: str, arena: Arena) -> torch.Tensor:
        """float32, 1-D: the number of each run, of numbers [outputs, groups]; in scratch, since with
        act-order they are as many as elements."""
        groups = self._matrix.group_of
        if isinstance(groups, int):
            starts = torch.arange(0, self.spec.shape[1], self._run, dtype=torch.int64, device=numbers.device)
            groups = starts.div_(groups, rounding_mode="floor")
        made = arena.get(name, len(numbers) * len(groups), torch.float32)
        torch.index_select(numbers, 1, to_device_of(numbers, groups), out=made.view(-1, len(groups)))
        return made


def dtypes_of(matrix: Turned) -> tuple[torch.dtype, ...]:
    """What values are rounded to in turn."""
    via = [dtype for dtype in matrix.via if dtype not in ("F32", matrix.spec.dtype)]
    return tuple(getattr(torch, DTYPES[dtype][1]) for dtype in (*via, matrix.spec.dtype))


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One behind another, where there are any."""
    there = [part for part in parts if part is not None]
    if len(there) == 1:
        return there[0]
    return torch.cat(there) if there else None
