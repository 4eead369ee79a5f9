"""bitsandbytes 4-bit: NF4 and FP4, single and double quantization, any block size, any storage dtype.

For a weight X of n elements in blocks of `blocksize`: `X` holds ceil(n/2) bytes, two codes each, high nibble
first, viewed as any dtype; `X.absmax` one scale per block, fp32, or uint8 when double-quantized, then with
`X.nested_absmax` (fp32, one per `nested_blocksize` scales) and `X.nested_quant_map` (fp32 [256]);
`X.quant_map` the 16 values; and `X.quant_state.bitsandbytes__nf4` (or fp4) a JSON with shape, dtype, block
sizes and nested_offset. The format is that of bitsandbytes 0.50 functional.py, QuantState.as_dict;
dequantize.py has the formula.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.dequantize import byte_pairs, decode_four_bit, look_up, nested_absmax, nested_scales
from lorafuse.arithmetic.draws import Draws, of_run
from lorafuse.arithmetic.on_grid import round_tile
from lorafuse.codecs.bnb4_grid import FourBitGrid, Levels, levels_of
from lorafuse.codecs.bnb4_state import MARKER, QuantState, check_companions, read_state
from lorafuse.codecs.conv1d import RecodedByColumns, Transposed, is_conv1d
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.held import read_runs
from lorafuse.codecs.own_grid import GridSources, Recoded
from lorafuse.codecs.sources import Claims, Raw, Scheme, Sources
from lorafuse.codecs.strips import Run
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import Box, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("bitsandbytes",)
COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
WORDS = {"nf4": "NF4", "fp4": "FP4"}


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {X: (X, its quant_state, and those of its companions that are stored)}."""
    claims = {}
    for state in stored:
        weight, marker, _ = state.partition(MARKER)
        if marker and weight in stored:
            claims[weight] = (weight, state, *(weight + c for c in COMPANIONS if weight + c in stored))
    return Claims(claims)


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns what the names tell: the kind, and whether the scales are quantized too."""
    return _scheme(names)


def _scheme(names: tuple[str, ...], blocksize: int = 0) -> Scheme:
    _, _, kind = names[1].partition(MARKER)
    double_quant = any(name.endswith(COMPANIONS[2]) for name in names)
    return Scheme(kind, double_quant, blocksize, words=WORDS.get(kind, kind), bits=4, codes_per_byte=2)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a 4-bit weight. Raises CheckpointError where its quant_state or a companion is
    broken or missing."""
    try:
        state = read_state(names[1], ckpt)
        check_companions(weight, state, ckpt)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: the quant_state of {shown(weight)} is broken: {shown(e)}."
        ) from None
    sources = FourBitSources(weight, names, state, ckpt)
    return Transposed(sources) if is_conv1d(ckpt.config, weight) and len(state.shape) == 2 else sources


# All weights of a checkpoint have the same tables, as a rule: thousands of experts share one.
@cache
def _floats(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


@cache
def _pairs(quant_map: bytes) -> torch.Tensor:
    return byte_pairs(_floats(quant_map))


class FourBitSources(RecodedByColumns, GridSources):
    """The packed codes and scales of one weight, as they are stored."""

    def __init__(self, weight: str, names: tuple[str, ...], state: QuantState, ckpt: Checkpoint) -> None:
        self.store, self.names, self._weight, self._state = ckpt, names, weight, state
        self.spec = TensorSpec(state.dtype, state.shape)
        self.out_dtype = state.dtype
        self.scheme = _scheme(names, state.blocksize)
        self.column_multiple = min(state.blocksize, 64)  # even: a window begins with a whole byte
        self.grid_rows = 1 + self.spec.n_cols % 2
        # An odd width has codes of one byte in two rows: its transpose cannot be written in parts.
        self.column_run = 0 if self.spec.n_cols % 2 else math.gcd(self.spec.n_cols, state.blocksize, 64)
        self._n_blocks = -(-self.spec.numel // state.blocksize)
        self._quant_map = bytes(read_all(ckpt, weight + ".quant_map"))
        self._pairs = _pairs(self._quant_map)
        self._nested_map = (
            _floats(bytes(read_all(ckpt, weight + ".nested_quant_map"))) if state.nested_blocksize else None
        )

    def _blocks(self, box: Box) -> tuple[int, int]:
        """[first, last): those that the box touches."""
        start, stop = box.run
        return start // self._state.blocksize, -(-stop // self._state.blocksize)

    def will_need(self, box: Box) -> None:
        first, last = self._blocks(box)
        half = self._state.blocksize // 2
        nbytes = self.store.tensors[self._weight].spec.nbytes
        self.store.will_need(self._weight, first * half, min(last * half, nbytes) - first * half)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """Packed codes, absmax, and with double quantization nested_absmax, of the blocks that the box
        touches."""
        state = self._state
        first, last = self._blocks(box)
        half = state.blocksize // 2
        end = min(last * half, -(-self.spec.numel // 2))
        packed = arena.fetch("bnb4.packed", self.store, self._weight, first * half, end - first * half)
        if not state.nested_blocksize:
            absmax = arena.fetch(
                "bnb4.absmax", self.store, self._weight + ".absmax", first * 4, (last - first) * 4
            )
            return packed, absmax.view(torch.float32)
        # Whole nested blocks: a tile may start inside one.
        outer, outer_end = first // state.nested_blocksize, -(-last // state.nested_blocksize)
        begin, end = outer * state.nested_blocksize, min(outer_end * state.nested_blocksize, self._n_blocks)
        codes = arena.fetch("bnb4.absmax", self.store, self._weight + ".absmax", begin, end - begin)
        nested = arena.fetch(
            "bnb4.nested", self.store, self._weight + ".nested_absmax", outer * 4, (outer_end - outer) * 4
        )
        return packed, codes, nested.view(torch.float32)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        values, _ = self.decode_and_keep(raw, box, arena)
        return values

    def decode_and_keep(self, raw: Raw, box: Box, arena: Arena) -> tuple[torch.Tensor, Raw]:
        """With the scales of the blocks, float32, in place of what they are made of."""
        packed = arena.place(raw[0])
        start, stop = box.run
        first, last = self._blocks(box)
        absmax = self._absmax(raw, first, last, arena)
        skip, dtype = start - first * self._state.blocksize, getattr(torch, self.spec.torch_name)
        quant_map, blocksize = _floats(self._quant_map), self._state.blocksize
        values = decode_four_bit(
            packed, quant_map, self._pairs, absmax, blocksize, skip, stop - start, dtype, arena
        )
        return values, (raw[0], absmax)

    def _absmax(self, raw: Raw, first: int, last: int, arena: Arena) -> torch.Tensor:
        """float32 [last - first], the scale of each block, on the arena's device."""
        state = self._state
        if self._nested_map is None or len(raw) == 2:
            return raw[1] if raw[1].device == arena.device else arena.place(raw[1])
        codes, nested = arena.place(raw[1]), arena.place(raw[2])
        nested_map = arena.table(self._nested_map)
        blocksize, skip = state.nested_blocksize, first % state.nested_blocksize
        offset, n = state.nested_offset, last - first
        return nested_scales(codes, nested_map, nested, blocksize, offset, skip, n, arena)

    def codes_nbytes(self, n: int) -> int:
        return -(-n // 2)

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        first, last = self._blocks(tile.box)
        skip, nbytes = tile.start - first * self._state.blocksize, self.codes_nbytes(tile.stop - tile.start)
        codes = buffer[:nbytes]
        before = arena.place(tile.raw[0][skip // 2 : skip // 2 + nbytes])
        packed = arena.beside(codes, "bnb4.recoded")
        scales = self._absmax(tile.raw, first, last, arena)
        grid = FourBitGrid(packed, scales, self._levels(arena), self._state.blocksize, skip, before)
        drawn = of_run(draws, tile.start)
        rounded = round_tile(grid, tile.base, tile.values, drawn, arena, measured=True)
        arena.bring_back(packed, codes)
        return Recoded((Run(tile.start // 2, 0, nbytes),), *rounded)

    def grid_of(
        self, codes: torch.Tensor, scales: torch.Tensor, run: int, skip: int, arena: Arena
    ) -> FourBitGrid:
        return FourBitGrid(codes, scales, self._levels(arena), run, skip)

    def _levels(self, arena: Arena) -> Levels:
        return levels_of(self._quant_map, getattr(torch, self.spec.torch_name)).on(arena)

    def codes_of_columns(
        self, raw: Raw, window: range, cols: range, arena: Arena
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = raw[0][:, (cols.start - window.start) // 2 : (cols.stop - window.start) // 2].contiguous()
        # Of each run, the block among those of its row that are in the window.
        first = torch.arange(self.spec.shape[0], dtype=torch.int64)[:, None] * self.spec.shape[1]
        runs = torch.arange(cols.start, cols.stop, self.column_run, dtype=torch.int64)
        block_of, before = (
            (first + at).div_(self._state.blocksize, rounding_mode="floor") for at in (runs, window.start)
        )
        return arena.place(codes), arena.place(raw[1].gather(1, block_of - before))

    def _blocks_of_columns(self, n_cols: int) -> int:
        """At most so many blocks are touched by the same columns of a row."""
        blocksize = self._state.blocksize
        straddling = self.spec.shape[1] % blocksize or self.column_multiple % blocksize
        return -(-n_cols // blocksize) + (1 if straddling else 0)

    def columns_nbytes(self, n_cols: int) -> int:
        return self.spec.shape[0] * (n_cols // 2 + 1 + 4 * self._blocks_of_columns(n_cols))

    def fetch_columns(self, cols: range) -> Raw:
        """Packed codes, uint8 [rows, bytes that the columns touch], and scales, float32 [rows, blocks]."""
        n_rows, width = self.spec.shape
        firsts = [row * width + cols.start for row in range(n_rows)]
        nbytes = -(-len(cols) // 2) + width % 2  # with an odd width, every other row starts inside a byte
        packed = read_runs(self.store, self._weight, [first // 2 for first in firsts], nbytes)
        blocks = [first // self._state.blocksize for first in firsts]
        n_blocks = self._blocks_of_columns(len(cols))
        if self._nested_map is None:
            absmax = read_runs(self.store, self._weight + ".absmax", [4 * b for b in blocks], 4 * n_blocks)
            return packed, absmax.view(torch.float32)
        codes = read_runs(self.store, self._weight + ".absmax", blocks, n_blocks)
        nested = torch.frombuffer(read_all(self.store, self._weight + ".nested_absmax"), dtype=torch.float32)
        outer = (torch.tensor(blocks, dtype=torch.int64)[:, None] + torch.arange(n_blocks)).div_(
            self._state.nested_blocksize, rounding_mode="floor"
        )
        scales = nested[outer.clamp_(max=len(nested) - 1).view(-1)]
        scales = nested_absmax(codes.view(-1), self._nested_map, scales, self._state.nested_offset)
        return packed, scales.view(n_rows, n_blocks)

    def decode_columns(self, raw: Raw, window: range, box: Box, arena: Arena) -> torch.Tensor:
        width, numel = self.spec.shape[1], box.numel
        packed = raw[0][box.rows.start : box.rows.stop]
        values = arena.get("bnb4.columns", numel, torch.float32).view(len(box.rows), len(box.cols))
        period = 1 + width % 2  # rows of one phase start at the same place in a byte
        for phase in range(min(period, len(box.rows))):
            shift = ((box.rows.start + phase) * width + window.start) % 2
            start, stop = (at - window.start + shift for at in (box.cols.start, box.cols.stop))
            codes = arena.place(packed[phase::period, start // 2 : -(-stop // 2)].contiguous())
            pairs = arena.get("bnb4.pairs", 2 * codes.numel(), torch.float32)
            look_up(codes.view(-1), self._pairs, pairs, arena)
            values[phase::period] = pairs.view(len(codes), -1)[:, start % 2 : start % 2 + len(box.cols)]
        self._scale_columns(values, raw[1], window, box, arena)
        return values

    def _scale_columns(
        self, values: torch.Tensor, absmax: torch.Tensor, window: range, box: Box, arena: Arena
    ) -> None:
        """Multiplies each value of the box, in place, by the scale of its block, of those of a window."""
        width, blocksize = self.spec.shape[1], self._state.blocksize
        absmax = arena.place(absmax[box.rows.start : box.rows.stop])
        if width % blocksize == 0:  # all rows are cut into blocks at the same columns
            first = window.start // blocksize
            for block in range(box.cols.start // blocksize, -(-box.cols.stop // blocksize)):
                start = max(block * blocksize, box.cols.start) - box.cols.start
                stop = (block + 1) * blocksize - box.cols.start
                values[:, start:stop].mul_(absmax[:, block - first, None])
            return
        cols = torch.arange(box.cols.start - window.start, box.cols.stop - window.start, device=arena.device)
        rows = torch.arange(box.rows.start, box.rows.stop, device=arena.device)
        before = (rows * width + window.start) % blocksize  # of a row's first block, before the window
        block_of = (before[:, None] + cols).div_(blocksize, rounding_mode="floor")
        values.mul_(absmax.gather(1, block_of))
