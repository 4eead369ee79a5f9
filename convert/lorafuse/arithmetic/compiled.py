"""Calls of the compiled kernel: tensors in, tensors out. Every one has a twin in torch, which says what it
does; all tensors are on the host, and contiguous."""

import ctypes
import math
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.kernel import Kernel

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Coded(NamedTuple):
    """A grid that the kernel knows: `codes` (uint8 or int8, 1-D) are written, over those that are stored, or
    beside them where these are `before`; `scales` (fp32) are those of the runs. Of 4 bits: `levels` (fp32
    [16], ascending), the code of each (uint8), and the place of each code (int64); of int8 none. `bound`:
    numerator, least and smallest, of which a run of scale s has the bound |Δ| · (numerator / (|s| · least)),
    where |s| is at least the smallest."""

    codes: torch.Tensor
    before: torch.Tensor | None
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
        *((name, ctypes.c_void_p) for name in ("base", "sums", "stored", "before", "codes", "measured")),
        *((name, ctypes.c_void_p) for name in ("scales", "levels", "codes_of", "places_of", "bytes")),
        *((name, ctypes.c_uint64) for name in ("seed_of_bytes", "seed_of_fractions")),
        *((name, ctypes.c_int64) for name in ("numel", "run", "skip", "first", "n_rows", "n_cols")),
        *((name, ctypes.c_float) for name in ("numerator", "least", "smallest")),
        *((name, ctypes.c_int32) for name in ("dtype", "kind", "draws", "level")),
    )


def round_tile(
    kernel: Kernel,
    grid: Coded,
    base: torch.Tensor,
    sums: torch.Tensor,
    draws: Seeded,
    arena: Arena,
    *,
    measured: bool,
) -> tuple[torch.Tensor, int, "Sums | None"]:
    """on_grid.round_tile, and where that is wanted the sums of measure.measure_tile."""
    stored = arena.get("grid.stored", base.numel(), base.dtype)
    found = _sums(kernel, base, sums, stored) if measured else None
    levels, codes_of, places_of = grid.levels or (None, None, None)
    seed_of_bytes, seed_of_fractions = draws.seeds or (0, 0)
    numerator, least, smallest = grid.bound
    call = _OnGrid(
        base=address(base), sums=address(sums), stored=address(stored),
        before=address(grid.before), codes=address(grid.codes),
        measured=ctypes.addressof(found) if found else None,
        scales=address(grid.scales), levels=address(levels), codes_of=address(codes_of),
        places_of=address(places_of), bytes=address(draws.bytes),
        seed_of_bytes=seed_of_bytes, seed_of_fractions=seed_of_fractions,
        numel=base.numel(), run=grid.run, skip=grid.skip,
        first=draws.first, n_rows=draws.n_rows, n_cols=draws.n_cols,
        numerator=numerator, least=least, smallest=smallest,
        dtype=DTYPES[base.dtype], kind=0 if grid.levels else 1, draws=1 if draws.seeds else 0,
        level=kernel.level,
    )  # fmt: skip
    return stored, kernel.round_tile(ctypes.byref(call)), found


class _Packed(ctypes.Structure):
    """`struct packed` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "map", "scales", "values")),
        *((name, ctypes.c_int64) for name in ("numel", "blocksize", "skip")),
        *((name, ctypes.c_int32) for name in ("dtype", "level")),
    )


def decode_four_bit(
    kernel: Kernel,
    packed: torch.Tensor,
    quant_map: torch.Tensor,
    scales: torch.Tensor,
    blocksize: int,
    skip: int,
    values: torch.Tensor,
) -> bool:
    """dequantize.decode_four_bit, into `values`. False where it is left to torch: bits of NaN are its own."""
    call = _Packed(
        codes=address(packed), map=address(quant_map), scales=address(scales), values=address(values),
        numel=values.numel(), blocksize=blocksize, skip=skip,
        dtype=DTYPES[values.dtype], level=kernel.level,
    )  # fmt: skip
    return bool(kernel.decode(ctypes.byref(call)))


def nested_scales(
    kernel: Kernel,
    codes: torch.Tensor,
    nested_map: torch.Tensor,
    nested: torch.Tensor,
    blocksize: int,
    offset: float,
    skip: int,
    scales: torch.Tensor,
) -> None:
    """dequantize.nested_scales, into `scales`."""
    pointers = map(address, (codes, nested_map, nested, scales))
    kernel.scales(*pointers, scales.numel(), blocksize, skip, offset)


class _Stream(ctypes.Structure):
    """`struct stream` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "values")),
        *((name, ctypes.c_int64) for name in ("n_rows", "row_nbytes", "n_codes")),
        *((name, ctypes.c_int32) for name in ("bits", "less", "level")),
    )


def unpack_floats(
    kernel: Kernel, packed: torch.Tensor, bits: int, n_codes: int, less: int, values: torch.Tensor
) -> None:
    """bit_stream.unpack_floats, into `values`; `bits` is at most 8."""
    n_rows, row_nbytes = packed.shape
    call = _Stream(
        packed=address(packed), values=address(values), n_rows=n_rows, row_nbytes=row_nbytes,
        n_codes=n_codes, bits=bits, less=less, level=kernel.level,
    )  # fmt: skip
    kernel.unpack(ctypes.byref(call))


class Sums(ctypes.Structure):
    """`struct measured` of kernel.c."""

    base_sq: float
    delta_sq: float
    residual_sq: float
    residual_delta: float
    n_changed: int
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("base", "stored", "total")),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("base_sq", "delta_sq", "residual_sq", "residual_delta")),
        ("n_changed", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("base_dtype", "stored_dtype", "rounded", "level")),
    )


def measure_tile(kernel: Kernel, base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor) -> Sums:
    """The sums of measure.measure_tile."""
    call = _sums(kernel, base, total, stored)
    kernel.measure(ctypes.byref(call))
    return call


def store_tile(kernel: Kernel, base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor) -> Sums | None:
    """measure.store_tile, and its sums. None where it is left to torch: bits of NaN are its own."""
    call = _sums(kernel, base, total, stored)
    call.rounded = True
    return call if kernel.measure(ctypes.byref(call)) and math.isfinite(call.residual_sq) else None


def _sums(kernel: Kernel, base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor) -> Sums:
    """Before anything is summed."""
    return Sums(
        base=address(base), total=address(total), stored=address(stored), numel=total.numel(),
        base_dtype=DTYPES[base.dtype], stored_dtype=DTYPES[stored.dtype], level=kernel.level,
    )  # fmt: skip


class _Units(ctypes.Structure):
    """`struct units` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("units", "zeros", "scales", "values")),
        *((name, ctypes.c_int64) for name in ("n", "n_numbers", "period", "skip")),
        *((name, ctypes.c_int32) for name in ("unit_nbytes", "shift", "mask")),
        *((name, ctypes.c_int32) for name in ("numbers_dtype", "dtype", "level")),
    )


def decode_units(
    kernel: Kernel,
    units: torch.Tensor,
    shift: int,
    mask: int,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    period: int,
    skip: int,
    values: torch.Tensor,
) -> bool:
    """units.decode_units. False where it is left to torch: bits of NaN are its own."""
    call = _Units(
        units=address(units), zeros=address(zeros), scales=address(scales), values=address(values),
        n=units.numel(), n_numbers=scales.numel(), period=period, skip=skip,
        unit_nbytes=units.element_size(), shift=shift, mask=mask,
        numbers_dtype=DTYPES[scales.dtype], dtype=DTYPES[values.dtype], level=kernel.level,
    )  # fmt: skip
    return bool(kernel.units(ctypes.byref(call)))


class _Vectors(ctypes.Structure):
    """`struct vectors` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "books", "scales", "values")),
        *((name, ctypes.c_int64) for name in ("n_rows", "n_vectors", "n_books", "length", "size")),
        *((name, ctypes.c_int32) for name in ("code_nbytes", "books_dtype", "dtype", "level")),
    )


def decode_vectors(
    kernel: Kernel, codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor, values: torch.Tensor
) -> bool:
    """vectors.decode_vectors. False where it is left to torch: bits of NaN, and vectors of several rows."""
    if values.shape[1] != 1:
        return False
    call = _Vectors(
        codes=address(codes), books=address(books), scales=address(scales), values=address(values),
        n_rows=codes.shape[0], n_vectors=codes.shape[1], n_books=books.shape[0], length=books.shape[1],
        size=books.shape[2], code_nbytes=codes.element_size(), books_dtype=DTYPES[books.dtype],
        dtype=DTYPES[values.dtype], level=kernel.level,
    )  # fmt: skip
    return bool(kernel.vectors(ctypes.byref(call)))


def e4m3(kernel: Kernel, codes: torch.Tensor, values: torch.Tensor) -> None:
    """small_floats.e4m3."""
    kernel.e4m3(address(codes), address(values), values.numel(), kernel.level)


def address(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_cpu and tensor.is_contiguous()
    return tensor.data_ptr()
