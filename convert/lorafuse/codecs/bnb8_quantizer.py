"""LLM.int8 made anew, in the layout that bnb8.py reads."""

from collections.abc import Iterator

import torch

from lorafuse.arithmetic.arena import Arena, put
from lorafuse.arithmetic.dequantize import decode_int8
from lorafuse.arithmetic.quantize import CHUNK_NUMEL, int8_rows, magnitudes
from lorafuse.codecs.bnb8_grid import Int8Grid
from lorafuse.codecs.encoder import Piece
from lorafuse.codecs.quantizing import OnGrid, Quantizer, stored
from lorafuse.codecs.sources import Raw
from lorafuse.files.tensors import TensorSpec
from lorafuse.settings import BaseQuant


class Int8Layout:
    """The stored tensors of a weight `name` of `shape` (out, in), and how codes and scales get into these."""

    __slots__ = ("_module", "tensors")

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._module = name.removesuffix(".weight")
        self.tensors = (
            stored(name, "I8", *shape),
            stored(f"{self._module}.SCB", "F32", shape[0]),
            stored(f"{self._module}.weight_format", "U8"),
        )

    def codes(
        self, half: torch.Tensor, scb: torch.Tensor, buffer: torch.Tensor, arena: Arena
    ) -> tuple[Int8Grid, torch.Tensor]:
        """Fills the buffer with the codes of stored rows or equal parts of them (fp16, 1-D), given the scale
        of each. Returns their grid, and what a reader decodes."""
        half = half.view(len(scb), -1)
        codes = buffer[: half.numel()].view(torch.int8)
        decoded = arena.get("quantizing.decoded", half.numel(), torch.float32)
        made, tile = codes.view(half.shape), decoded.view(half.shape)
        step = max(CHUNK_NUMEL // half.shape[1], 1)
        for row in range(0, len(scb), step):
            rows, of_rows = slice(row, row + step), scb[row : row + step, None]
            int8_rows(half[rows], of_rows, tile[rows])
            made[rows].copy_(tile[rows])
            decode_int8(tile[rows], of_rows)
        return Int8Grid(codes, scb), decoded

    def beside(self, first: int, scb: torch.Tensor, buffer: torch.Tensor, at: int) -> Iterator[Piece]:
        """Puts the scales of the stored rows from `first` on, and with the first of them what there is once,
        at byte `at` of the buffer."""
        end = put(buffer, at, scb)
        yield Piece(f"{self._module}.SCB", 4 * first, at, end - at)
        if not first:  # 0: row by row
            buffer[end] = 0
            yield Piece(f"{self._module}.weight_format", 0, end, 1)


class Int8Rows(Quantizer):
    """LLM.int8 of a weight (out, in). The scale of a row is its largest magnitude in fp16."""

    __slots__ = ("_layout", "_name", "quant", "spec", "tensors")

    decoded_itemsize = 4

    def __init__(self, name: str, spec: TensorSpec, quant: BaseQuant) -> None:
        self._layout = Int8Layout(name, spec.shape)
        self._name, self.spec, self.quant, self.tensors = name, spec, quant, self._layout.tensors

    def tile_nbytes(self, n: int) -> int:
        return n + 4 * (n // max(self.spec.n_cols, 1)) + 1

    def scratch_nbytes(self, n: int) -> int:
        return 4 * n  # fp16, and its bits

    def quantize(
        self, values: torch.Tensor, start: int, found: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        first, numel = start // self.spec.n_cols, values.numel()
        half = arena.here(values, "quantizing.half", torch.float16)
        bits = magnitudes(half, arena)
        scb = bits.view(-1, self.spec.n_cols).amax(1).view(torch.float16).float()
        grid, decoded = self._layout.codes(half, scb, buffer, arena)
        beside = self._layout.beside(first, scb, buffer, numel)
        return OnGrid(grid, decoded, (Piece(self._name, start, 0, numel), *beside))
