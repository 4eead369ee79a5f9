"""Codes of rows of a matrix, as numbers in fp32: what a row's bytes are, before scales."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.bit_stream import pack, pack_words, unpack, unpack_floats, unpack_words
from lorafuse.arithmetic.dequantize import look_up
from lorafuse.arithmetic.small_floats import (
    decode_float8,
    e2m1_pairs,
    e2m1_values,
    e2m3,
    e2m3_values,
)

# (bytes of whole rows: uint8, 1-D; rows; columns; arena) → fp32, 1-D, in the arena's DECODED_FP32.
Decode = Callable[[torch.Tensor, int, int, Arena], torch.Tensor]


class Kind:
    """How the levels of codes can be had: out of their table; code + the first of them; and where codes are
    bytes, as signed numbers or E4M3. As kernel.c has them."""

    TABLE, WHOLE, SIGNED, E4M3 = range(4)


class Codes(NamedTuple):
    """How a row of codes is stored: its bytes, how they are decoded, bits of a code, and what each code
    stands for before scales (fp32 [2^bits])."""

    row_nbytes: int
    decode: Decode
    bits: int
    levels: torch.Tensor
    padded: bool = False  # no code crosses two words of 32 bits
    kind: int = Kind.TABLE

    def read(self, raw: torch.Tensor, n_rows: int, n_cols: int) -> torch.Tensor:
        """uint8, 1-D, of its own: the codes of whole rows (bytes: uint8, 1-D)."""
        take = unpack_words if self.padded else unpack
        return take(raw.view(n_rows, -1), self.bits, n_cols).clone(memory_format=_PACKED).view(-1)

    def changed(self, raw: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """uint8, 1-D: the bytes of rows whose codes were `before` and shall be `after`. Bits of no code
        stay."""
        put = pack_words if self.padded else pack
        n_rows = raw.numel() // self.row_nbytes
        change = put((before ^ after).view(n_rows, -1), self.bits, self.row_nbytes)
        return raw ^ change.reshape(-1)


_PACKED = torch.contiguous_format


class Numbers(NamedTuple):
    """Scales, and zero points where there are any, of rows of codes: float32 [rows or 1, groups]. `group_of`:
    the group of each column (int32 or int64, 1-D), or how many columns in a row share one. A value is (code −
    zero) · scale in fp32, or where zeros `are_biases` code · scale + bias, of which the product is rounded to
    the dtype of the weight."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_of: torch.Tensor | int
    are_biases: bool = False

    def of(self, rows: slice) -> "Numbers":
        """Those of some rows."""
        zeros = self.zeros if self.zeros is None or len(self.zeros) == 1 else self.zeros[rows]
        scales = self.scales if len(self.scales) == 1 else self.scales[rows]
        return self._replace(scales=scales, zeros=zeros)


@cache
def float8_levels(dtype: torch.dtype) -> torch.Tensor:
    """float32 [256]: the numbers of a float8 dtype by their codes."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()


@cache
def _signed_bytes() -> torch.Tensor:
    return whole_numbers(8, 128).roll(128)


@cache
def whole_numbers(bits: int, less: int) -> torch.Tensor:
    """Each code minus `less`."""
    return torch.arange(-less, (1 << bits) - less, dtype=torch.float32, device="cpu")


def float8_codes(n_cols: int, dtype: torch.dtype) -> Codes:
    """Numbers of a float8 dtype."""

    def decode(raw: torch.Tensor, n_rows: int, n_cols: int, arena: Arena) -> torch.Tensor:
        values = arena.get(DECODED_FP32, raw.numel(), torch.float32)
        decode_float8(raw, dtype, values, arena)
        return values

    kind = Kind.E4M3 if dtype == torch.float8_e4m3fn else Kind.TABLE
    return Codes(n_cols, decode, 8, float8_levels(dtype), kind=kind)


def int8_codes(n_cols: int) -> Codes:
    """Signed bytes."""

    def decode(raw: torch.Tensor, n_rows: int, n_cols: int, arena: Arena) -> torch.Tensor:
        return arena.get(DECODED_FP32, raw.numel(), torch.float32).copy_(raw.view(torch.int8))

    return Codes(n_cols, decode, 8, _signed_bytes(), kind=Kind.SIGNED)


def e2m1_codes(n_cols: int) -> Codes:
    """Two numbers of 4 bits in a byte, the low half first; `n_cols` is even."""

    def decode(raw: torch.Tensor, n_rows: int, n_cols: int, arena: Arena) -> torch.Tensor:
        values = arena.get(DECODED_FP32, 2 * raw.numel(), torch.float32)
        look_up(raw, e2m1_pairs(), values, arena)
        return values

    return Codes(n_cols // 2, decode, 4, e2m1_values())


def e2m3_codes(n_cols: int) -> Codes:
    """Four numbers of 6 bits in three bytes, the lowest bits first; `n_cols` is a multiple of 4."""

    def decode(raw: torch.Tensor, n_rows: int, n_cols: int, arena: Arena) -> torch.Tensor:
        values = arena.get(DECODED_FP32, n_rows * n_cols, torch.float32)
        e2m3(unpack(raw.view(n_rows, -1), 6, n_cols).reshape(-1), values, arena)
        return values

    return Codes(n_cols * 6 // 8, decode, 6, e2m3_values())


def packed_codes(n_cols: int, bits: int, *, padded: bool = False, offset: int | None = None) -> Codes:
    """Whole numbers of `bits` bits in words of 32, each stored as its sum with `offset`, by default
    2^(bits − 1). `padded`: no code crosses two words."""
    less = 1 << (bits - 1) if offset is None else offset
    n_words = -(-n_cols // (32 // bits)) if padded else -(-n_cols * bits // 32)

    def decode(raw: torch.Tensor, n_rows: int, n_cols: int, arena: Arena) -> torch.Tensor:
        if not padded:
            return unpack_floats(raw.view(n_rows, -1), bits, n_cols, arena, less)
        values = arena.get(DECODED_FP32, n_rows * n_cols, torch.float32)
        values.view(n_rows, n_cols).copy_(unpack_words(raw.view(n_rows, -1), bits, n_cols))
        return values.sub_(less)

    return Codes(4 * n_words, decode, bits, whole_numbers(bits, less), padded, Kind.WHOLE)
