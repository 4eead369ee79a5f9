"""Rows of codes, with a scale and perhaps a zero point for each block of columns or group of them: decoded in
one pass where the compiled kernel does it."""

import torch

from lorafuse.arithmetic import compiled_rows
from lorafuse.arithmetic.arena import Arena, to_device_of
from lorafuse.arithmetic.codes import Codes, Numbers
from lorafuse.arithmetic.dequantize import NARROW
from lorafuse.arithmetic.scaling import (
    CHUNK_NUMEL,
    round_through,
    scale_and_add,
    scale_blocks,
    subtract_zeros,
)

_SPREAD_NUMEL = 1 << 16  # values whose scales are spread at a time


def decode_rows(
    packed: torch.Tensor,
    codes: Codes,
    numbers: Numbers,
    dtypes: list[torch.dtype],
    values: torch.Tensor,
    arena: Arena,
) -> None:
    """values ([rows, columns], contiguous, of the last dtype) = the values of rows of codes (`packed`: uint8
    [rows, bytes], contiguous), rounded to each dtype in turn. `values` may be the arena's NARROW or
    DECODED_FP32."""
    if arena.kernel and compiled_rows.decode_rows(arena.kernel, packed, codes, numbers, dtypes, values):
        return
    n_rows, n_cols = values.shape
    made = codes.decode(packed.view(-1), n_rows, n_cols, arena).view(n_rows, n_cols)
    values.copy_(_finished(made, numbers, dtypes, arena))


def decode_turned(
    packed: torch.Tensor,
    codes: Codes,
    n_cols: int,
    numbers: Numbers,
    dtypes: list[torch.dtype],
    skip: int,
    values: torch.Tensor,
    arena: Arena,
) -> None:
    """values ([columns, rows], contiguous) = what `decode_rows` has, transposed, of the columns from `skip`
    on, as many as there is room for. The rows of `packed` may lie apart; they hold `n_cols` codes."""
    if arena.kernel and compiled_rows.decode_rows(
        arena.kernel, packed, codes, numbers, dtypes, values, skip=skip
    ):
        return
    step = max(CHUNK_NUMEL // n_cols, 1)
    for first in range(0, len(packed), step):
        rows = slice(first, first + step)
        some = packed[rows].contiguous()
        made = codes.decode(some.view(-1), len(some), n_cols, arena).view(len(some), n_cols)
        made = _finished(made, numbers.of(rows), dtypes, arena)
        # Whole matrices, which torch turns in blocks; into part of a tile, it copies single elements.
        turned = arena.get("rows.turned", made.numel(), torch.float32).view(made.shape[::-1])
        values[:, rows].copy_(turned.copy_(made.T)[skip : skip + len(values)])


def _finished(
    values: torch.Tensor, numbers: Numbers, dtypes: list[torch.dtype], arena: Arena
) -> torch.Tensor:
    """Codes (fp32 [rows, columns]) made values in place, rounded to all dtypes but the last."""
    if numbers.are_biases:
        assert numbers.zeros is not None
        assert isinstance(numbers.group_of, int)
        scale_and_add(values, numbers.scales, numbers.zeros, numbers.group_of, dtypes[-1])
    else:
        scale(values, numbers)
    if len(dtypes) > 1:
        narrow = arena.get(NARROW, values.numel(), torch.int16)
        round_through(values.view(-1), [*dtypes[:-1], torch.float32], narrow)
    return values


def scale(values: torch.Tensor, numbers: Numbers) -> None:
    """Makes codes (fp32 [rows, columns]) (code − zero) · scale, in place."""
    scales, zeros, group_of, _ = numbers
    if isinstance(group_of, int):
        if zeros is not None:
            subtract_zeros(values, zeros, group_of)
        scale_blocks(values, scales, group_of)
        return
    groups = to_device_of(values, group_of).long()  # which torch takes half as long to select by
    step = max(_SPREAD_NUMEL // values.shape[1], 1)
    for first in range(0, len(values), step):
        rows = slice(first, first + step)
        some, part = numbers.of(rows), values[rows]
        if some.zeros is not None:
            part.sub_(some.zeros.index_select(1, groups))
        part.mul_(some.scales.index_select(1, groups))


def spread_nbytes(n_cols: int) -> int:
    """Host bytes of what `scale` spreads at a time, where columns lie in groups."""
    return 8 * max(_SPREAD_NUMEL, n_cols)
