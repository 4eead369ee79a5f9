"""bitsandbytes LLM.int8: `X.weight` int8 (out, in), `X.SCB` fp32 (out,), `X.weight_format` uint8 scalar, 0 =
"row".

The weight is fp32, uncast: dequantize.py. Outlier columns are a matter of run time; the weights are complete.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.dequantize import decode_int8
from lorafuse.arithmetic.draws import Draws, of_run
from lorafuse.arithmetic.on_grid import round_tile
from lorafuse.codecs.bnb8_grid import Int8Grid
from lorafuse.codecs.conv1d import RecodedByColumns, Transposed, is_conv1d
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.held import read_runs
from lorafuse.codecs.model_dtype import model_dtype
from lorafuse.codecs.own_grid import GridSources, Recoded
from lorafuse.codecs.sources import Claims, Raw, Scheme, Sources
from lorafuse.codecs.strips import Run
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import Box, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("bitsandbytes",)


INT8 = Scheme("int8", bits=8)


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {X.weight: (X.weight, X.SCB, and X.weight_format where it is stored)}."""
    claims: dict[str, tuple[str, ...]] = {}
    for scb in stored:
        module = scb.removesuffix(".SCB")
        weight = f"{module}.weight"
        if module != scb and weight in stored and stored[weight].spec.dtype == "I8":
            extra = f"{module}.weight_format"
            claims[weight] = (weight, scb, extra) if extra in stored else (weight, scb)
    return Claims(claims)


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the scheme of every int8 weight."""
    return INT8


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of an int8 weight. Raises CheckpointError for another layout, or where the shape of
    SCB does not fit."""
    if len(names) == 3 and any(read_all(ckpt, names[2])):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} has a weight_format other than 0 (row), which is not "
            "supported."
        )
    q, scb = ckpt.tensors[weight].spec, ckpt.tensors[names[1]].spec
    if len(q.shape) != 2 or scb != TensorSpec("F32", q.shape[:1]):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} is {q}, its SCB {scb}; expected SCB F32 "
            f"[{q.shape[0] if q.shape else 1}]."
        )
    sources = Int8Sources(weight, names, ckpt)
    return Transposed(sources) if is_conv1d(ckpt.config, weight) else sources


class Int8Sources(RecodedByColumns, GridSources):
    """q and SCB of one weight, as they are stored: (out, in)."""

    column_multiple = 64
    grid_rows = 1

    def __init__(self, weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> None:
        self.store, self.names, self.scheme = ckpt, names, INT8
        self.spec = TensorSpec("F32", ckpt.tensors[weight].spec.shape)
        self.column_run = math.gcd(self.spec.shape[1], 64)
        self.out_dtype = model_dtype(ckpt.config) or "F16"  # transformers' default for int8

    def will_need(self, box: Box) -> None:
        start, stop = box.run
        self.store.will_need(self.names[0], start, stop - start)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        start, stop = box.run
        first, last = start // self.spec.shape[1], stop // self.spec.shape[1]  # stored rows
        q = arena.fetch("int8.q", self.store, self.names[0], start, stop - start)
        scb = arena.fetch("int8.scb", self.store, self.names[1], first * 4, (last - first) * 4)
        return q.view(torch.int8), scb.view(torch.float32)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        q, scb = (arena.place(t) for t in raw)
        out = arena.get(DECODED_FP32, box.numel, torch.float32)
        out.copy_(q)
        decode_int8(out.view(-1, self.spec.shape[1]), scb[:, None])
        return out

    def codes_nbytes(self, n: int) -> int:
        return n

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        q, scb = (arena.place(t) for t in tile.raw)
        codes = buffer[: q.numel()].view(torch.int8)
        recoded = arena.beside(codes, "int8.recoded").copy_(q)
        drawn = of_run(draws, tile.start)
        grid = Int8Grid(recoded, scb)
        rounded = round_tile(grid, tile.base, tile.values, drawn, arena, measured=True)
        arena.bring_back(recoded, codes)
        return Recoded((Run(tile.start, 0, q.numel()),), *rounded)

    def codes_of_columns(
        self, raw: Raw, window: range, cols: range, arena: Arena
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = raw[0][:, cols.start - window.start : cols.stop - window.start]
        scales = raw[1][:, None].expand(-1, len(cols) // self.column_run)
        return arena.place(q.contiguous().view(torch.uint8)), arena.place(scales.contiguous())

    def grid_of(
        self, codes: torch.Tensor, scales: torch.Tensor, run: int, skip: int, arena: Arena
    ) -> Int8Grid:
        return Int8Grid(codes.view(torch.int8), scales)

    def columns_nbytes(self, n_cols: int) -> int:
        return self.spec.shape[0] * (n_cols + 4)

    def fetch_columns(self, cols: range) -> Raw:
        n_rows, width = self.spec.shape
        starts = [row * width + cols.start for row in range(n_rows)]
        q = read_runs(self.store, self.names[0], starts, len(cols))
        scb = read_runs(self.store, self.names[1], [0], n_rows * 4)
        return q.view(torch.int8), scb.view(-1).view(torch.float32)

    def decode_columns(self, raw: Raw, window: range, box: Box, arena: Arena) -> torch.Tensor:
        rows = slice(box.rows.start, box.rows.stop)
        cols = slice(box.cols.start - window.start, box.cols.stop - window.start)
        q, scb = arena.place(raw[0][rows, cols]), arena.place(raw[1][rows])
        values = arena.get("int8.columns", box.numel, torch.float32).view(len(box.rows), len(box.cols))
        return decode_int8(values.copy_(q), scb[:, None])
