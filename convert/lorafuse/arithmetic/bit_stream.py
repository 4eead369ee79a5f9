"""Whole numbers of a few bits, packed one after another: the lowest bits first, little-endian."""

from functools import cache

import torch

from lorafuse.arithmetic import compiled
from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.dequantize import NARROW

# Bits of a code → bits of a row that are looked up at once: two or four codes.
_LOOKED_UP = {2: 8, 3: 12, 4: 8, 5: 10, 6: 12}
# Such numbers of bits → halves of words that they fill.
_HALVES = {8: 1, 10: 5, 12: 3}


def unpack(packed: torch.Tensor, bits: int, n_codes: int) -> torch.Tensor:
    """uint8 [rows, n_codes], of `packed` (uint8 [rows, bytes]): code i of a row is its bits
    [i · bits, (i + 1) · bits). `bits` is 1 to 8."""
    if bits == 8:
        return packed[:, :n_codes]
    n_rows, n_bytes = packed.shape
    # Eight codes fill `bits` bytes: a group. A row's last group may be cut off.
    n_groups = -(-n_codes // 8)
    missing = n_groups * bits - n_bytes
    if missing > 0:
        packed = torch.nn.functional.pad(packed, (0, missing))
    groups = packed[:, : n_groups * bits].reshape(n_rows, n_groups, bits)
    codes = torch.empty(n_rows, n_groups, 8, dtype=torch.uint8, device=packed.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = groups[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (groups[:, :, byte + 1] << (8 - shift))
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[:, :, place])
    return codes.view(n_rows, -1)[:, :n_codes]


def unpack_words(packed: torch.Tensor, bits: int, n_codes: int) -> torch.Tensor:
    """The same where no code crosses two words of 32 bits: each holds 32 // bits codes, and its highest bits
    nothing."""
    per_word = 32 // bits
    words = packed.contiguous().view(torch.int32)
    codes = torch.empty(*words.shape, per_word, dtype=torch.uint8, device=packed.device)
    for place in range(per_word):
        codes[:, :, place] = (words >> (place * bits)) & ((1 << bits) - 1)
    return codes.view(len(words), -1)[:, :n_codes]


def unpack_floats(packed: torch.Tensor, bits: int, n_codes: int, arena: Arena, less: int = 0) -> torch.Tensor:
    """The codes that `unpack` has, each minus `less`: float32, 1-D, in the arena's DECODED_FP32. Several at
    once come out of a table, which takes a tenth of the time."""
    values = arena.get(DECODED_FP32, len(packed) * n_codes, torch.float32)
    if not _looked_up(packed, bits, n_codes) or _is_faster(arena, packed):
        return _unpacked(packed, bits, n_codes, arena, less, values)
    n_numbers = values.numel() * bits // _LOOKED_UP[bits]
    numbers = arena.get(NARROW, 2 * n_numbers, torch.int16).view(torch.int32)
    _numbers(packed.reshape(-1), _LOOKED_UP[bits], numbers)
    table = arena.table(_table(bits, less))
    torch.index_select(table, 0, numbers, out=values.view(table.dtype))
    return values


def unpack_apart(packed: torch.Tensor, bits: int, n_codes: int, arena: Arena, less: int = 0) -> torch.Tensor:
    """The same by no scratch of the arena's, in which a decoded weight and a sum may be."""
    values = torch.empty(len(packed) * n_codes, dtype=torch.float32, device=packed.device)
    return _unpacked(packed, bits, n_codes, arena, less, values)


def _is_faster(arena: Arena, packed: torch.Tensor) -> bool:
    """Whether the kernel is there, and faster than the table: below AVX2, shifts by different numbers are
    not."""
    return bool(arena.kernel and arena.kernel.level) and packed.is_contiguous()


def _unpacked(
    packed: torch.Tensor, bits: int, n_codes: int, arena: Arena, less: int, values: torch.Tensor
) -> torch.Tensor:
    if arena.kernel and _is_faster(arena, packed):
        compiled.unpack_floats(arena.kernel, packed, bits, n_codes, less, values)
        return values
    values.copy_(unpack(packed, bits, n_codes).reshape(-1))
    return values.sub_(less) if less else values


def _looked_up(packed: torch.Tensor, bits: int, n_codes: int) -> bool:
    """Whether rows are whole numbers that are looked up, and all of them whole halves of words."""
    whole = bits in _LOOKED_UP and n_codes * bits == packed.shape[1] * 8 and n_codes % 8 == 0
    return (
        whole and packed.numel() % (2 * _HALVES[_LOOKED_UP[bits]]) == 0 and packed.storage_offset() % 2 == 0
    )


def _numbers(packed: torch.Tensor, bits: int, numbers: torch.Tensor) -> None:
    """numbers (int32) = those of 8, 10 or 12 bits that bytes (uint8, 1-D) are one after another."""
    if bits == 8:
        numbers.copy_(packed)
        return
    # So many numbers fill so many halves of words; each lies in one half or in two.
    n_halves = _HALVES[bits]
    made = numbers.view(-1, n_halves * 16 // bits)
    groups = packed.view(torch.int16).view(-1, n_halves)
    halves = [groups[:, place].int().bitwise_and_(0xFFFF) for place in range(n_halves)]
    for number in range(made.shape[1]):
        place, shift = divmod(number * bits, 16)
        low = halves[place]
        both = torch.add(low, halves[place + 1], alpha=1 << 16) if shift + bits > 16 else low
        made[:, number] = both >> shift if shift else both
    numbers.bitwise_and_((1 << bits) - 1)


def pack(codes: torch.Tensor, bits: int, n_bytes: int) -> torch.Tensor:
    """The reverse of `unpack`: uint8 [rows, n_bytes] of codes (uint8 [rows, n_codes]); other bits are 0."""
    n_rows, n_codes = codes.shape
    if bits == 8:
        return torch.nn.functional.pad(codes, (0, n_bytes - n_codes))
    n_groups = -(-n_codes // 8)
    codes = torch.nn.functional.pad(codes, (0, 8 * n_groups - n_codes)).view(n_rows, n_groups, 8)
    groups = torch.zeros(n_rows, n_groups, bits, dtype=torch.uint8, device=codes.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        groups[:, :, byte] |= codes[:, :, place] << shift
        if shift + bits > 8:
            groups[:, :, byte + 1] |= codes[:, :, place] >> (8 - shift)
    packed = groups.view(n_rows, -1)[:, :n_bytes]
    return torch.nn.functional.pad(packed, (0, n_bytes - packed.shape[1]))


def pack_words(codes: torch.Tensor, bits: int, n_bytes: int) -> torch.Tensor:
    """The reverse of `unpack_words`."""
    per_word, n_words = 32 // bits, n_bytes // 4
    codes = torch.nn.functional.pad(codes, (0, per_word * n_words - codes.shape[1]))
    codes = codes.view(len(codes), n_words, per_word)
    words = torch.zeros(codes.shape[:2], dtype=torch.int32, device=codes.device)
    for place in range(per_word):
        words |= codes[:, :, place].int() << (place * bits)
    return words.view(torch.uint8)


@cache
def _table(bits: int, less: int) -> torch.Tensor:
    """For every number of as many bits as are looked up, the codes in it, viewed as one element."""
    n_codes = _LOOKED_UP[bits] // bits
    numbers = torch.arange(1 << _LOOKED_UP[bits], dtype=torch.int64, device="cpu")
    codes = torch.stack([numbers >> (place * bits) for place in range(n_codes)], dim=1)
    values = codes.bitwise_and_((1 << bits) - 1).float().sub_(less)
    return values.view(torch.float64 if n_codes == 2 else torch.complex128).view(-1)
