"""Weights of HF Conv1D, which are (in, out), quantized here as (out, in), as bitsandbytes stores them.

The scales of what is stored run across the tiles, so a pass over the finished weight finds all of them. A
tile has some codes of every stored row.
"""

import math
from collections.abc import Iterator

import torch

from lorafuse.arithmetic.arena import Arena, host_arena
from lorafuse.arithmetic.four_bit import known_scales
from lorafuse.arithmetic.quantize import TINY, magnitudes
from lorafuse.codecs.bnb4_quantizer import FourBitLayout
from lorafuse.codecs.bnb8_quantizer import Int8Layout
from lorafuse.codecs.encoder import FinishedTiles, Piece
from lorafuse.codecs.quantizing import OnGrid, Quantizer
from lorafuse.codecs.sources import Raw
from lorafuse.files.tensors import TensorSpec
from lorafuse.settings import BaseQuant


def _codes(name: str, spec: TensorSpec, start: int, numel: int, per_byte: int) -> Iterator[Piece]:
    """Where the codes of a tile belong: some of each stored row."""
    n_out, n_in = spec.shape
    first, n_rows = start // n_out, numel // n_out
    for row in range(n_out):
        at, nbytes = (row * n_in + first) // per_byte, n_rows // per_byte
        yield Piece(name, at, row * nbytes, nbytes)


class FourBitColumns(Quantizer):
    """NF4 and FP4. A tile has whole runs of elements that have one scale; their length is even, so that a
    tile has whole bytes. `held_nbytes`: all scales."""

    __slots__ = (
        "_dtype", "_layout", "_name", "_run", "held_nbytes", "quant", "row_multiple", "spec", "tensors",
    )  # fmt: skip

    needs_pass = True
    by_columns = True

    def __init__(self, name: str, spec: TensorSpec, quant: BaseQuant) -> None:
        """`spec`: (in, out), of an even number of rows."""
        self.spec = TensorSpec(spec.dtype, spec.shape[::-1])
        self._layout = FourBitLayout(name, self.spec, quant)
        self._name, self.quant, self.tensors = name, quant, self._layout.tensors
        self._dtype: torch.dtype = getattr(torch, spec.torch_name)
        self._run = self.row_multiple = math.gcd(spec.shape[0], quant.blocksize, 64)
        self.held_nbytes = 13 * self._layout.n_blocks

    @property
    def decoded_itemsize(self) -> int:  # type: ignore[override]
        return self._dtype.itemsize

    def tile_nbytes(self, n: int) -> int:
        of_scales = 4 * (self._layout.n_blocks * n // self.spec.numel + 1)
        return n // 2 + of_scales + self._layout.once_nbytes

    def scratch_nbytes(self, n: int) -> int:
        return 12 * n + 20 * n // self._run  # scaled, levels, flags and places; of runs, blocks and scales

    def _block_of_runs(self, start: int, n_rows: int) -> torch.Tensor:
        """int64 [out, runs of a tile's rows]: the block that each lies in."""
        n_out, n_in = self.spec.shape
        first = start // n_out
        runs = torch.arange(first, first + n_rows, self._run, dtype=torch.int64)
        rows = torch.arange(n_out, dtype=torch.int64)[:, None] * n_in
        return (rows + runs).div_(self.quant.blocksize, rounding_mode="floor")

    def pass_over(self, tiles: FinishedTiles) -> Raw:
        arena, n_out = host_arena(), self.spec.shape[0]
        absmax = torch.zeros(self._layout.n_blocks, dtype=torch.float32)
        for start, values in tiles():
            sizes = arena.here(values, "columns.values", self._dtype).view(-1, self._run, n_out).abs()
            largest = sizes.amax(1).T.float().reshape(-1)
            block = self._block_of_runs(start, values.numel() // n_out)
            absmax.scatter_reduce_(0, block.view(-1), largest, "amax")
        if self.spec.numel % self.quant.blocksize:
            absmax[-1:].clamp_(min=TINY)
        return known_scales(absmax, double_quant=self.quant.double_quant)

    def quantize(
        self, values: torch.Tensor, start: int, found: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        absmax, scales, stored_scales, *of_scales = found
        numel, layout = values.numel(), self._layout
        block = self._block_of_runs(start, numel // self.spec.shape[0]).view(-1)
        packed, run_scales = buffer[: numel // 2], scales[block]
        scaled = arena.get("quantizing.scaled", numel + 1, torch.float32)
        self._scale(scaled[:numel].copy_(values).view(-1, self._run), absmax, block)
        nearest = layout.nearest(scaled, numel, packed, arena)
        nearest.view(-1, self._run).mul_(run_scales[:, None])
        decoded = arena.get("quantizing.decoded", numel, self._dtype).copy_(nearest)
        first, last = (layout.n_blocks * edge // self.spec.numel for edge in (start, start + numel))
        beside = layout.beside(
            first, stored_scales[first:last], tuple(of_scales), buffer, numel // 2, once=start == 0
        )
        pieces = (*_codes(self._name, self.spec, start, numel, 2), *beside)
        return OnGrid(layout.grid(packed, run_scales, self._run), decoded, pieces)

    def _scale(self, x: torch.Tensor, absmax: torch.Tensor, block: torch.Tensor) -> None:
        """Divides runs (fp32) by the scales of their blocks, in place, as bitsandbytes does: a last block
        that is not whole by a division, the others by a reciprocal."""
        short = (block == self.spec.numel // self.quant.blocksize).nonzero().view(-1)
        divided = x[short] / absmax[-1:]
        x.mul_(absmax.clamp(min=TINY).reciprocal_()[block][:, None])
        x[short] = divided


class Int8Columns(Quantizer):
    """LLM.int8. `held_nbytes`: the scales of stored rows."""

    __slots__ = ("_dtype", "_layout", "_name", "held_nbytes", "quant", "spec", "tensors")

    needs_pass = True
    by_columns = True
    decoded_itemsize = 4

    def __init__(self, name: str, spec: TensorSpec, quant: BaseQuant) -> None:
        """`spec`: (in, out)."""
        self.spec = TensorSpec(spec.dtype, spec.shape[::-1])
        self._layout = Int8Layout(name, self.spec.shape)
        self._name, self.quant, self.tensors = name, quant, self._layout.tensors
        self._dtype: torch.dtype = getattr(torch, spec.torch_name)
        self.held_nbytes = 4 * spec.shape[1]

    def tile_nbytes(self, n: int) -> int:
        return n + 4 * self.spec.shape[0] + 1

    def scratch_nbytes(self, n: int) -> int:
        return 4 * n  # fp16, and its bits

    def pass_over(self, tiles: FinishedTiles) -> Raw:
        arena, n_out = host_arena(), self.spec.shape[0]
        scb = torch.zeros(n_out, dtype=torch.float32)
        for _, values in tiles():
            loaded = arena.here(values, "columns.values", self._dtype)
            bits = magnitudes(arena.here(loaded, "columns.half", torch.float16), arena).view(-1, n_out)
            torch.maximum(scb, bits.amax(0).view(torch.float16).float(), out=scb)
        return (scb,)

    def quantize(
        self, values: torch.Tensor, start: int, found: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        [scb], numel = found, values.numel()
        half = arena.here(values, "quantizing.half", torch.float16)
        grid, decoded = self._layout.codes(half, scb, buffer, arena)
        beside = () if start else self._layout.beside(0, scb, buffer, numel)
        return OnGrid(grid, decoded, (*_codes(self._name, self.spec, start, numel, 1), *beside))
