"""NF4 and FP4 made anew, in the layout that bnb4.py reads.

The quant_state's length has to be known before the mean of all scales, which stands in it: it is padded with
blanks, which JSON allows.
"""

import json
import math
from collections.abc import Iterator

import numpy as np
import torch

from lorafuse.arithmetic.arena import Arena, host_arena
from lorafuse.arithmetic.dequantize import byte_pairs, look_up
from lorafuse.arithmetic.four_bit import (
    ScalesOfScales,
    double_quantized,
    multiply_blocks,
    nearest_levels,
    scales_of,
)
from lorafuse.arithmetic.quantize import (
    CHUNK_NUMEL,
    NESTED_BLOCKSIZE,
    codes_of_pairs,
    dynamic_map,
    quant_map,
    scale_by_blocks,
)
from lorafuse.codecs.bnb4_grid import FourBitGrid, levels_of
from lorafuse.codecs.bnb4_state import MARKER
from lorafuse.codecs.encoder import FinishedTiles, Piece
from lorafuse.codecs.quantizing import OnGrid, QuantizedOnLoad, QuantizingEncoder, put, stored
from lorafuse.codecs.sources import Raw
from lorafuse.files.tensors import DTYPES, TensorSpec
from lorafuse.settings import BaseQuant

OFFSET_NBYTES = 24  # of the longest text of a number of fp32 in JSON, -1.1754943508222875e-38


class FourBitEncoder(QuantizingEncoder):
    """A tile has whole blocks. `held_nbytes`: the scales of scales."""

    __slots__ = ("_n_blocks", "held_nbytes", "needs_pass", "row_multiple", "tensors")

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        quant: BaseQuant,
        rounding: str | None,
        base: QuantizedOnLoad | None = None,
    ) -> None:
        super().__init__(name, spec, quant, rounding, base)
        self._n_blocks = -(-spec.numel // quant.blocksize)
        self.row_multiple = quant.blocksize // math.gcd(spec.n_cols, quant.blocksize)
        self.needs_pass = quant.double_quant and base is None
        n_nested = -(-self._n_blocks // NESTED_BLOCKSIZE) if quant.double_quant else 0
        self.held_nbytes = 8 * n_nested
        companions = [stored(f"{name}.absmax", "U8" if n_nested else "F32", self._n_blocks)]
        if n_nested:
            companions.append(stored(f"{name}.nested_absmax", "F32", n_nested))
            companions.append(stored(f"{name}.nested_quant_map", "F32", 256))
        self.tensors = (
            stored(name, "U8", -(-spec.numel // 2), 1),
            *companions,
            stored(f"{name}.quant_map", "F32", 16),
            stored(f"{name}{MARKER}{quant.kind}", "U8", len(self._quant_state(0.0))),
        )

    @property
    def _decoded_itemsize(self) -> int:
        return DTYPES[self._spec.dtype][0]

    def _quant_state(self, mean: float) -> bytes:
        """The JSON, in the order in which bitsandbytes writes it."""
        state = {
            "quant_type": self._quant.kind,
            "blocksize": self._quant.blocksize,
            "dtype": self._spec.torch_name,
            "shape": list(self._spec.shape),
        }
        if not self._quant.double_quant:
            return json.dumps(state).encode()
        nested = {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        without = json.dumps(state | nested | {"nested_offset": 0}).encode()
        text = json.dumps(state | nested | {"nested_offset": mean}).encode()
        return text.ljust(-(-(len(without) + OFFSET_NBYTES) // 8) * 8)

    def tile_nbytes(self, n: int) -> int:
        """The first tile has what there is once."""
        n_blocks = -(-n // self._quant.blocksize)
        return -(-n // 2) + 4 * n_blocks + sum(tensor.nbytes for tensor in self.tensors[2:])

    def prepare(self, tiles: FinishedTiles) -> None:
        arena, scales = host_arena(), ScalesOfScales(self._n_blocks)
        for _, values in tiles():
            scales.add(scales_of(values, self._quant.blocksize, self._dtype, arena).numpy())
        self._state = scales.result()

    def _quantized(
        self, values: torch.Tensor, start: int, state: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        first, absmax = (
            start // self._quant.blocksize,
            scales_of(values, self._quant.blocksize, self._dtype, arena),
        )
        stored_scales, scales = double_quantized(absmax, first, *state) if state else (absmax, absmax)
        packed = buffer[: -(-values.numel() // 2)]
        decoded = self._codes(values, absmax, scales, packed, arena)
        codes = Piece(self._name, start // 2, 0, packed.numel())
        beside = self._beside(first, stored_scales, state, buffer[packed.numel() :], once=start == 0)
        pieces = (codes, *(piece._replace(start=piece.start + packed.numel()) for piece in beside))
        return OnGrid(self._grid(packed, scales, self._quant.blocksize), decoded, pieces)

    def _grid(self, packed: torch.Tensor, scales: torch.Tensor, run: int) -> FourBitGrid:
        levels = levels_of(quant_map(self._quant.kind).numpy().tobytes(), self._dtype)
        return FourBitGrid(packed, scales, levels, run, 0)

    def _beside(
        self, first: int, scales: torch.Tensor, state: Raw, buffer: torch.Tensor, *, once: bool
    ) -> Iterator[Piece]:
        """Puts into the buffer what is beside the codes of a tile: stored scales from block `first` on, and,
        in the first tile, what there is once."""
        parts = [(f"{self._name}.absmax", first * scales.itemsize, scales)]
        if once:
            mean = 0.0
            if state:
                parts.append((f"{self._name}.nested_absmax", 0, state[0]))
                parts.append((f"{self._name}.nested_quant_map", 0, dynamic_map()))
                mean = state[1].item()
            text = torch.frombuffer(bytearray(self._quant_state(mean)), dtype=torch.uint8)
            parts.append((f"{self._name}.quant_map", 0, quant_map(self._quant.kind)))
            parts.append((self.tensors[-1].name, 0, text))
        at = 0
        for name, offset, tensor in parts:
            end = put(buffer, at, tensor)
            yield Piece(name, offset, at, end - at)
            at = end

    def _codes(
        self,
        values: torch.Tensor,
        absmax: torch.Tensor,
        scales: torch.Tensor,
        packed: torch.Tensor,
        arena: Arena,
    ) -> torch.Tensor:
        """Fills `packed` with the nearest codes, given the scale of each block, and what a reader gets for
        it. Returns what a reader decodes."""
        blocksize = self._quant.blocksize
        decoded = arena.get("quantizing.decoded", values.numel(), self._dtype)
        for at in range(0, values.numel(), CHUNK_NUMEL):
            chunk, block = values[at : at + CHUNK_NUMEL], at // blocksize
            scaled = arena.get("quantizing.scaled", chunk.numel() + 1, torch.float32)
            scale_by_blocks(scaled[: chunk.numel()].copy_(chunk), absmax[block:], blocksize)
            nearest = self._nearest(scaled, chunk.numel(), packed[at // 2 :], arena)
            multiply_blocks(nearest, scales[block:], blocksize)
            decoded[at : at + chunk.numel()].copy_(nearest)
        return decoded

    def _nearest(self, scaled: torch.Tensor, numel: int, packed: torch.Tensor, arena: Arena) -> torch.Tensor:
        """Fills `packed` with the codes of the levels nearest to `scaled`, which has room for an element
        more. Returns these levels, fp32 [numel]."""
        kind = self._quant.kind
        places = nearest_levels(scaled, numel, kind, arena)
        part = packed[: places.numel()]
        np.take(codes_of_pairs(kind), places.numpy(), out=part.numpy())
        nearest = arena.get("quantizing.nearest", 2 * places.numel(), torch.float32)
        look_up(part, byte_pairs(quant_map(kind)), nearest, arena)
        return nearest[:numel]
