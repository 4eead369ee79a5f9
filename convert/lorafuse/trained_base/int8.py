"""LLM.int8 of a full-precision weight, quantized and dequantized as training saw it: on the host, a tile at a
time.

The scale of a row of (out, in) is its largest magnitude. A tile has whole rows, so nothing is computed
beforehand; the rows of a transposed weight are columns, whose largest values one pass finds.
"""

import torch

from lorafuse.arithmetic import quantize
from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.dequantize import decode_int8
from lorafuse.arithmetic.quantize import CHUNK_NBYTES_PER_ELEMENT, CHUNK_NUMEL
from lorafuse.codecs.held import ComputedOnce
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.files.tensors import SAFETENSORS_NAMES, Box, TensorSpec
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.passes import PASS_NUMEL, as_loaded, pieces, whole_rows


class Int8(Sources):
    """LLM.int8 of the full-precision weight `dense`, of a model loaded in `dtype`."""

    def __init__(self, dense: Sources, quant: BaseQuant, dtype: torch.dtype, *, transposed: bool) -> None:
        self._dense, self._dtype, self._transposed = dense, dtype, transposed
        self.spec = TensorSpec("F32", dense.spec.shape)
        self.out_dtype = SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]
        self.names, self.store, self.scheme = dense.names, dense.store, dense.scheme
        self._state = ComputedOnce()
        self._chunk_numel = whole_rows(CHUNK_NUMEL, self.spec.n_cols)
        self.nbytes = self._chunk_numel * CHUNK_NBYTES_PER_ELEMENT
        self.held_nbytes = 4 * self.spec.n_cols if transposed else 0

    def prepare(self, arena: Arena) -> None:
        if self._transposed:
            self._state.get(lambda: self._pass_over(arena))

    def release(self) -> None:
        self._state.drop()

    def will_need(self, box: Box) -> None:
        self._dense.will_need(box)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """The elements of the box, and the largest of each column of a transposed weight."""
        state = self._state.get(lambda: self._pass_over(arena)) if self._transposed else ()
        return (*self._dense.fetch(box, arena), *state)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        values = self._dense.decode(raw[:1], box, arena)
        out = arena.get("simulated", box.numel, torch.float32)
        for at in range(0, box.numel, self._chunk_numel):
            half = self._half(values[at : at + self._chunk_numel])
            scb = raw[1][None] if self._transposed else self._largest(half, 1, arena)[:, None]
            tile = out[at : at + half.numel()].view(half.shape)
            quantize.int8_rows(half, scb, tile)
            decode_int8(tile, scb)
        return out

    def loaded(self, raw: Raw, box: Box, arena: Arena) -> Raw:
        """The elements of the box before they are quantized, and the largest of each column of a transposed
        weight."""
        values = arena.here(self._dense.decode(raw[:1], box, arena), "simulated.loaded", self._dtype)
        return values, *raw[1:]

    def _half(self, values: torch.Tensor) -> torch.Tensor:
        """float16 [rows, n_cols]."""
        return as_loaded(values, self._dtype).half().view(-1, self.spec.n_cols)

    def _largest(self, half: torch.Tensor, dim: int, arena: Arena) -> torch.Tensor:
        """float32, the largest magnitudes along a dimension."""
        bits = quantize.magnitudes(half.view(-1), arena).view(half.shape)
        return bits.amax(dim).view(half.dtype).float()

    def _pass_over(self, arena: Arena) -> Raw:
        """The largest of each column, float32 [n_cols]."""
        scb = torch.zeros(self.spec.n_cols, dtype=torch.float32)
        for _, piece in pieces(self._dense, whole_rows(PASS_NUMEL, self.spec.n_cols), arena):
            torch.maximum(scb, self._largest(self._half(piece), 0, arena), out=scb)
        return (scb,)
