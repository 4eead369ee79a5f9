"""Codes in units that hold several, in each at the same place (codecs/hqq.py has the format)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lorafuse.arithmetic import compiled
from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.scaling import CHUNK_NUMEL


class Numbers(NamedTuple):
    """Zero points and scales, 1-D, of one dtype: element k has those at (skip + k) // period, or without a
    period at (skip + k) modulo their count."""

    zeros: torch.Tensor
    scales: torch.Tensor
    period: int
    skip: int

    def of(self, start: int, stop: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(some of the elements [start, stop), counted from the first; zero points and scales, [n, 1] where
        they are those of n runs, else [1, as many as elements, or as a period that repeats])."""
        period = self.period or len(self.scales)
        first, last = self.skip + start, self.skip + stop
        head = min(-(-first // period) * period, last)
        tail = max(last // period * period, head)
        for begin, end in ((first, head), (head, tail), (tail, last)):
            if begin == end:
                continue
            if self.period:
                at = slice(begin // period, -(-end // period))
            else:
                at = slice(begin % period, begin % period + min(end - begin, period))
            zeros, scales = (numbers[at, None] if self.period else numbers[None, at] for numbers in self[:2])
            yield slice(begin - first, end - first), zeros, scales


def decode_units(
    units: torch.Tensor, shift: int, mask: int, numbers: Numbers, values: torch.Tensor, arena: Arena
) -> None:
    """values (1-D) = ((unit >> shift & mask) − zero) · scale, each rounded to the dtype of the numbers, then
    to that of the values. `units`: uint8 or int32, as many; on the arena's device, as all else."""
    if arena.kernel and compiled.decode_units(arena.kernel, units, shift, mask, *numbers, values):
        return
    for start in range(0, len(units), CHUNK_NUMEL):
        stop = min(start + CHUNK_NUMEL, len(units))
        codes = arena.get("units.codes", stop - start, units.dtype)
        torch.bitwise_right_shift(units[start:stop], shift, out=codes)
        made = arena.get(DECODED_FP32, stop - start, torch.float32).copy_(codes.bitwise_and_(mask))
        spread = list(numbers.of(start, stop))
        for some, zeros, _ in spread:
            _as_matrix(made[some], zeros).sub_(zeros.float())
        _round(made, numbers.scales.dtype)
        for some, _, scales in spread:
            _as_matrix(made[some], scales).mul_(scales.float())
        if numbers.scales.dtype != values.dtype:
            _round(made, numbers.scales.dtype)
        values[start:stop].copy_(made)


def _as_matrix(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """In the shape that the numbers are broadcast to."""
    return values.view(len(numbers), -1) if numbers.shape[1] == 1 else values.view(-1, numbers.shape[1])


def _round(values: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        values.copy_(values.to(dtype))
