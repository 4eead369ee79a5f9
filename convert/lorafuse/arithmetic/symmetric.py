"""Symmetric quantization of a weight with scales of its own, as compressed-tensors does it, bit for bit.

With T the dtype of the weight, x its values in T, and for each group of elements that share a scale
(compressed-tensors 0.20 quantization/utils/helpers.py, calculate_qparams, and lifecycle/forward_helpers.py,
_quantize and _dequantize)

    scale = T(max |x| / ((highest - lowest) / 2)), and the epsilon of T where this is 0
    code  = the code nearest to T(x / scale) + 0, at least `lowest` and at most `highest`, ties to even
    value = T(code · scale)

The largest value of a group lies half a step beyond the highest whole code, to which it is clipped.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.quantize import block_absmax

CHUNK_NUMEL = 1 << 17  # elements that are looked at at once: their buffers fit the cache
# Of a chunk: quotients and products in fp32, the bits of values, quotients in T, codes and their pairs,
# flags, and scales and the largest of each group.
NBYTES_PER_ELEMENT = 20


class Levels(NamedTuple):
    """The numbers that codes stand for, before they are scaled: all whole numbers, or all of float8_e4m3fn,
    from `lowest` to `highest`."""

    bits: int
    lowest: float
    highest: float
    whole: bool

    def nbytes(self, n: int) -> int:
        """Of `n` codes."""
        return n * self.bits // 8


INT4 = Levels(4, -8.0, 7.0, whole=True)
INT8 = Levels(8, -128.0, 127.0, whole=True)
E4M3 = Levels(8, -448.0, 448.0, whole=False)


class Quantized(NamedTuple):
    """`values`: what a reader decodes, in T. `n_clipped`: elements beyond the lowest or highest code."""

    values: torch.Tensor
    n_clipped: int


def scratch_nbytes(n: int, group: int) -> int:
    """What `quantize` takes for `n` elements in such groups, beside the values that it returns."""
    return min(n, max(CHUNK_NUMEL, group)) * NBYTES_PER_ELEMENT


def quantize(
    x: torch.Tensor,
    group: int,
    levels: Levels,
    codes: torch.Tensor,
    scales: torch.Tensor,
    arena: Arena,
) -> Quantized:
    """Fills `codes` (uint8) and `scales` (T, one for each group) of `x` (1-D, whole groups). Whole codes are
    stored as their sum with 2^(bits - 1); two of 4 bits share a byte, the first in the lower half. A group
    with a value that is not finite decodes to NaN."""
    values, n_clipped = arena.get("symmetric.values", x.numel(), scales.dtype), 0
    step = max(CHUNK_NUMEL // group, 1) * group
    for start in range(0, x.numel(), step):
        stop = min(start + step, x.numel())
        rounded = values[start:stop].copy_(x[start:stop])
        of_chunk = scales[start // group : stop // group]
        quotients = _scaled(rounded, group, levels, of_chunk, arena)
        n_clipped += _n_beyond(quotients, levels, arena)
        quotients.clamp_(levels.lowest, levels.highest)
        packed = codes[levels.nbytes(start) : levels.nbytes(stop)]
        if levels.whole:
            quotients.round_()
        else:
            quotients.copy_(packed.view(torch.float8_e4m3fn).copy_(quotients))
        products, factors = arena.get("symmetric.products", stop - start, torch.float32), of_chunk.float()
        torch.mul(quotients.view(-1, group), factors[:, None], out=products.view(-1, group))
        rounded.copy_(products)
        if levels.whole:
            _pack(quotients, levels.bits, packed, arena, finite=math.isfinite(float(factors.sum())))
    return Quantized(values, n_clipped)


def _scaled(x: torch.Tensor, group: int, levels: Levels, scales: torch.Tensor, arena: Arena) -> torch.Tensor:
    """fp32: T(x / scale) + 0 of a chunk; fills `scales`."""
    absmax = arena.get("symmetric.absmax", scales.numel(), torch.float32)
    block_absmax(x, group, absmax, arena)
    scales.copy_(absmax.div_((levels.highest - levels.lowest) / 2))
    scales.masked_fill_(scales == 0, torch.finfo(scales.dtype).eps)
    quotients = arena.get("symmetric.quotients", x.numel(), torch.float32).copy_(x)
    quotients.view(-1, group).div_(absmax.copy_(scales)[:, None])
    if x.dtype != torch.float32:
        quotients.copy_(arena.get("symmetric.rounded", x.numel(), x.dtype).copy_(quotients))
    return quotients.add_(0.0)  # makes 0 of -0


def _n_beyond(values: torch.Tensor, levels: Levels, arena: Arena) -> int:
    flags = arena.get("symmetric.flags", values.numel(), torch.bool)
    beyond = 0
    for compare, limit in (("greater", levels.highest), ("less", levels.lowest)):
        if arena.on_host:  # numpy compares and counts several times as fast as torch there
            getattr(np, compare)(values.numpy(), np.float32(limit), out=flags.numpy())
            beyond += int(np.count_nonzero(flags.numpy()))
        else:
            beyond += int(getattr(torch, compare)(values, limit, out=flags).count_nonzero())
    return beyond


def _pack(numbers: torch.Tensor, bits: int, packed: torch.Tensor, arena: Arena, *, finite: bool) -> None:
    """Fills `packed` with whole numbers, which are changed."""
    if not finite:
        numbers.nan_to_num_(0.0)
    numbers.add_(1 << (bits - 1))
    if bits == 8:
        packed.copy_(numbers)
        return
    codes = arena.get("symmetric.codes", numbers.numel(), torch.uint8).copy_(numbers)
    pairs = codes.view(torch.int16)  # the first in the lower byte
    shifted = arena.get("symmetric.pairs", pairs.numel(), torch.int16)
    torch.bitwise_right_shift(pairs, 4, out=shifted).bitwise_or_(pairs).bitwise_and_(0xFF)
    packed.copy_(shifted)
