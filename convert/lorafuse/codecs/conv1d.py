"""Weights of HF Conv1D, which are (in, out) where every other linear layer's are (out, in). bitsandbytes
stores them as (out, in), so that a row of the weight is a column of what is stored."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.held import N_WINDOWS_HELD, WINDOWS_NBYTES, Windows
from lorafuse.codecs.sources import Raw, Sources
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


class Transposed(Sources):
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

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        rows, n_cols = self._rows(box), self.spec.n_cols
        made = arena.get("conv1d.made", box.numel, getattr(torch, self.spec.torch_name))
        tile = made.view(len(rows), n_cols)
        windows = list(self._windows.around(rows))
        n_tensors = len(raw) // len(windows)
        for number, (window, part) in enumerate(windows):
            fetched = raw[number * n_tensors : (number + 1) * n_tensors]
            at = slice(part.start - rows.start, part.stop - rows.start)
            step = max(CHUNK_NUMEL // len(part), 1)
            for first in range(0, n_cols, step):
                chunk = Box(range(first, min(first + step, n_cols)), part, n_cols, self.spec.shape[0])
                values = self._stored.decode_columns(fetched, window, chunk, arena)
                # Transposed in a buffer of its own: into part of a tile, torch copies element by element.
                turned = arena.get("conv1d.turned", chunk.numel, torch.float32).view(values.shape[::-1])
                tile[at, first : first + step].copy_(turned.copy_(values.T))
        return made
