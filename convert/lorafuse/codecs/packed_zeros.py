"""Zero points of compressed-tensors' packed integers, which are packed along the rows of the weight."""

from dataclasses import dataclass

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.bit_stream import unpack_apart, unpack_words
from lorafuse.files.stores import Store


@dataclass(frozen=True, slots=True)
class PackedZeros:
    """I32 [words, n_cols]: in a column, the zero points of a weight's rows follow each other as codes do in a
    row of the weight. `padded`: none crosses two words."""

    name: str
    bits: int
    padded: bool
    n_words: int
    n_cols: int

    @property
    def _period(self) -> tuple[int, int]:
        """(rows, words): after so many rows, a zero point begins with a word again."""
        return (32 // self.bits, 1) if self.padded else (32, self.bits)

    def fetch(self, rows: range, store: Store, arena: Arena, role: str) -> torch.Tensor:
        """The words of these rows, uint8, 1-D, in scratch that is called after the role."""
        n_rows, n_words = self._period
        first = rows.start // n_rows * n_words
        last = min(-(-rows.stop // n_rows) * n_words, self.n_words)
        return arena.fetch(role, store, self.name, first * self.n_cols * 4, (last - first) * self.n_cols * 4)

    def values(self, raw: torch.Tensor, arena: Arena) -> torch.Tensor:
        """fp32 [rows, n_cols] of what was fetched, from the first row of a period on."""
        columns = raw.view(torch.int32).view(-1, self.n_cols).T.reshape(-1).view(torch.uint8)
        n_rows, n_words = self._period
        n_codes = raw.numel() // (4 * self.n_cols) * n_rows // n_words
        columns = columns.view(self.n_cols, -1)
        less = 1 << (self.bits - 1)
        if self.padded and 32 % self.bits:
            return unpack_words(columns, self.bits, n_codes).T.float().sub_(less)
        return (
            unpack_apart(columns, self.bits, n_codes, arena, less).view(self.n_cols, n_codes).T.contiguous()
        )

    def by_rows(self, values: torch.Tensor, rows: range) -> torch.Tensor:
        """[rows, n_cols]."""
        skipped = rows.start % self._period[0]
        return values[skipped : skipped + len(rows)]
