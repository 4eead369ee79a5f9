"""Scales in the order that tensor cores read them in."""

from dataclasses import dataclass

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.small_floats import decode_float8
from lorafuse.files.stores import Store

TILE_ROWS, TILE_COLUMNS = 128, 4
TILE_NBYTES = TILE_ROWS * TILE_COLUMNS


@dataclass(frozen=True, slots=True)
class SwizzledScales:
    """E4M3 in tiles of 128 rows and 4 columns, of which all are stored: in a tile, the scale of row r and
    column c is at r mod 32 · 16 + r div 32 · 4 + c (cuBLAS, "1D block scaling factors layout"). `width`:
    columns of the weight that share a scale."""

    name: str
    n_cols: int
    width: int

    @property
    def _n_across(self) -> int:
        return -(-self.n_cols // TILE_COLUMNS)

    def fetch(self, rows: range, store: Store, arena: Arena, role: str) -> torch.Tensor:
        """The tiles of these rows, uint8, 1-D, in scratch that is called after the role."""
        nbytes = self._n_across * TILE_NBYTES
        first, last = rows.start // TILE_ROWS, rows[-1] // TILE_ROWS
        return arena.fetch(role, store, self.name, first * nbytes, (last + 1 - first) * nbytes)

    def values(self, raw: torch.Tensor, arena: Arena) -> torch.Tensor:
        """fp32 [rows, n_cols] of what was fetched, from the first row of a tile on."""
        tiles = raw.view(-1, self._n_across, 32, 4, TILE_COLUMNS).permute(0, 3, 2, 1, 4)
        codes = tiles.reshape(-1, TILE_COLUMNS * self._n_across)[:, : self.n_cols].reshape(-1)
        values = torch.empty(codes.numel(), dtype=torch.float32, device=arena.device)
        decode_float8(codes, torch.float8_e4m3fn, values, arena)
        return values.view(-1, self.n_cols)

    def by_rows(self, values: torch.Tensor, rows: range) -> torch.Tensor:
        """[rows, n_cols]."""
        skipped = rows.start % TILE_ROWS
        return values[skipped : skipped + len(rows)]
