"""Weights of HF Conv1D, which are (in, out), quantized here as (out, in), as bitsandbytes stores them.

The scales of what is stored run across the tiles, so a pass over the finished weight finds all of them. A
tile has some codes of every stored row.
"""

import math
from collections.abc import Iterator

import torch

from lorafuse.arithmetic.arena import Arena, host_arena
from lorafuse.arithmetic.draws import HalfDraws, TileDraws, TurnedDraws
from lorafuse.arithmetic.four_bit import known_scales
from lorafuse.arithmetic.quantize import TINY, magnitudes
from lorafuse.codecs.bnb4_encoder import FourBitEncoder
from lorafuse.codecs.bnb8_encoder import Int8Encoder
from lorafuse.codecs.encoder import FinishedTile, FinishedTiles, Piece
from lorafuse.codecs.quantizing import OnGrid, QuantizedOnLoad, QuantizingEncoder
from lorafuse.codecs.sources import Raw
from lorafuse.files.tensors import TensorSpec
from lorafuse.settings import BaseQuant


class ByColumns(QuantizingEncoder):
    """What both kinds share. `_spec` is that of what is stored, (out, in)."""

    __slots__ = ()

    def _in_stored_order(self, values: torch.Tensor, name: str, arena: Arena) -> torch.Tensor:
        n_out = self._spec.shape[0]
        turned = arena.get(f"columns.{name}", values.numel(), values.dtype)
        turned.view(n_out, -1).copy_(values.view(-1, n_out).T)
        return turned

    def _in_order(self, values: torch.Tensor, arena: Arena) -> torch.Tensor:
        n_out = self._spec.shape[0]
        turned = arena.get("columns.stored", values.numel(), values.dtype)
        turned.view(-1, n_out).copy_(values.view(n_out, -1).T)
        return turned

    def _drawn(self, tile: FinishedTile, arena: Arena) -> TileDraws:
        if self._draws is None:
            return HalfDraws()
        n_out = self._spec.shape[0]
        return TurnedDraws(self._draws, tile.start, (tile.stop - tile.start) // n_out, n_out, arena)

    def scratch_nbytes(self, n: int) -> int:
        return super().scratch_nbytes(n) + 24 * n  # what is turned, and what is quantized at once

    def _pieces(self, start: int, numel: int, per_byte: int) -> Iterator[Piece]:
        """Of the codes of a tile, of each stored row."""
        n_out, n_in = self._spec.shape
        first, n_rows = start // n_out, numel // n_out
        for row in range(n_out):
            at, nbytes = (row * n_in + first) // per_byte, n_rows // per_byte
            yield Piece(self._name, at, row * nbytes, nbytes)


class FourBitColumnsEncoder(ByColumns, FourBitEncoder):
    """NF4 and FP4. A tile has whole runs of elements that have one scale; their length is even, so that a
    tile has whole bytes."""

    __slots__ = ("_run",)

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        quant: BaseQuant,
        rounding: str | None,
        base: QuantizedOnLoad | None = None,
    ) -> None:
        """`spec`: (in, out), of an even number of rows."""
        super().__init__(name, TensorSpec(spec.dtype, spec.shape[::-1]), quant, rounding, base)
        self._run = self.row_multiple = math.gcd(spec.shape[0], quant.blocksize, 64)
        self.needs_pass = base is None
        self.held_nbytes = 13 * self._n_blocks if base is None else 0

    def tile_nbytes(self, n: int) -> int:
        of_scales = 4 * (self._n_blocks * n // self._spec.numel + 1)
        return n // 2 + of_scales + sum(tensor.nbytes for tensor in self.tensors[2:])

    def _block_of_runs(self, start: int, n_rows: int) -> torch.Tensor:
        """int64 [out, runs of a tile's rows]: the block that each lies in."""
        n_out, n_in = self._spec.shape
        first = start // n_out
        runs = torch.arange(first, first + n_rows, self._run, dtype=torch.int64)
        rows = torch.arange(n_out, dtype=torch.int64)[:, None] * n_in
        return (rows + runs).div_(self._quant.blocksize, rounding_mode="floor")

    def prepare(self, tiles: FinishedTiles) -> None:
        arena, n_out = host_arena(), self._spec.shape[0]
        absmax = torch.zeros(self._n_blocks, dtype=torch.float32)
        for start, values in tiles():
            of_runs = self._in_stored_order(arena.here(values, "values", self._dtype), "values", arena)
            largest = of_runs.view(-1, self._run).abs().amax(1).float()
            block = self._block_of_runs(start, values.numel() // n_out)
            absmax.scatter_reduce_(0, block.view(-1), largest, "amax")
        if self._spec.numel % self._quant.blocksize:
            absmax[-1:].clamp_(min=TINY)
        self._state = known_scales(absmax, double_quant=self._quant.double_quant)

    def _quantized(
        self, values: torch.Tensor, start: int, state: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        absmax, scales, stored_scales, *of_scales = state
        numel = values.numel()
        block = self._block_of_runs(start, numel // self._spec.shape[0]).view(-1)
        packed, run_scales = buffer[: numel // 2], scales[block]
        scaled = arena.get("quantizing.scaled", numel + 1, torch.float32)
        self._scale(scaled[:numel].copy_(values).view(-1, self._run), absmax, block)
        nearest = self._nearest(scaled, numel, packed, arena)
        nearest.view(-1, self._run).mul_(run_scales[:, None])
        decoded = arena.get("quantizing.decoded", numel, self._dtype).copy_(nearest)
        first, last = (self._n_blocks * edge // self._spec.numel for edge in (start, start + numel))
        beside = self._beside(
            first, stored_scales[first:last], tuple(of_scales), buffer[numel // 2 :], once=start == 0
        )
        pieces = [*self._pieces(start, numel, 2)]
        pieces += (piece._replace(start=piece.start + numel // 2) for piece in beside)
        return OnGrid(self._grid(packed, run_scales, self._run), decoded, tuple(pieces))

    def _scale(self, x: torch.Tensor, absmax: torch.Tensor, block: torch.Tensor) -> None:
        """Divides runs (fp32) by the scales of their blocks, in place, as bitsandbytes does: a last block
        that is not whole by a division, the others by a reciprocal."""
        short = (block == self._spec.numel // self._quant.blocksize).nonzero().view(-1)
        divided = x[short] / absmax[-1:]
        x.mul_(absmax.clamp(min=TINY).reciprocal_()[block][:, None])
        x[short] = divided


class Int8ColumnsEncoder(ByColumns, Int8Encoder):
    """LLM.int8. `held_nbytes`: the scales of stored rows."""

    __slots__ = ("held_nbytes", "needs_pass")

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        quant: BaseQuant,
        rounding: str | None,
        base: QuantizedOnLoad | None = None,
    ) -> None:
        """`spec`: (in, out)."""
        super().__init__(name, TensorSpec(spec.dtype, spec.shape[::-1]), quant, rounding, base)
        self.needs_pass, self.held_nbytes = base is None, 4 * spec.shape[1]

    def tile_nbytes(self, n: int) -> int:
        return n + 4 * self._spec.shape[0] + 1

    def prepare(self, tiles: FinishedTiles) -> None:
        arena, n_out = host_arena(), self._spec.shape[0]
        scb = torch.zeros(n_out, dtype=torch.float32)
        for _, values in tiles():
            loaded = arena.here(values, "values", self._dtype)
            bits = magnitudes(arena.here(loaded, "half", torch.float16), arena).view(-1, n_out)
            torch.maximum(scb, bits.amax(0).view(torch.float16).float(), out=scb)
        self._state = (scb,)

    def _quantized(
        self, values: torch.Tensor, start: int, state: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        [scb], numel = state, values.numel()
        half = arena.here(values, "quantizing.half", torch.float16)
        grid, decoded = self._codes(half, scb, buffer, arena)
        pieces = list(self._pieces(start, numel, 1))
        if not start:
            pieces += self._beside(0, scb, buffer, numel)
        return OnGrid(grid, decoded, tuple(pieces))
