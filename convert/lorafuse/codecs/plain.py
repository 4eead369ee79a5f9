"""Weights of the output as they are computed: one tensor in a dtype of its own."""

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.measure import store_tile
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, Piece
from lorafuse.files.tensors import DTYPES, StoredTensor, TensorSpec


class PlainEncoder(Encoder):
    """One stored tensor of the weight's own name: its values, cast to `spec.dtype`."""

    __slots__ = ("_dtype", "_itemsize", "tensors")

    def __init__(self, name: str, spec: TensorSpec) -> None:
        self.tensors: tuple[StoredTensor, ...] = (StoredTensor(name, spec),)
        self._itemsize, torch_name = DTYPES[spec.dtype]
        self._dtype: torch.dtype = getattr(torch, torch_name)

    @property
    def key(self) -> tuple[object, ...]:
        return ("plain", self.tensors[0].spec)

    def tile_nbytes(self, n: int) -> int:
        return n * self._itemsize

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        """The one rounding, to nearest even."""
        nbytes = (tile.stop - tile.start) * self._itemsize
        finished = buffer[:nbytes].view(self._dtype)
        stored, measures = arena.beside(finished, "plain.stored"), None
        if tile.is_changed:
            measures = store_tile(tile.base, tile.values, stored, arena)
        else:
            stored.copy_(tile.values)
        arena.bring_back(stored, finished)
        pieces = (Piece(self.tensors[0].name, tile.start * self._itemsize, 0, nbytes),)
        return Encoded(pieces, (stored,), measures=measures)

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        return encoded.raw[0]
