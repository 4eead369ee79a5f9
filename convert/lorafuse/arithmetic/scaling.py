"""Scales, and zero points, of blocks of a matrix."""

from collections.abc import Callable

import torch

CHUNK_NUMEL = 1 << 17  # what stays in cache


def scale_blocks(values: torch.Tensor, scales: torch.Tensor, width: int) -> None:
    """Multiplies values (fp32 [rows, columns]) in place by scales (fp32 [rows or 1, blocks]), each of which
    is that of `width` columns of a row; the last block may be narrower."""
    _by_blocks(torch.Tensor.mul_, values, scales, width)


def subtract_zeros(values: torch.Tensor, zeros: torch.Tensor, width: int) -> None:
    """Subtracts zeros in place, which are laid out as scales are."""
    _by_blocks(torch.Tensor.sub_, values, zeros, width)


def scale_and_add(
    values: torch.Tensor,
    scales: torch.Tensor,
    biases: torch.Tensor,
    width: int,
    dtype: torch.dtype,
) -> None:
    """Multiplies by scales in place, rounds to a dtype, and adds biases, which are laid out as scales are."""
    step = max(CHUNK_NUMEL // values.shape[1], 1)
    for first in range(0, len(values), step):
        part = slice(first, first + step)
        chunk = values[part]
        scale_blocks(chunk, scales[part], width)
        if dtype != torch.float32:
            chunk.copy_(chunk.to(dtype))
        _by_blocks(torch.Tensor.add_, chunk, biases[part], width)


def _by_blocks(
    apply: Callable[[torch.Tensor, torch.Tensor], object],
    values: torch.Tensor,
    operands: torch.Tensor,
    width: int,
) -> None:
    n_rows, n_cols = values.shape
    if width == 1 or operands.shape[1] == 1:
        apply(values, operands)
        return
    whole = n_cols // width
    if whole * width == n_cols:
        apply(values.view(n_rows, whole, width), operands[:, :, None])
        return
    blocks = values.as_strided((n_rows, whole, width), (n_cols, width, 1))
    apply(blocks, operands[:, :whole, None])
    apply(values[:, whole * width :], operands[:, whole:])


def round_through(values: torch.Tensor, dtypes: list[torch.dtype], narrow: torch.Tensor) -> torch.Tensor:
    """values (fp32, 1-D) rounded to each dtype in turn. `narrow`: int16, as many: scratch for dtypes of 16
    bits, and for the result."""
    for last, dtype in enumerate(dtypes, start=1 - len(dtypes)):
        if dtype == torch.float32:
            continue
        rounded = narrow.view(dtype).copy_(values)
        if last == 0:
            return rounded
        values.copy_(rounded)
    return values
