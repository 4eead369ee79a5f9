"""Calls of the compiled kernel: tensors in, tensors out. Every one has a twin in torch, which says what it
does; all tensors are on the host, and contiguous."""

import ctypes
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.kernel import Kernel

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Coded(NamedTuple):
    """A grid that the kernel knows: `codes` (uint8 or int8, 1-D) are written; `scales` (fp32) are those of
    the runs. Of 4 bits: `levels` (fp32 [16], ascending), the code of each (uint8), and the place of each code
    (uint8); of int8 none. `bound`: numerator, least and smallest, of which a run of scale s has the bound
    |Δ| · (numerator / (|s| · least)), where |s| is at least the smallest."""

    codes: torch.Tensor
    scales: torch.Tensor
    levels: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    bound: tuple[float, float, float]
    dtype: torch.dtype
    run: int
    skip: int


class Seeded(NamedTuple):
    """Draws that the kernel can make: those of a weight with these seeds, from element `first` on, or of the
    transpose of its rows [n_rows, n_cols] from there on, `bytes` (uint8) being given then. Without seeds
    u = 1/2 for all."""

    seeds: tuple[int, int] | None = None
    first: int = 0
    n_rows: int = 0
    n_cols: int = 0
    bytes: torch.Tensor | None = None


class _OnGrid(ctypes.Structure):
    """`struct on_grid` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("base", "sums", "stored", "codes")),
        *((name, ctypes.c_void_p) for name in ("scales", "levels", "codes_of", "places_of", "bytes")),
        *((name, ctypes.c_uint64) for name in ("seed_of_bytes", "seed_of_fractions")),
        *((name, ctypes.c_int64) for name in ("numel", "run", "skip", "first", "n_rows", "n_cols")),
        *((name, ctypes.c_float) for name in ("numerator", "least", "smallest")),
        *((name, ctypes.c_int32) for name in ("dtype", "kind", "draws", "level")),
    )


def round_tile(
    kernel: Kernel, grid: Coded, base: torch.Tensor, sums: torch.Tensor, draws: Seeded, arena: Arena
) -> tuple[torch.Tensor, int]:
    """on_grid.round_tile."""
    stored = arena.get("grid.stored", base.numel(), base.dtype)
    levels, codes_of, places_of = grid.levels or (None, None, None)
    seed_of_bytes, seed_of_fractions = draws.seeds or (0, 0)
    numerator, least, smallest = grid.bound
    call = _OnGrid(
        base=_address(base), sums=_address(sums), stored=_address(stored), codes=_address(grid.codes),
        scales=_address(grid.scales), levels=_address(levels), codes_of=_address(codes_of),
        places_of=_address(places_of), bytes=_address(draws.bytes),
        seed_of_bytes=seed_of_bytes, seed_of_fractions=seed_of_fractions,
        numel=base.numel(), run=grid.run, skip=grid.skip,
        first=draws.first, n_rows=draws.n_rows, n_cols=draws.n_cols,
        numerator=numerator, least=least, smallest=smallest,
        dtype=DTYPES[base.dtype], kind=0 if grid.levels else 1, draws=1 if draws.seeds else 0,
        level=kernel.level,
    )  # fmt: skip
    return stored, kernel.round(ctypes.byref(call))


def _address(tensor: torch.Tensor | None) -> int | None:
    assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu")
    return None if tensor is None else tensor.data_ptr()
