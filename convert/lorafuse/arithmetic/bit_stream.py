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


@cache
def signed_pairs() -> torch.Tensor:
    """float64 [256], for `look_up`: the two codes of 4 bits in each byte, low half first, minus 8."""
    byte = torch.arange(256, dtype=torch.int64, device="cpu")
    return torch.stack([byte & 15, byte >> 4], dim=1).float().sub_(8).view(torch.float64).view(-1)
