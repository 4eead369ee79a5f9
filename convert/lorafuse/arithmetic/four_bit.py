"""NF4 and FP4 of values that are whole blocks, as bitsandbytes on the CPU makes them: codes, scales, and the
scales of scales. On the host."""

import numpy as np
import torch

from lorafuse.arithmetic import quantize
from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.dequantize import nested_absmax
from lorafuse.arithmetic.quantize import CHUNK_NUMEL, NESTED_BLOCKSIZE, Floats, block_absmax


class ScalesOfScales:
    """Double quantization: the mean of all scales and the scale of each nested block, from scales fed in
    order."""

    def __init__(self, n_blocks: int) -> None:
        self._sum, self._n_done = quantize.CascadeSum(n_blocks), 0
        n_groups = -(-n_blocks // NESTED_BLOCKSIZE)
        self._low, self._high = np.full(n_groups, np.inf, np.float32), np.full(n_groups, -np.inf, np.float32)

    def add(self, absmax: Floats) -> None:
        self._sum.add(absmax)
        group = (self._n_done + np.arange(absmax.size)) // NESTED_BLOCKSIZE
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        for extremes, largest in ((self._low, np.minimum), (self._high, np.maximum)):
            of_groups = largest.reduceat(absmax, starts)
            extremes[group[starts]] = largest(extremes[group[starts]], of_groups)
        self._n_done += absmax.size

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(float32 [nested blocks], float32 []): their scales, and the mean; to be called once. The largest
        distance from the mean is that of the lowest or highest, since rounding keeps the order."""
        mean = self._sum.mean()
        return torch.from_numpy(np.maximum(self._high - mean, mean - self._low)), torch.tensor(
            mean, dtype=torch.float32
        )


def double_quantized(
    absmax: torch.Tensor, first: int, nested: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (uint8) of scales (fp32, of the blocks from `first` on), and what they stand for (fp32)."""
    outer = nested[(first + torch.arange(absmax.numel())) // NESTED_BLOCKSIZE]
    codes = torch.from_numpy(quantize.nested_codes(absmax.numpy(), np.float32(mean.item()), outer.numpy()))
    return codes, nested_absmax(codes, quantize.dynamic_map(), outer, mean.item())


def known_scales(absmax: torch.Tensor, *, double_quant: bool) -> tuple[torch.Tensor, ...]:
    """Of the scales of all blocks (fp32): these, what a reader gets for them, what is stored of them, and
    with double quantization what ScalesOfScales finds."""
    if not double_quant:
        return absmax, absmax, absmax
    of_scales = ScalesOfScales(absmax.numel())
    of_scales.add(absmax.numpy())
    nested, mean = of_scales.result()
    codes, scales = double_quantized(absmax, 0, nested, mean)
    return absmax, scales, codes, nested, mean


def scales_of(values: torch.Tensor, blocksize: int, dtype: torch.dtype, arena: Arena) -> torch.Tensor:
    """float32, the scale of each block of `values` (1-D), which are cast to `dtype` first. Valid until the
    arena's next use."""
    absmax = arena.get("four_bit.absmax", -(-values.numel() // blocksize), torch.float32)
    for at in range(0, values.numel(), CHUNK_NUMEL):
        chunk = arena.here(values[at : at + CHUNK_NUMEL], "four_bit.chunk", dtype)
        block_absmax(chunk, blocksize, absmax[at // blocksize : (at + CHUNK_NUMEL) // blocksize], arena)
    return absmax


def nearest_levels(scaled: torch.Tensor, numel: int, kind: str, arena: Arena) -> torch.Tensor:
    """uint8 [ceil(numel / 2)]: the places in `quantize.levels` of the nearest of each, two to a byte.
    `scaled` (fp32, within -1 and 1) has room for an element more than `numel`. Valid until the arena's next
    use."""
    even = numel + numel % 2
    scaled[numel:even] = 0
    packed = arena.get("four_bit.packed", even // 2, torch.uint8)
    mask, codes = (arena.get(f"four_bit.{name}", even, torch.uint8).numpy() for name in ("mask", "codes"))
    quantize.four_bit_codes(scaled[:even].numpy(), kind, packed.numpy(), mask.view(np.bool_), codes)
    return packed


def multiply_blocks(values: torch.Tensor, scales: torch.Tensor, blocksize: int) -> None:
    """Multiplies each block of `values` (1-D), in place, by its scale, the first of those given."""
    n_full = values.numel() // blocksize
    values[: n_full * blocksize].view(-1, blocksize).mul_(scales[:n_full, None])
    if n_full * blocksize < values.numel():
        values[n_full * blocksize :].mul_(scales[n_full])
