"""Weights that are stored by rows, as codes with a scale for each block: what most quantized formats have in
common."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, Arena, to_device_of
from lorafuse.arithmetic.coded_rows import decode_rows
from lorafuse.arithmetic.codes import Codes, Numbers, float8_levels
from lorafuse.arithmetic.dequantize import NARROW
from lorafuse.arithmetic.draws import Draws, of_run
from lorafuse.arithmetic.on_grid import round_tile
from lorafuse.arithmetic.small_floats import e8m0
from lorafuse.codecs.act_order import Groups
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.own_grid import GridSources, Recoded
from lorafuse.codecs.scaled_grid import ScaledGrid, levels_of
from lorafuse.codecs.sources import Raw, Scheme
from lorafuse.codecs.strips import Run
from lorafuse.codecs.swizzled import SwizzledScales
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, Box, TensorSpec

E8M0 = ("F8_E8M0", "U8")


class Block(NamedTuple):
    """Rows and columns of a weight that share a scale."""

    height: int
    width: int


def fitting_block(shape: tuple[int, ...], grid: tuple[int, ...], block: Block) -> bool:
    """Whether a weight of that shape, cut into such blocks, has that grid of them; the last blocks of a
    matrix may be smaller."""
    if len(shape) < 2 or len(grid) != len(shape) or grid[:-2] != shape[:-2] or min(block) < 1:
        return False
    return grid[-2:] == (-(-shape[-2] // block.height), -(-shape[-1] // block.width))


def block_of(shape: tuple[int, ...], grid: tuple[int, ...]) -> Block | None:
    """The block that divides each matrix evenly into the grid, where there is one."""
    if len(shape) < 2 or len(grid) != len(shape) or 0 in grid:
        return None
    block = Block(-(-shape[-2] // grid[-2]), -(-shape[-1] // grid[-1]))
    even = shape[-2] % grid[-2] == 0 and shape[-1] % grid[-1] == 0
    return block if even and fitting_block(shape, grid, block) else None


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales, or zero points, of the blocks of a weight, in a stored tensor: one matrix [n_rows, n_cols] of
    them for each matrix [height, …] of the weight."""

    name: str
    dtype: str
    height: int
    n_rows: int
    n_cols: int
    block: Block

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...], block: Block) -> "Grid":
        """Of a weight of that shape, which `block` cuts."""
        n_rows, n_cols = (-(-n // size) for n, size in zip(shape[-2:], block, strict=True))
        return cls(name, dtype, shape[-2], n_rows, n_cols, block)

    @classmethod
    def of_all(cls, name: str, dtype: str, shape: tuple[int, ...]) -> "Grid":
        """One number for all matrices of a weight."""
        n_rows = TensorSpec("U8", shape[:-1]).numel
        return cls(name, dtype, n_rows, 1, 1, Block(n_rows, shape[-1]))

    @property
    def width(self) -> int:
        """Columns of the weight that share a scale."""
        return self.block.width

    def _row_of(self, row: int) -> int:
        """The row of the grid that has the scales of a row of the weight, all matrices counted."""
        return row // self.height * self.n_rows + row % self.height // self.block.height

    def fetch(self, rows: range, store: Store, arena: Arena, role: str) -> torch.Tensor:
        """The bytes of what these rows need, uint8, 1-D, in scratch that is called after the role."""
        row_nbytes = self.n_cols * DTYPES[self.dtype][0]
        first, last = (self._row_of(row) for row in (rows.start, rows[-1]))
        size = (last + 1 - first) * row_nbytes
        return arena.fetch(role, store, self.name, first * row_nbytes, size)

    def values(self, raw: torch.Tensor, arena: Arena) -> torch.Tensor:
        """fp32 [rows of the grid, n_cols] of what was fetched."""
        if self.dtype in E8M0:
            return e8m0(raw).view(-1, self.n_cols)
        dtype = getattr(torch, DTYPES[self.dtype][1])
        if self.dtype.startswith("F8_"):
            # By no scratch of the arena's, in which the decoded weight may be.
            values = arena.table(float8_levels(dtype)).index_select(0, raw.int())
        else:
            values = raw.view(dtype).float()
        return values.view(-1, self.n_cols)

    def by_rows(self, values: torch.Tensor, rows: range) -> torch.Tensor:
        """[rows, n_cols]: for each row of the weight, what it shares with others; [1, n_cols] where all rows
        have the same."""
        if len(values) == 1 or self.n_rows == self.height:
            return values
        first = self._row_of(rows.start)
        places = torch.tensor([self._row_of(row) - first for row in rows], dtype=torch.int64)
        return values.index_select(0, to_device_of(values, places))


class Blocks(Protocol):
    """What a Grid has: numbers of blocks of a weight, however they are stored."""

    def fetch(self, rows: range, store: Store, arena: Arena, role: str) -> torch.Tensor: ...

    def values(self, raw: torch.Tensor, arena: Arena) -> torch.Tensor: ...

    def by_rows(self, values: torch.Tensor, rows: range) -> torch.Tensor: ...


# Scales, given what a stored number (uint8 [4]: fp32) makes of them.
WithGlobal = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How codes become values: (code − zero) · scale in fp32, then rounded to `via`, if any, before the
    dtype of the weight. `global_scale`: a stored fp32 number that all scales of the weight are to be combined
    with. `groups`: of the columns, where they do not lie in order. `zeros_are_biases`: code · scale + bias,
    each rounded to the dtype of the weight."""

    codes: Codes
    scales: Grid | SwizzledScales
    zeros: Blocks | None = None
    via: str | None = None
    global_scale: str | None = None
    combine: WithGlobal = torch.Tensor.mul
    groups: Groups | None = None
    zeros_are_biases: bool = False


class ScaledRows(GridSources):
    """A weight, or a stack of them, by rows. `names[0]` holds the codes."""

    def __init__(
        self, store: Store, names: tuple[str, ...], spec: TensorSpec, scheme: Scheme, recipe: Recipe
    ) -> None:
        self.store, self.names, self.scheme = store, names, scheme
        self.spec, self.out_dtype, self._recipe = spec, spec.dtype, recipe
        if recipe.groups:
            self.held_nbytes, self.nbytes = recipe.groups.held_nbytes, recipe.groups.scratch_nbytes
        via = [recipe.via] if recipe.via not in (None, "F32", spec.dtype) else []
        self._dtypes = [getattr(torch, DTYPES[dtype][1]) for dtype in (*via, spec.dtype) if dtype]
        width, n_cols = recipe.scales.width, spec.shape[-1]
        self._run = 1 if recipe.groups else math.gcd(width, n_cols) if recipe.scales.n_cols > 1 else n_cols
        self.grid_rows = 1
        # Codes before and after, and the index and the gap of each; scales and zero points of each run.
        self.grid_nbytes_per_element = 12 + 16 // self._run

    def _rows(self, box: Box) -> range:
        (start, stop), n_cols = box.run, max(self.spec.shape[-1], 1)
        return range(start // n_cols, stop // n_cols)

    def release(self) -> None:
        if self._recipe.groups:
            self._recipe.groups.release()

    def will_need(self, box: Box) -> None:
        rows, nbytes = self._rows(box), self._recipe.codes.row_nbytes
        self.store.will_need(self.names[0], rows.start * nbytes, len(rows) * nbytes)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """Codes, scales, and zero points and global scale where there are any."""
        rows, recipe = self._rows(box), self._recipe
        nbytes = recipe.codes.row_nbytes
        codes = arena.fetch(
            "scaled.codes", self.store, self.names[0], rows.start * nbytes, len(rows) * nbytes
        )
        if not rows:
            return (codes,)
        raw = [codes, recipe.scales.fetch(rows, self.store, arena, "scaled.scales")]
        if recipe.zeros:
            raw.append(recipe.zeros.fetch(rows, self.store, arena, "scaled.zeros"))
        if recipe.global_scale:
            raw.append(arena.fetch("scaled.global", self.store, recipe.global_scale, 0, 4))
        return tuple(raw)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        rows, recipe, n_cols = self._rows(box), self._recipe, self.spec.shape[-1]
        if not rows:
            return raw[0].view(getattr(torch, self.spec.torch_name))
        codes, stored, *rest = (arena.place(tensor) for tensor in raw)
        scales, zeros = self._numbers(stored, rest, rows, arena)
        group_of = recipe.groups.load() if recipe.groups else recipe.scales.width
        numbers = Numbers(scales, zeros, group_of, recipe.zeros_are_biases)
        name, scratch = (DECODED_FP32, torch.float32) if self.spec.dtype == "F32" else (NARROW, torch.int16)
        values = arena.get(name, len(rows) * n_cols, scratch).view(self._dtypes[-1])
        matrix = values.view(len(rows), n_cols)
        decode_rows(codes.view(len(rows), -1), recipe.codes, numbers, self._dtypes, matrix, arena)
        return values

    def _numbers(
        self, stored: torch.Tensor, rest: list[torch.Tensor], rows: range, arena: Arena
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """fp32 [rows or 1, blocks or groups]: scales, and zero points where there are any, from what was
        fetched of them."""
        recipe = self._recipe
        scales = recipe.scales.values(stored, arena)
        if recipe.global_scale:
            scales = recipe.combine(scales, rest[-1].view(torch.float32))
        scales = recipe.scales.by_rows(scales, rows)
        if not recipe.zeros:
            return scales, None
        return scales, recipe.zeros.by_rows(recipe.zeros.values(rest[0], arena), rows)

    def codes_nbytes(self, n: int) -> int:
        return n // max(self.spec.shape[-1], 1) * self._recipe.codes.row_nbytes

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        rows, codes, n_cols = self._rows(tile.box), self._recipe.codes, self.spec.shape[-1]
        raw, stored, *rest = (arena.place(tensor) for tensor in tile.raw)
        before = codes.read(raw, len(rows), n_cols)
        scales, zeros = (
            None if numbers is None else self._by_runs(numbers, len(rows))
            for numbers in self._numbers(stored, rest, rows, arena)
        )
        assert scales is not None
        after = before.clone()
        grid = self._grid(after, scales, zeros, arena)
        values, n_clipped, _ = round_tile(grid, tile.base, tile.values, of_run(draws, tile.start), arena)
        buffer[: raw.numel()].copy_(codes.changed(raw, before, after))
        return Recoded((Run(rows.start * codes.row_nbytes, 0, raw.numel()),), values, n_clipped)

    def _grid(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, arena: Arena
    ) -> ScaledGrid:
        of_codes, dtypes = self._recipe.codes.levels, tuple(self._dtypes)
        if self._recipe.zeros_are_biases:
            levels = levels_of(of_codes, (dtypes[-1], torch.float32, dtypes[-1]), zeros=False)
            return ScaledGrid(codes, scales, None, levels.on(arena), self._run, biases=zeros)
        levels = levels_of(of_codes, dtypes, zeros=zeros is not None)
        return ScaledGrid(codes, scales, zeros, levels.on(arena), self._run)

    def _by_runs(self, numbers: torch.Tensor, n_rows: int) -> torch.Tensor:
        """fp32, 1-D: what each run of these rows has, of numbers [rows or 1, blocks or groups]."""
        recipe, n_runs = self._recipe, self.spec.shape[-1] // self._run
        if recipe.groups:
            numbers = recipe.groups.spread(numbers)
        elif numbers.shape[1] != n_runs:
            starts = torch.arange(0, self.spec.shape[-1], self._run, dtype=torch.int64, device=numbers.device)
            numbers = numbers.index_select(1, starts.div_(recipe.scales.width, rounding_mode="floor"))
        return numbers.expand(n_rows, n_runs).reshape(-1)
