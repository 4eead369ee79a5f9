"""Weights of HF Conv1D, which are (in, out) where every other linear layer's are (out, in). bitsandbytes
stores them as (out, in), so that a row of the weight is a column of what is stored."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.draws import Draws, HalfDraws, TurnedDraws
from lorafuse.arithmetic.on_grid import Grid, round_tile
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.held import N_WINDOWS_HELD, WINDOWS_NBYTES, Windows
from lorafuse.codecs.own_grid import GridSources, Recoded
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.codecs.strips import Run
from lorafuse.files.tensors import Box, TensorSpec

# Modules of class transformers.pytorch_utils.Conv1D, whose weight is (in, out). bitsandbytes stores these as
# (out, in). From `grep 'Conv1D(' models/*/modeling_*.py` of transformers 5.23.0.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CHUNK_NUMEL = 1 << 17  # decoded and transposed at a time: what a chunk touches stays in cache
CHUNK_NBYTES_PER_ELEMENT = 28


def is_conv1d(config: Mapping[str, Any], weight: str) -> bool:
    """Whether a weight belongs to an HF Conv1D module, by the model type and the module's name."""
    parts = weight.split(".")
    return config.get("model_type") in CONV1D_MODEL_TYPES and len(parts) > 1 and parts[-2] in CONV1D_MODULES


class ReadByColumns(Sources, Protocol):
    """Sources of a matrix that is stored by rows, of which columns can be read too."""

    column_multiple: int  # windows begin at multiples of so many columns

    def columns_nbytes(self, n_cols: int) -> int:
        """Host bytes of what `fetch_columns` returns for so many columns."""

    def fetch_columns(self, cols: range) -> Raw:
        """Returns the raw bytes of these columns of all rows, in tensors of its own. Raises CheckpointError,
        StorageError."""

    def decode_columns(self, raw: Raw, window: range, box: Box, arena: Arena) -> torch.Tensor:
        """Returns float32 [rows, columns] of the box, on the arena's device, from what was fetched for the
        columns `window` around it. Valid until the arena's next use."""


@runtime_checkable
class RecodedByColumns(ReadByColumns, Protocol):
    """Those whose codes can be written anew, some columns of all rows at a time."""

    column_run: int  # the scale of so many columns, from a multiple of so many on, is one

    def codes_of_columns(
        self, raw: Raw, window: range, cols: range, arena: Arena
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, uint8 [rows, bytes], and scales, float32 [rows, runs], of columns inside a window, which are
        whole runs, on the arena's device."""

    def grid_of(self, codes: torch.Tensor, scales: torch.Tensor, run: int, skip: int, arena: Arena) -> Grid:
        """The grid of codes, uint8 [bytes], which `write` changes, with a scale (float32, 1-D) for each run;
        the first code is that of element `skip` of a run."""


class Transposed(GridSources):
    """The transpose of a stored matrix. It is read once, a window of columns at a time, or whole where that
    is not much: a tile's own columns are a few bytes of every stored row."""

    def __init__(self, stored: ReadByColumns) -> None:
        self._stored = stored
        self.names, self.store, self.scheme = stored.names, stored.store, stored.scheme
        self.spec = TensorSpec(stored.spec.dtype, stored.spec.shape[::-1])
        self.out_dtype = stored.out_dtype
        self.nbytes = CHUNK_NUMEL * CHUNK_NBYTES_PER_ELEMENT
        n_rows, width = self.spec.shape[0], self._width_of_windows()
        self._windows = Windows(n_rows, width, self._read)
        self.grid_rows = stored.column_run if isinstance(stored, RecodedByColumns) else 1
        self.window_nbytes = self._windows.n_held * stored.columns_nbytes(width)

    def _width_of_windows(self) -> int:
        """Columns: all of them where they may be held, else as many as two windows may have."""
        n_rows, multiple = self.spec.shape[0], self._stored.column_multiple
        if self._stored.columns_nbytes(n_rows) <= WINDOWS_NBYTES:
            return max(n_rows, 1)
        n_multiples = WINDOWS_NBYTES // N_WINDOWS_HELD // self._stored.columns_nbytes(multiple)
        return max(n_multiples, 1) * multiple

    def _read(self, cols: range, arena: Arena) -> Raw:
        return self._stored.fetch_columns(cols)

    def _rows(self, box: Box) -> range:
        start, stop = box.run
        return range(start // self.spec.n_cols, stop // self.spec.n_cols)

    def will_need(self, box: Box) -> None:
        if self._windows.n_held == 1 and self._rows(box).start == 0:
            self._stored.will_need(Box.whole(self._stored.spec))

    def release(self) -> None:
        self._windows.drop()

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return tuple(tensor for raw in self._windows.get(self._rows(box), arena) for tensor in raw)

    def _by_window(self, raw: Raw, rows: range) -> Iterator[tuple[range, range, Raw]]:
        """(window, those of the rows in it, what was fetched for it) of each."""
        windows = list(self._windows.around(rows))
        n_tensors = len(raw) // len(windows)
        for number, (window, part) in enumerate(windows):
            yield window, part, raw[number * n_tensors : (number + 1) * n_tensors]

    def codes_nbytes(self, n: int) -> int:
        stored = self.store.tensors[self.names[0]].spec.nbytes
        return -(-n * stored // max(self.spec.numel, 1))

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        """In the order in which codes are stored, in which those of the tile are some of each row's."""
        stored = self._stored
        assert isinstance(stored, RecodedByColumns)
        rows, n_cols = self._rows(tile.box), self.spec.n_cols
        parts = [
            stored.codes_of_columns(raw, window, part, arena)
            for window, part, raw in self._by_window(tile.raw, rows)
        ]
        codes, scales = (torch.cat(of_windows, dim=1) for of_windows in zip(*parts, strict=True))
        grid = stored.grid_of(codes.view(-1), scales.view(-1), stored.column_run, 0, arena)
        base, sums = (
            arena.get(f"conv1d.{name}", values.numel(), values.dtype).copy_(
                values.view(len(rows), n_cols).T.reshape(-1)
            )
            for name, values in (("base", tile.base), ("sums", tile.values))
        )
        drawn = TurnedDraws(draws, tile.start, len(rows), n_cols, arena) if draws else HalfDraws()
        values, n_clipped, _ = round_tile(grid, base, sums, drawn, arena)
        base.view(len(rows), n_cols).copy_(values.view(n_cols, len(rows)).T)
        buffer[: codes.numel()].copy_(codes.view(-1))
        nbytes, of_row = codes.shape[1], self.spec.shape[0] * codes.shape[1] // len(rows)
        run = Run(rows.start * nbytes // len(rows), 0, nbytes, n_cols, of_row)
        return Recoded((run,), base, n_clipped)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        rows, n_cols = self._rows(box), self.spec.n_cols
        made = arena.get("conv1d.made", box.numel, getattr(torch, self.spec.torch_name))
        tile = made.view(len(rows), n_cols)
        for window, part, fetched in self._by_window(raw, rows):
            at = slice(part.start - rows.start, part.stop - rows.start)
            step = max(CHUNK_NUMEL // len(part), 1)
            for first in range(0, n_cols, step):
                chunk = Box(range(first, min(first + step, n_cols)), part, n_cols, self.spec.shape[0])
                values = self._stored.decode_columns(fetched, window, chunk, arena)
                # Transposed in a buffer of its own: into part of a tile, torch copies element by element.
                turned = arena.get("conv1d.turned", chunk.numel, torch.float32).view(values.shape[::-1])
                tile[at, first : first + step].copy_(turned.copy_(values.T))
        return made
