"""NF4 and FP4 of a full-precision weight, quantized and dequantized as training saw it: on the host, a tile
at a time.

The blocks of a tile are read whole, so their scales are the tile's own. Two things take a pass over the whole
weight beforehand: the statistics of double quantization, and the scales of a transposed weight, whose blocks
run across the tiles.
"""

from collections.abc import Iterator

import torch

from lorafuse.arithmetic import quantize
from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.dequantize import byte_pairs, look_up
from lorafuse.arithmetic.four_bit import (
    ScalesOfScales,
    double_quantized,
    known_scales,
    multiply_blocks,
    nearest_levels,
    scales_of,
)
from lorafuse.arithmetic.quantize import CHUNK_NBYTES_PER_ELEMENT, CHUNK_NUMEL, NESTED_BLOCKSIZE
from lorafuse.codecs.held import ComputedOnce
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.files.tensors import SAFETENSORS_NAMES, Box, TensorSpec
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.passes import PASS_NUMEL, as_loaded, pieces


class FourBit(Sources):
    """NF4 or FP4 of the full-precision weight `dense`, of a model loaded in `dtype`."""

    def __init__(self, dense: Sources, quant: BaseQuant, dtype: torch.dtype, *, transposed: bool) -> None:
        self._dense, self._quant, self._dtype, self._transposed = dense, quant, dtype, transposed
        self.spec = TensorSpec(SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")], dense.spec.shape)
        self.out_dtype = self.spec.dtype
        self.names, self.store, self.scheme = dense.names, dense.store, dense.scheme
        self._n_blocks = -(-self.spec.numel // quant.blocksize)
        self._levels = byte_pairs(quantize.levels(quant.kind))
        self._state = ComputedOnce()
        self.nbytes = CHUNK_NUMEL * CHUNK_NBYTES_PER_ELEMENT
        self.held_nbytes = 8 * self._n_blocks if transposed else 8 * -(-self._n_blocks // NESTED_BLOCKSIZE)

    def prepare(self, arena: Arena) -> None:
        self._state.get(lambda: self._pass_over(arena))

    def release(self) -> None:
        self._state.drop()

    def will_need(self, box: Box) -> None:
        self._dense.will_need(self._blocks_around(box))

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """The elements of the blocks that the box touches, and what the pass over the weight found."""
        state = self._state.get(lambda: self._pass_over(arena))
        return (*self._dense.fetch(self._blocks_around(box), arena), *state)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        blocks = self._blocks_around(box)
        (start, stop), first = box.run, blocks.run[0]
        values = self._dense.decode(raw[:1], blocks, arena)
        out = arena.get("simulated", blocks.numel, self._dtype)
        if self._transposed:
            quantized = self._transposed_chunks(values, first, raw[1:], arena)
        else:
            quantized = self._chunks(values, first, raw[1:], arena)
        for at, chunk in quantized:
            out[at : at + chunk.numel()].copy_(chunk)
        return out[start - first : stop - first]

    def loaded(self, raw: Raw, box: Box, arena: Arena) -> Raw:
        """The elements of a box of whole blocks before they are quantized, and what the pass over the weight
        found."""
        values = arena.here(self._dense.decode(raw[:1], box, arena), "simulated.loaded", self._dtype)
        return values, *raw[1:]

    def _blocks_around(self, box: Box) -> Box:
        """Whole blocks around the box; a transposed weight's scales are known."""
        if self._transposed:
            return box
        (start, stop), blocksize = box.run, self._quant.blocksize
        end = min(-(-stop // blocksize) * blocksize, self.spec.numel)
        return Box.of_run(self.spec, start // blocksize * blocksize, end)

    def _pass_over(self, arena: Arena) -> Raw:
        if self._transposed:
            absmax = self._transposed_absmax(arena)
            return known_scales(absmax, double_quant=self._quant.double_quant)
        if not self._quant.double_quant:
            return ()
        scales = ScalesOfScales(self._n_blocks)
        for _, piece in pieces(self._dense, PASS_NUMEL, arena):
            scales.add(self._absmax(piece, arena).numpy())
        return scales.result()

    def _absmax(self, values: torch.Tensor, arena: Arena) -> torch.Tensor:
        """float32, the scale of each block of `values`."""
        return scales_of(values, self._quant.blocksize, self._dtype, arena)

    def _chunks(
        self, values: torch.Tensor, first: int, state: Raw, arena: Arena
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(position, fp32) of each chunk of whole blocks, from element `first` on, quantized and
        dequantized."""
        blocksize = self._quant.blocksize
        absmax = self._absmax(values, arena)
        scales = double_quantized(absmax, first // blocksize, *state)[1] if state else absmax
        for at in range(0, values.numel(), CHUNK_NUMEL):
            chunk = as_loaded(values[at : at + CHUNK_NUMEL], self._dtype)
            scaled = arena.get("simulated.scaled", chunk.numel() + 1, torch.float32)
            block = at // blocksize
            quantize.scale_by_blocks(scaled[: chunk.numel()].copy_(chunk), absmax[block:], blocksize)
            nearest = self._nearest(scaled, chunk.numel(), arena)
            multiply_blocks(nearest, scales[block:], blocksize)
            yield at, nearest

    def _nearest(self, scaled: torch.Tensor, numel: int, arena: Arena) -> torch.Tensor:
        """float32 [numel]: the level of each element; `scaled` has room for one more."""
        packed = nearest_levels(scaled, numel, self._quant.kind, arena)
        values = arena.get("simulated.values", 2 * packed.numel(), torch.float32)
        look_up(packed, self._levels, values, arena)
        return values[:numel]

    def _blocks_of(self, start: int, numel: int) -> torch.Tensor:
        """int64 [numel]: the blocks of a transposed weight's elements. It is stored (in, out) and quantized
        (out, in)."""
        n_in, n_out = self.spec.shape
        row, col = (
            torch.arange(start, start + numel).div(n_out, rounding_mode="floor"),
            torch.arange(start, start + numel) % n_out,
        )
        return (col * n_in + row).div_(self._quant.blocksize, rounding_mode="floor")

    def _transposed_absmax(self, arena: Arena) -> torch.Tensor:
        """float32 [blocks]."""
        absmax = torch.zeros(self._n_blocks, dtype=torch.float32)
        for start, piece in pieces(self._dense, CHUNK_NUMEL, arena):
            values = as_loaded(piece, self._dtype).abs().float()
            absmax.scatter_reduce_(0, self._blocks_of(start, piece.numel()), values, "amax")
        if self.spec.numel % self._quant.blocksize:
            absmax[-1:].clamp_(min=quantize.TINY)
        return absmax

    def _transposed_chunks(
        self, values: torch.Tensor, first: int, state: Raw, arena: Arena
    ) -> Iterator[tuple[int, torch.Tensor]]:
        absmax, scales, *_ = state
        reciprocals = absmax.clamp(min=quantize.TINY).reciprocal_()
        for at in range(0, values.numel(), CHUNK_NUMEL):
            chunk = as_loaded(values[at : at + CHUNK_NUMEL], self._dtype)
            block = self._blocks_of(first + at, chunk.numel())
            scaled = arena.get("simulated.scaled", chunk.numel() + 1, torch.float32)
            x = scaled[: chunk.numel()].copy_(chunk)
            short = (
                block == self.spec.numel // self._quant.blocksize
            )  # a last block that is not whole divides
            divided = x[short] / absmax[-1]
            x.mul_(reciprocals[block])
            x[short] = divided
            yield at, self._nearest(scaled, chunk.numel(), arena).mul_(scales[block])
