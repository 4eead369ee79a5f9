"""Weights of the output that stay as the base stores them, bit for bit: dense ones that nothing changes, and
quantized ones with their companions."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena, host_view
from lorafuse.codecs.encoder import Encoded, Encoder, Piece
from lorafuse.files.stores import Store
from lorafuse.files.tensors import StoredTensor


class StoredEncoder(Encoder):
    """The stored tensors `names` of the output (output's name → base's name), copied."""

    needs_values = False

    def __init__(
        self, store: Store, names: Mapping[str, str], config: Mapping[str, Any] | None = None
    ) -> None:
        self._store, self._names, self._config = store, dict(names), dict(config or {})
        specs = ((name, store.tensors[stored].spec) for name, stored in names.items())
        self.tensors: tuple[StoredTensor, ...] = tuple(StoredTensor(name, spec) for name, spec in specs)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def key(self) -> tuple[object, ...]:
        return ("stored", *self._names.items())

    def tile_nbytes(self, n: int) -> int:
        return n

    def _pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The parts of the tensors that bytes [start, stop) of all of them are."""
        first = 0  # byte of the tensor among those of all
        for tensor in self.tensors:
            begin, end = max(start, first), min(stop, first + tensor.nbytes)
            if begin < end:
                yield Piece(tensor.name, begin - first, begin - start, end - begin)
            first += tensor.nbytes

    def will_need(self, start: int, stop: int) -> None:
        for piece in self._pieces(start, stop):
            self._store.will_need(self._names[piece.tensor], piece.at, piece.nbytes)

    def encode(
        self, values: torch.Tensor, start: int, stop: int, buffer: torch.Tensor, arena: Arena
    ) -> Encoded:
        """Reads the bytes [start, stop) of all tensors; `values` is not looked at."""
        pieces, view = tuple(self._pieces(start, stop)), host_view(buffer)
        for piece in pieces:
            self._store.read_into(
                self._names[piece.tensor], piece.at, view[piece.start : piece.start + piece.nbytes]
            )
        return Encoded(pieces)

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        raise AssertionError("what is copied is not measured")
