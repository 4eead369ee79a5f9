"""Whole numbers of a few bits, packed one after another: the lowest bits first, little-endian."""

from functools import cache

import torch


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
def signed_pairs() -> torch.Tensor:
    """float64 [256], for `look_up`: the two codes of 4 bits in each byte, low half first, minus 8."""
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    return torch.stack([byte & 15, byte >> 4], dim=1).float().sub_(8).view(torch.float64).view(-1)
