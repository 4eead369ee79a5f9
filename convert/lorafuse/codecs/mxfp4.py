"""MXFP4 of gpt-oss (quant_method "mxfp4"): experts in stacks, which are stored transposed.

`P_blocks` U8 [E, out, G, 16] and `P_scales` U8 [E, out, G] make `P` [E, in, out], in = 32 · G. A byte holds
two E2M1 codes, the low half first; a scale is E8M0, of 32 codes along `in`. P[e, i, o] = T(level · 2^(scale −
127)), T the model's dtype. As transformers 5.23, integrations/mxfp4.py, convert_moe_packed_tensors.

A row of P is half a byte of each stored row of an expert, so an expert is read whole, or in as few bands of
its columns as fit."""

from collections.abc import Mapping
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.coded_rows import decode_turned
from lorafuse.arithmetic.codes import Numbers, e2m1_codes
from lorafuse.arithmetic.draws import Draws, HalfDraws, TileDraws, TurnedDraws
from lorafuse.arithmetic.on_grid import round_tile
from lorafuse.arithmetic.small_floats import e8m0
from lorafuse.codecs.conv1d import CHUNK_NBYTES_PER_ELEMENT, CHUNK_NUMEL
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.held import Windows, read_runs
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.own_grid import GridSources, Recoded
from lorafuse.codecs.scaled_grid import ScaledGrid, levels_of
from lorafuse.codecs.sources import Claims, Raw, Scheme, Sources
from lorafuse.codecs.strips import Run
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import Store
from lorafuse.files.tensors import Box, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("mxfp4",)
GROUP, GROUP_NBYTES = 32, 16
MXFP4 = Scheme("mxfp4", blocksize=GROUP, words="MXFP4", bits=4, codes_per_byte=2)
WINDOW_NBYTES = 10_000_000  # of each of two: a whole expert of gpt-oss has 8.8 MB


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {P: (P_blocks, P_scales)} where both are as this format has them."""
    weights = {}
    for blocks, info in stored.items():
        weight = blocks.removesuffix("_blocks")
        scales = stored.get(f"{weight}_scales")
        shape = info.spec.shape
        if (
            weight != blocks
            and scales
            and scales.spec == TensorSpec("U8", shape[:-1])
            and info.spec.dtype == "U8"
            and len(shape) == 4
            and shape[-1] == GROUP_NBYTES
        ):
            weights[weight] = (blocks, f"{weight}_scales")
    return Claims(weights)


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the scheme of every stack."""
    return MXFP4


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a stack of experts. Raises CheckpointError for an empty one."""
    n_experts, n_outputs, n_groups, _ = ckpt.tensors[names[0]].spec.shape
    if not n_experts * n_outputs * n_groups:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(names[0])} is empty.")
    spec = TensorSpec(out_dtype(ckpt), (n_experts, n_groups * GROUP, n_outputs))
    return Experts(names, spec, ckpt)


class Experts(GridSources):
    """A stack of experts; all rows are counted through it."""

    grid_rows = rows_at_once = GROUP
    scattered = True
    grid_nbytes_per_element = 28  # of recode: transposed base and sums, draws, codes before and after, gaps

    def __init__(self, names: tuple[str, ...], spec: TensorSpec, store: Store) -> None:
        self.names, self.spec, self.out_dtype, self.store, self.scheme = names, spec, spec.dtype, store, MXFP4
        n_experts, self._height, self._width = spec.shape
        self._n_groups = self._height // GROUP
        self._groups_read = self._groups_of_windows()
        self._windows = Windows(n_experts * self._height, self._groups_read * GROUP, self._read)
        self.window_nbytes = self._windows.n_held * self._window_nbytes(self._groups_read)
        self.nbytes = CHUNK_NUMEL * CHUNK_NBYTES_PER_ELEMENT

    def _window_nbytes(self, n_groups: int) -> int:
        return self._width * n_groups * (GROUP_NBYTES + 1)

    def _groups_of_windows(self) -> int:
        """So many groups of each stored row that windows are small enough, and that no window lies in two
        experts."""
        fitting = (n for n in range(self._n_groups, 0, -1) if self._n_groups % n == 0)
        return next((n for n in fitting if self._window_nbytes(n) <= WINDOW_NBYTES), 1)

    def _rows(self, box: Box) -> range:
        start, stop = box.run
        return range(start // self._width, -(-stop // self._width))

    def _read(self, rows: range, arena: Arena) -> Raw:
        """uint8 [out, bytes] of codes and [out, groups] of scales, of these rows of one expert."""
        expert, first = divmod(rows.start // GROUP, self._n_groups)
        starts = [(expert * self._width + row) * self._n_groups + first for row in range(self._width)]
        n_groups = self._groups_read
        codes = read_runs(
            self.store, self.names[0], [start * GROUP_NBYTES for start in starts], n_groups * GROUP_NBYTES
        )
        return codes, read_runs(self.store, self.names[1], starts, n_groups)

    def will_need(self, box: Box) -> None:
        rows = self._rows(box)
        expert, row = divmod(rows.start, self._height)
        if row == 0:
            nbytes = self._width * self._n_groups * GROUP_NBYTES
            self.store.will_need(self.names[0], expert * nbytes, nbytes)

    def release(self) -> None:
        self._windows.drop()

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return tuple(tensor for raw in self._windows.get(self._rows(box), arena) for tensor in raw)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        rows, width = self._rows(box), self._width
        made = arena.get("mxfp4.made", box.numel, getattr(torch, self.spec.torch_name))
        tile = made.view(len(rows), width)
        for number, (window, part) in enumerate(self._windows.around(rows)):
            codes, scales = raw[2 * number : 2 * number + 2]
            start, stop = part.start - window.start, part.stop - window.start
            groups = slice(start // GROUP, -(-stop // GROUP))
            packed = codes[:, groups.start * GROUP_NBYTES : groups.stop * GROUP_NBYTES]
            packed = packed if arena.on_host else arena.place(packed.contiguous())
            numbers = Numbers(e8m0(arena.place(scales[:, groups])), None, GROUP)
            n_cols, values = 2 * packed.shape[1], tile[part.start - rows.start : part.stop - rows.start]
            skip, dtypes = start % GROUP, [made.dtype]
            decode_turned(packed, e2m1_codes(n_cols), n_cols, numbers, dtypes, skip, values, arena)
        return made

    def codes_nbytes(self, n: int) -> int:
        return n // 2

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        """In the order in which codes are stored, in which those of a tile are some of each stored row's."""
        rows, width, n_clipped = self._rows(tile.box), self._width, 0
        values = arena.get("mxfp4.recoded", tile.base.numel(), tile.base.dtype).view(len(rows), width)
        runs: list[Run] = []
        for number, (window, part) in enumerate(self._windows.around(rows)):
            at = slice(part.start - rows.start, part.stop - rows.start)
            groups = slice(*((row - window.start) // GROUP for row in (part.start, part.stop)))
            codes, scales = (
                arena.place(raw.view(width, -1, size)[:, groups].reshape(-1))
                for raw, size in zip(tile.raw[2 * number :][:2], (GROUP_NBYTES, 1), strict=True)
            )
            base, sums = (of.view(len(rows), width)[at].T.reshape(-1) for of in (tile.base, tile.values))
            first = tile.start + at.start * width
            drawn = TurnedDraws(draws, first, len(part), width, arena) if draws else HalfDraws()
            rounded, stored, beyond = _recoded(codes, scales, base, sums, drawn, arena)
            values[at].copy_(rounded.view(width, -1).T)
            start, nbytes, n_clipped = at.start * width // 2, len(part) // 2, n_clipped + beyond
            buffer[start : start + len(stored)].copy_(stored)
            expert, row = divmod(part.start, self._height)
            place = (expert * width * self._height + row) // 2
            runs.append(Run(place, start, nbytes, width, self._height // 2))
        return Recoded(tuple(runs), values.view(-1), n_clipped)


def _recoded(
    codes: torch.Tensor,
    scales: torch.Tensor,
    base: torch.Tensor,
    sums: torch.Tensor,
    draws: TileDraws,
    arena: Arena,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(values, bytes of their codes, how many were clipped) of sums, with the bytes of codes and scales of
    the base, all 1-D and in the order in which codes are stored."""
    rows = e2m1_codes(base.numel())
    before = rows.read(codes, 1, base.numel())
    after = before.clone()
    levels = levels_of(rows.levels, (base.dtype,), zeros=False).on(arena)
    values, n_clipped, _ = round_tile(
        ScaledGrid(after, e8m0(scales), None, levels, GROUP), base, sums, draws, arena
    )
    return values, rows.changed(codes, before, after), n_clipped
