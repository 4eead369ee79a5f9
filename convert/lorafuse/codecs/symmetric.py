"""Weights with new codes and scales, laid out as compressed-tensors lays them out.

    float-quantized  X.weight F8_E4M3 [N, K], X.weight_scale [N, 1]
    pack-quantized   X.weight_packed I32 [N, K · bits / 32], X.weight_scale [N, K / group],
                     X.weight_shape I64 [2]

Scales are in the dtype of the weight. Codes of a row follow each other in the bits of its words, the lowest
first; words are little-endian, so that they are bytes in the same order.
"""

import struct

import torch

from lorafuse.arithmetic.arena import Arena, host_view
from lorafuse.arithmetic.symmetric import Levels, quantize, scratch_nbytes
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, Piece
from lorafuse.files.tensors import DTYPES, StoredTensor, TensorSpec

_SHAPE_NBYTES = 16


class SymmetricEncoder(Encoder):
    """A matrix whose elements share a scale in groups of a row: `group` of them, or the whole row where that
    is None."""

    __slots__ = ("_codes", "_group", "_levels", "_scales", "_shape", "_spec", "tensors")

    def __init__(self, weight: str, spec: TensorSpec, levels: Levels, group: int | None) -> None:
        """`spec`: dtype and shape that a reader gets, [N, K] with a K that is a multiple of the group."""
        n_rows, n_cols = spec.shape
        self._levels, self._group = levels, group or n_cols
        scales = StoredTensor(f"{weight}_scale", TensorSpec(spec.dtype, (n_rows, n_cols // self._group)))
        self._scales, self._shape = scales, StoredTensor(f"{weight}_shape", TensorSpec("I64", (2,)))
        if levels.whole:
            packed = TensorSpec("I32", (n_rows, n_cols * levels.bits // 32))
            self._codes = StoredTensor(f"{weight}_packed", packed)
            self.tensors: tuple[StoredTensor, ...] = (self._shape, self._codes, scales)
        else:
            self._codes = StoredTensor(weight, TensorSpec("F8_E4M3", spec.shape))
            self.tensors = (self._codes, scales)
        self._spec = spec

    clips = True

    @property
    def key(self) -> tuple[object, ...]:
        return ("symmetric", self._levels, self._group, self.tensors)

    def _scale_nbytes(self, n: int) -> int:
        """Of the scales of `n` elements."""
        return n // self._group * DTYPES[self._scales.spec.dtype][0]

    def tile_nbytes(self, n: int) -> int:
        return self._scale_nbytes(n) + self._levels.nbytes(n) + _SHAPE_NBYTES

    def scratch_nbytes(self, n: int) -> int:
        decoded = n * DTYPES[self._scales.spec.dtype][0]
        return decoded + scratch_nbytes(n, self._group)

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        """Rounds to the dtype of the scales first, then once more, to the nearest code: a code is that of
        the dense weight."""
        n = tile.stop - tile.start
        dtype = getattr(torch, self._scales.spec.torch_name)
        at, end = self._scale_nbytes(n), self._scale_nbytes(n) + self._levels.nbytes(n)
        on_host = buffer[:at].view(dtype), buffer[at:end]
        scales, codes = (arena.beside(part, f"symmetric.host{i}") for i, part in enumerate(on_host))
        made = quantize(tile.values, self._group, self._levels, codes, scales, arena)
        for part, host in zip((scales, codes), on_host, strict=True):
            arena.bring_back(part, host)
        pieces = [
            Piece(self._scales.name, self._scale_nbytes(tile.start), 0, at),
            Piece(self._codes.name, self._levels.nbytes(tile.start), at, end - at),
        ]
        if self._levels.whole and tile.start == 0:
            host_view(buffer)[end : end + _SHAPE_NBYTES] = struct.pack("<2q", *self._spec.shape)
            pieces.append(Piece(self._shape.name, 0, end, _SHAPE_NBYTES))
        return Encoded(tuple(pieces), (made.values,), made.n_clipped)

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        return encoded.raw[0]
