"""LLM.int8 made anew, in the layout that bnb8.py reads."""

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.dequantize import decode_int8
from lorafuse.arithmetic.quantize import CHUNK_NUMEL, int8_rows, magnitudes
from lorafuse.codecs.bnb8_grid import Int8Grid
from lorafuse.codecs.encoder import Piece
from lorafuse.codecs.quantizing import OnGrid, QuantizedOnLoad, QuantizingEncoder, put, stored
from lorafuse.codecs.sources import Raw
from lorafuse.files.tensors import TensorSpec
from lorafuse.settings import BaseQuant


class Int8Encoder(QuantizingEncoder):
    """The scale of a row is its largest magnitude in fp16."""

    __slots__ = ("_module", "tensors")

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        quant: BaseQuant,
        rounding: str | None,
        base: QuantizedOnLoad | None = None,
    ) -> None:
        super().__init__(name, spec, quant, rounding, base)
        self._module = name.removesuffix(".weight")
        self.tensors = (
            stored(name, "I8", *spec.shape),
            stored(f"{self._module}.SCB", "F32", spec.shape[0]),
            stored(f"{self._module}.weight_format", "U8"),
        )

    @property
    def _decoded_itemsize(self) -> int:
        return 4

    def tile_nbytes(self, n: int) -> int:
        return n + 4 * (n // max(self._spec.n_cols, 1)) + 1

    def scratch_nbytes(self, n: int) -> int:
        return super().scratch_nbytes(n) + 4 * n  # fp16, and its bits

    def _quantized(
        self, values: torch.Tensor, start: int, state: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        n_cols = self._spec.n_cols
        half = arena.here(values, "quantizing.half", torch.float16)
        bits = magnitudes(half, arena).view(-1, n_cols)
        scb = bits.amax(1).view(torch.float16).float()
        codes = buffer[: values.numel()].view(torch.int8)
        decoded = arena.get("quantizing.decoded", values.numel(), torch.float32)
        step = max(CHUNK_NUMEL // n_cols, 1)
        for row in range(0, len(scb), step):
            of_rows, some = scb[row : row + step, None], slice(row * n_cols, (row + step) * n_cols)
            q = decoded[some].view(-1, n_cols)
            int8_rows(half[some].view(-1, n_cols), of_rows, q)
            codes[some].copy_(q.view(-1))
            decode_int8(q, of_rows)
        end = put(buffer, values.numel(), scb)
        first = start // n_cols
        pieces = [
            Piece(self._name, start, 0, values.numel()),
            Piece(f"{self._module}.SCB", 4 * first, values.numel(), end - values.numel()),
        ]
        if not first:  # 0: row by row
            buffer[end] = 0
            pieces.append(Piece(f"{self._module}.weight_format", 0, end, 1))
        return OnGrid(Int8Grid(codes, scb), decoded, tuple(pieces))
