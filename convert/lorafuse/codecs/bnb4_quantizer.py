"""NF4 and FP4 made anew, in the layout that bnb4.py reads.

The quant_state's length has to be known before the mean of all scales, which stands in it: it is padded with
blanks, which JSON allows.
"""

import json
import math
from collections.abc import Iterator

import numpy as np
import torch

from lorafuse.arithmetic.arena import Arena, host_arena, put
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
from lorafuse.codecs.quantizing import OnGrid, Quantizer, stored
from lorafuse.codecs.sources import Raw
from lorafuse.files.tensors import TensorSpec
from lorafuse.settings import BaseQuant

OFFSET_NBYTES = 24  # of the longest text of a number of fp32 in JSON, -1.1754943508222875e-38


class FourBitLayout:
    """The stored tensors of a weight `name` with `spec` (out, in), and how codes and what is beside them get
    into these."""

    __slots__ = ("_name", "_quant", "_spec", "n_blocks", "tensors")

    def __init__(self, name: str, spec: TensorSpec, quant: BaseQuant) -> None:
        self._name, self._spec, self._quant = name, spec, quant
        self.n_blocks = -(-spec.numel // quant.blocksize)
        companions = [stored(f"{name}.absmax", "U8" if quant.double_quant else "F32", self.n_blocks)]
        if quant.double_quant:
            companions.append(stored(f"{name}.nested_absmax", "F32", -(-self.n_blocks // NESTED_BLOCKSIZE)))
            companions.append(stored(f"{name}.nested_quant_map", "F32", 256))
        self.tensors = (
            stored(name, "U8", -(-spec.numel // 2), 1),
            *companions,
            stored(f"{name}.quant_map", "F32", 16),
            stored(f"{name}{MARKER}{quant.kind}", "U8", len(self._quant_state(0.0))),
        )

    @property
    def once_nbytes(self) -> int:
        """Of what the first tile has beside its codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors[2:])

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

    def grid(self, packed: torch.Tensor, scales: torch.Tensor, run: int) -> FourBitGrid:
        levels, dtype = quant_map(self._quant.kind), getattr(torch, self._spec.torch_name)
        return FourBitGrid(packed, scales, levels_of(levels.numpy().tobytes(), dtype), run, 0)

    def beside(
        self, first: int, scales: torch.Tensor, found: Raw, buffer: torch.Tensor, at: int, *, once: bool
    ) -> Iterator[Piece]:
        """Puts into the buffer, from byte `at` on, what is beside the codes of a tile: stored scales from
        block `first` on, and, in the first tile, what there is once, of what was `found` of the weight."""
        parts = [(f"{self._name}.absmax", first * scales.itemsize, scales)]
        if once:
            mean = 0.0
            if found:
                parts.append((f"{self._name}.nested_absmax", 0, found[0]))
                parts.append((f"{self._name}.nested_quant_map", 0, dynamic_map()))
                mean = found[1].item()
            text = torch.frombuffer(bytearray(self._quant_state(mean)), dtype=torch.uint8)
            parts.append((f"{self._name}.quant_map", 0, quant_map(self._quant.kind)))
            parts.append((self.tensors[-1].name, 0, text))
        for name, offset, tensor in parts:
            end = put(buffer, at, tensor)
            yield Piece(name, offset, at, end - at)
            at = end

    def nearest(self, scaled: torch.Tensor, numel: int, packed: torch.Tensor, arena: Arena) -> torch.Tensor:
        """Fills `packed` with the codes of the levels nearest to `scaled`, which has room for an element
        more. Returns these levels, fp32 [numel]."""
        kind = self._quant.kind
        places = nearest_levels(scaled, numel, kind, arena)
        part = packed[: places.numel()]
        np.take(codes_of_pairs(kind), places.numpy(), out=part.numpy())
        nearest = arena.get("quantizing.nearest", 2 * places.numel(), torch.float32)
        look_up(part, byte_pairs(quant_map(kind)), nearest, arena)
        return nearest[:numel]


class FourBitRows(Quantizer):
    """NF4 or FP4 of a weight (out, in). A tile has whole blocks. `held_nbytes`: the scales of scales."""

    __slots__ = (
        "_dtype", "_layout", "_name", "held_nbytes", "needs_pass", "quant", "row_multiple", "spec", "tensors",
    )  # fmt: skip

    def __init__(self, name: str, spec: TensorSpec, quant: BaseQuant) -> None:
        self._layout = FourBitLayout(name, spec, quant)
        self._name, self.spec, self.quant, self.tensors = name, spec, quant, self._layout.tensors
        self._dtype: torch.dtype = getattr(torch, spec.torch_name)
        self.row_multiple = quant.blocksize // math.gcd(spec.n_cols, quant.blocksize)
        self.needs_pass = quant.double_quant
        self.held_nbytes = 8 * -(-self._layout.n_blocks // NESTED_BLOCKSIZE)

    @property
    def decoded_itemsize(self) -> int:  # type: ignore[override]
        return self._dtype.itemsize

    def tile_nbytes(self, n: int) -> int:
        return -(-n // 2) + 4 * -(-n // self.quant.blocksize) + self._layout.once_nbytes

    def pass_over(self, tiles: FinishedTiles) -> Raw:
        arena, scales = host_arena(), ScalesOfScales(self._layout.n_blocks)
        for _, values in tiles():
            scales.add(scales_of(values, self.quant.blocksize, self._dtype, arena).numpy())
        return scales.result()

    def quantize(
        self, values: torch.Tensor, start: int, found: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        first = start // self.quant.blocksize
        absmax = scales_of(values, self.quant.blocksize, self._dtype, arena)
        stored_scales, scales = double_quantized(absmax, first, *found) if found else (absmax, absmax)
        packed = buffer[: -(-values.numel() // 2)]
        decoded = self._codes(values, absmax, scales, packed, arena)
        codes = Piece(self._name, start // 2, 0, packed.numel())
        beside = self._layout.beside(first, stored_scales, found, buffer, packed.numel(), once=start == 0)
        return OnGrid(self._layout.grid(packed, scales, self.quant.blocksize), decoded, (codes, *beside))

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
        blocksize = self.quant.blocksize
        decoded = arena.get("quantizing.decoded", values.numel(), self._dtype)
        for at in range(0, values.numel(), CHUNK_NUMEL):
            chunk, block = values[at : at + CHUNK_NUMEL], at // blocksize
            scaled = arena.get("quantizing.scaled", chunk.numel() + 1, torch.float32)
            scale_by_blocks(scaled[: chunk.numel()].copy_(chunk), absmax[block:], blocksize)
            nearest = self._layout.nearest(scaled, chunk.numel(), packed[at // 2 :], arena)
            multiply_blocks(nearest, scales[block:], blocksize)
            decoded[at : at + chunk.numel()].copy_(nearest)
        return decoded
