"""Codes in words of 32 bits, of matrices that are stored transposed: an input is a row of words, an output is
a column, or one of the eight codes in a word. Turned before they are unpacked, eight times fewer elements
move."""

import torch

from lorafuse.arithmetic.bit_stream import unpack

# AWQ: output j of eight lies in half byte _AWQ[j] of a word (AutoAWQ 0.2.9, awq/utils/packing_utils.py).
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
# GPTQ v1 stores zero points minus 1, and gptqmodel adds 1 to all codes of a word at once, with carries.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def columns_as_rows(words: torch.Tensor) -> torch.Tensor:
    """uint8 [columns, 4 · rows]: the bytes of each column of `words` (int32 [rows, columns])."""
    return _turned(words).view(torch.uint8)


def rows_as_columns(rows: torch.Tensor) -> torch.Tensor:
    """The reverse of `columns_as_rows`."""
    return _turned(rows.view(torch.int32))


def _turned(words: torch.Tensor) -> torch.Tensor:
    """int32 [columns, rows]. A copy also where torch holds that the transpose is contiguous."""
    return torch.empty(words.shape[::-1], dtype=torch.int32, device=words.device).copy_(words.T)


def awq_codes(words: torch.Tensor) -> torch.Tensor:
    """uint8 [8 · columns, rows], of words (int32 [rows, columns]) that hold eight codes of 4 bits."""
    turned = _turned(words)
    n_columns, n_rows = turned.shape
    codes = torch.empty(n_columns, 8, n_rows, dtype=torch.uint8, device=words.device)
    planes = turned.view(torch.uint8).view(n_columns, n_rows, 4)
    for byte in range(4):
        plane = planes[:, :, byte].contiguous()
        torch.bitwise_and(plane, 15, out=codes[:, _AWQ.index(2 * byte)])
        torch.bitwise_right_shift(plane, 4, out=codes[:, _AWQ.index(2 * byte + 1)])
    return codes.view(8 * n_columns, n_rows)


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """The reverse of `awq_codes`."""
    n_rows = codes.shape[1]
    halves = codes.view(-1, 8, n_rows)
    planes = torch.empty(len(halves), n_rows, 4, dtype=torch.uint8, device=codes.device)
    for byte in range(4):
        high = halves[:, _AWQ.index(2 * byte + 1)] << 4
        torch.bitwise_or(halves[:, _AWQ.index(2 * byte)], high, out=planes[:, :, byte])
    return rows_as_columns(planes.view(len(halves), -1))


def gptq_zeros(words: torch.Tensor, bits: int, *, less_one: bool) -> torch.Tensor:
    """uint8 [rows, codes], of words (int32 [rows, words of a row]). `less_one`: they are stored minus 1."""
    words = words + (_ONES.get(bits, 0) if less_one else 0)
    codes = unpack(words.view(torch.uint8), bits, words.shape[1] * 32 // bits)
    return (codes + 1) & 7 if less_one and bits == 3 else codes
