"""Weights of the output that stay as the base stores them, bit for bit: dense ones that nothing changes, and
quantized ones with their companions."""

from collections.abc import Iterator, Mapping

import torch

from lorafuse.arithmetic.arena import Arena, host_view
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, Piece
from lorafuse.codecs.sources import Sources
from lorafuse.files.stores import Store
from lorafuse.files.tensors import StoredTensor


def stored_names(weight: str, of_base: str, sources: Sources) -> dict[str, str]:
    """{name in the output: name in the base} of the stored tensors of `weight`. They lie in its module; in a
    model that repeats layers, this is not the module that they lie in in the base, under the weight
    `of_base`."""
    here, there = (name.rpartition(".")[0] for name in (weight, of_base))
    return {
        here + name.removeprefix(there) if name.startswith(there) else name: name for name in sources.names
    }


class StoredEncoder(Encoder):
    """The stored tensors `names` of the output (output's name → base's name), copied."""

    needs_values = False

    __slots__ = ("_store", "_stored", "tensors")  # most weights of a large model have one

    def __init__(self, store: Store, names: Mapping[str, str]) -> None:
        self._store, self._stored = store, tuple(names.values())
        specs = ((name, store.tensors[stored].spec) for name, stored in names.items())
        self.tensors: tuple[StoredTensor, ...] = tuple(StoredTensor(name, spec) for name, spec in specs)

    @property
    def key(self) -> tuple[object, ...]:
        return ("stored", *(tensor.name for tensor in self.tensors), *self._stored)

    def tile_nbytes(self, n: int) -> int:
        return n

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[str, Piece]]:
        """The parts of the tensors that bytes [start, stop) of all of them are, each with its tensor's name
        in the base."""
        first = 0  # byte of the tensor among those of all
        for stored, tensor in zip(self._stored, self.tensors, strict=True):
            begin, end = max(start, first), min(stop, first + tensor.nbytes)
            if begin < end:
                yield stored, Piece(tensor.name, begin - first, begin - start, end - begin)
            first += tensor.nbytes

    def will_need(self, start: int, stop: int) -> None:
        for stored, piece in self._pieces(start, stop):
            self._store.will_need(stored, piece.at, piece.nbytes)

    def copy(self, start: int, stop: int, buffer: torch.Tensor) -> tuple[Piece, ...]:
        """Reads the bytes [start, stop) of all tensors."""
        pieces, view = list(self._pieces(start, stop)), host_view(buffer)
        for stored, piece in pieces:
            self._store.read_into(stored, piece.at, view[piece.start : piece.start + piece.nbytes])
        return tuple(piece for _, piece in pieces)

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        raise AssertionError("what is copied has no values")

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        raise AssertionError("what is copied is not measured")
