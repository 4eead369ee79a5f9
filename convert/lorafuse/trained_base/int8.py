"""LLM.int8 of a full-precision weight, quantized and dequantized as training saw it."""

import torch

from lorafuse.arithmetic import quantize
from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.dequantize import decode_int8
from lorafuse.codecs.sources import Sources
from lorafuse.files.tensors import SAFETENSORS_NAMES, TensorSpec
from lorafuse.settings import BaseQuant
from lorafuse.trained_base import bnb_gpu
from lorafuse.trained_base.passes import (
    CHUNK_NBYTES_PER_ELEMENT,
    CHUNK_NUMEL,
    PASS_NUMEL,
    ComputedOnce,
    State,
    as_loaded,
    pieces,
    whole_rows,
)


class Int8(Sources):
    """LLM.int8 of one weight."""

    def __init__(self, inner: Sources, quant: BaseQuant, dtype: torch.dtype, *, transposed: bool) -> None:
        self._inner, self._dtype, self._transposed = inner, dtype, transposed
        self.spec = TensorSpec("F32", inner.spec.shape)
        self.out_dtype = SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]
        self.names, self.store, self.scheme = inner.names, inner.store, inner.scheme
        self._state = ComputedOnce()
        self._chunk_numel = whole_rows(CHUNK_NUMEL, self.spec.n_cols)
        self.nbytes = self._chunk_numel * CHUNK_NBYTES_PER_ELEMENT
        self.held_nbytes = 4 * self.spec.n_cols if transposed else 0

    def prepare(self, arena: Arena) -> None:
        self._prepared(arena)

    def release(self) -> None:
        self._state.drop()

    def will_need(self, start: int, stop: int) -> None:
        self._inner.will_need(start, stop)

    def fetch(self, start: int, stop: int, arena: Arena) -> State:
        state = self._prepared(arena)
        return state if arena.device.type == "cuda" else (*self._inner.fetch(start, stop, arena), *state)

    def decode(self, raw: State, start: int, stop: int, arena: Arena) -> torch.Tensor:
        if arena.device.type == "cuda":
            return raw[0][start:stop]
        values = self._inner.decode(raw[:1], start, stop, arena)
        out = arena.get("simulated", stop - start, torch.float32)
        for at in range(0, stop - start, self._chunk_numel):
            half = self._half(values[at : at + self._chunk_numel])
            scb = raw[1][None] if self._transposed else self._largest(half, 1, arena)[:, None]
            tile = out[at : at + half.numel()].view(half.shape).copy_(half)
            tile.mul_((127.0 / scb).masked_fill_(scb == 0, 0)).round_().add_(0)  # integers have no -0
            decode_int8(tile, scb)
        return out

    def _half(self, values: torch.Tensor) -> torch.Tensor:
        """float16 [rows, n_cols]."""
        return as_loaded(values, self._dtype).half().view(-1, self.spec.n_cols)

    def _largest(self, half: torch.Tensor, dim: int, arena: Arena) -> torch.Tensor:
        """float32, the largest magnitudes along a dimension."""
        bits = quantize.magnitudes(half.view(-1), arena).view(half.shape)
        return bits.amax(dim).view(half.dtype).float()

    def _prepared(self, arena: Arena) -> State:
        if arena.device.type == "cuda":
            return self._state.get(lambda: bnb_gpu.int8(self._inner, self._dtype, self._transposed, arena))
        return self._state.get(lambda: self._pass_over(arena)) if self._transposed else ()

    def _pass_over(self, arena: Arena) -> State:
        """The largest of each column, float32 [n_cols]."""
        scb = torch.zeros(self.spec.n_cols)
        for _, piece in pieces(self._inner, whole_rows(PASS_NUMEL, self.spec.n_cols), arena):
            torch.maximum(scb, self._largest(self._half(piece), 0, arena), out=scb)
        return (scb,)
