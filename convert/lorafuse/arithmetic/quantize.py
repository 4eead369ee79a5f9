"""What bitsandbytes' quantizers on the CPU make of a weight, bit for bit, in pieces that stay in cache.

4-bit (bitsandbytes 0.50 backends/default/ops.py, quantize_4bit): in fp32, in blocks of `blocksize` elements,

    absmax = max |x|
    code   = the number of midpoints below x · (1 / absmax), midpoints between neighbours of quant_map

where a short last block divides, x / absmax, and absmax is at least 1e-38 there. Double quantization
(functional.py): offset = mean(absmax) in fp32, and absmax − offset is quantized again in blocks of 256, by a
table of 65536 entries, to the nearest value of a map of 256. int8 (int8_vectorwise_quant): q = round(x · (127
/ SCB)), x and SCB = max |x| of a row in fp16.

The order in which torch sums is that of one thread on x86: with more threads it is another for more than
32,768 blocks, and so is the last bit of the mean.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from lorafuse.arithmetic.arena import Arena

CHUNK_NUMEL = 1 << 17  # quantized at a time: what a chunk touches stays in cache
CHUNK_NBYTES_PER_ELEMENT = 20
NESTED_BLOCKSIZE = 256
TINY = 1e-38  # what bitsandbytes divides by at least
# By bitsandbytes' codes (functional.py, get_4bit_type). FP4 is sign, two bits of exponent, one of mantissa,
# divided by the largest.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)

Floats = NDArray[np.float32]


@cache
def quant_map(kind: str) -> torch.Tensor:
    """float32 [16]: what each code of a 4-bit type stands for."""
    return torch.from_numpy(_by_code(kind))


@cache
def levels(kind: str) -> torch.Tensor:
    """float32 [16]: the values of a 4-bit type, ascending; FP4 has two zeros."""
    return torch.from_numpy(np.sort(_by_code(kind)))


@cache
def codes_of_pairs(kind: str) -> NDArray[np.uint8]:
    """uint8 [256]: for two places in `levels`, packed in a byte, their codes, packed in the same way."""
    codes, pairs = np.argsort(_by_code(kind), kind="stable"), np.arange(256)
    packed: NDArray[np.uint8] = (codes[pairs >> 4] << 4 | codes[pairs & 15]).astype(np.uint8)
    return packed


@cache
def midpoints(kind: str) -> Floats:
    """float32 [15], or 14 for FP4: between values that differ."""
    return _between(np.unique(_by_code(kind)))


@cache
def _bounds(kind: str) -> Floats:
    """float32 [15]: between neighbouring levels, also between FP4's two zeros."""
    return _between(np.sort(_by_code(kind)))


def _between(values: Floats) -> Floats:
    return (values[:-1] + values[1:]) / np.float32(2)


def _by_code(kind: str) -> Floats:
    if kind == "nf4":
        return np.array(NF4, np.float32)
    values = np.array([*FP4, *(-value for value in FP4)], np.float32)
    normed: Floats = values / values.max()
    return normed


@cache
def dynamic_map() -> torch.Tensor:
    """float32 [256], ascending: of each of seven decades the middles of 1, 2, 4 … 64 equal parts, both signs,
    and 0 and 1 (functional.py, create_dynamic_map)."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _nearest_of_dynamic_map() -> NDArray[np.uint8]:
    """For each of 65536 equidistant values from -1 to 1, the code of the nearest in the map."""
    values = dynamic_map().numpy()
    grid = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    return np.searchsorted((values[:-1] + values[1:]) / np.float32(2), grid).astype(np.uint8)


def nested_codes(absmax: Floats, mean: np.float32, nested: Floats) -> NDArray[np.uint8]:
    """uint8 [blocks]: the codes of scales, given the scale of each one's nested block."""
    # Where all scales are equal, nested is 0. Where it is denormal or infinite, its reciprocal is infinite or
    # 0: what is no number then has code 0, in bitsandbytes too.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = (absmax - mean) * (np.float32(1) / nested)
    np.clip(x, np.float32(-1), np.float32(1), out=x)
    index = (x + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)
    index[np.isnan(x) | (nested == 0)] = 0
    return _nearest_of_dynamic_map().take(index.astype(np.int64))


def magnitudes(x: torch.Tensor, arena: Arena) -> torch.Tensor:
    """The bits of `x` (1-D) as integers, without the sign. They are in the order of |x|, NaN last, and faster
    to compare."""
    dtype = torch.int16 if x.itemsize == 2 else torch.int32
    return torch.bitwise_and(
        x.view(dtype), torch.iinfo(dtype).max, out=arena.get("quantize.bits", x.numel(), dtype)
    )


def block_absmax(x: torch.Tensor, blocksize: int, absmax: torch.Tensor, arena: Arena) -> None:
    """Fills `absmax` (fp32 [blocks]) with max |x| of each block of `x` (1-D), the last of which may be
    short."""
    bits = magnitudes(x, arena)
    n_full = x.numel() // blocksize
    absmax[:n_full].copy_(bits[: n_full * blocksize].view(-1, blocksize).amax(dim=1).view(x.dtype))
    if n_full < absmax.numel():
        absmax[n_full:].copy_(bits[n_full * blocksize :].amax(dim=0, keepdim=True).view(x.dtype)).clamp_(
            min=TINY
        )


def scale_by_blocks(x: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> None:
    """Divides each block of `x` (fp32, 1-D) by its absmax, the first of those given, in place, as
    bitsandbytes does."""
    n_full = x.numel() // blocksize
    blocks = x[: n_full * blocksize].view(-1, blocksize)
    blocks.mul_(absmax[:n_full].clamp(min=TINY).reciprocal_()[:, None])
    if n_full * blocksize < x.numel():
        x[n_full * blocksize :].div_(absmax[n_full])


def four_bit_codes(
    scaled: Floats, kind: str, packed: NDArray[np.uint8], mask: NDArray[np.bool_], codes: NDArray[np.uint8]
) -> None:
    """Fills `packed` with the positions of `scaled` (an even number) in `levels`, two a byte, high nibble
    first. `mask` and `codes` are scratch of as many elements as `scaled`."""
    codes.fill(0)
    # Counted from above, so that NaN, which is below nothing, is the highest, as in bitsandbytes.
    for bound in _bounds(kind):
        np.less_equal(scaled, bound, out=mask)
        np.add(codes, mask.view(np.uint8), out=codes)
    # A pair as one number, the first in its low byte: 15 - first in the high nibble, 15 - second in the low
    # one.
    pairs, first = codes.view(np.uint16), mask.view(np.uint16)
    np.bitwise_and(pairs, np.uint16(0xFF), out=first)
    np.left_shift(first, 4, out=first)
    np.right_shift(pairs, 8, out=pairs)
    np.bitwise_or(pairs, first, out=pairs)
    np.subtract(np.uint16(0xFF), pairs, out=pairs)
    np.copyto(packed, pairs, casting="unsafe")


class CascadeSum:
    """torch's fp32 sum of a contiguous vector of `n` numbers in one thread, fed piece by piece.

    aten/src/ATen/native/cpu/SumKernel.cpp: four vectors of 8 lanes side by side (single numbers below 8),
    summed in runs of `step` rows, the runs in runs, and so on, four levels deep; then the levels, the rest,
    the vectors and the lanes.
    """

    def __init__(self, n: int) -> None:
        self._n, self._lanes = n, 8 if n >= 8 else 1
        self._width = 4 * self._lanes
        self._n_rows = n // self._width
        self._power = max(4, max((self._n_rows - 1).bit_length(), 1) // 4)
        self._n_done = 0  # rows
        self._levels = np.zeros((4, self._width), np.float32)
        self._rest = np.empty(0, np.float32)

    def add(self, values: Floats) -> None:
        values = np.concatenate([self._rest, values])
        step = 1 << self._power
        n_runs = min(values.size // self._width, self._n_rows - self._n_done) // step
        runs = values[: n_runs * step * self._width].reshape(n_runs, step, self._width)
        sums = np.zeros((n_runs, self._width), np.float32)
        for row in range(step):
            sums += runs[:, row]
        for run in sums:
            self._n_done += step
            self._levels[0] += run
            for level in range(1, 4):
                self._levels[level] += self._levels[level - 1]
                self._levels[level - 1] = 0
                if self._n_done & ((step - 1) << (level * self._power)):
                    break
        self._rest = values[n_runs * step * self._width :]

    def total(self) -> np.float32:
        n_rows = self._n_rows - self._n_done
        rows, rest = self._rest[: n_rows * self._width], self._rest[n_rows * self._width :]
        for row in rows.reshape(n_rows, self._width):
            self._levels[0] += row
        for level in self._levels[1:]:
            self._levels[0] += level
        vectors = self._levels[0].reshape(4, self._lanes)
        n_vectors = rest.size // self._lanes
        for vector in rest[: n_vectors * self._lanes].reshape(n_vectors, self._lanes):
            vectors[0] += vector
        for vector in vectors[1:]:
            vectors[0] += vector
        total = np.float32(0)
        for number in (*rest[n_vectors * self._lanes :], *vectors[0]):
            total += number
        return total

    def mean(self) -> np.float32:
        return np.float32(self.total() / np.float32(self._n))


def int8_rows(half: torch.Tensor, scb: torch.Tensor, q: torch.Tensor) -> None:
    """Makes of `half` (fp16, 2-D) the codes `q` (fp32, of its shape), given the largest magnitudes `scb`
    (fp32) of its rows or columns, broadcast against it."""
    q.copy_(half).mul_((127.0 / scb).masked_fill_(scb == 0, 0)).round_().add_(0)  # integers have no -0
