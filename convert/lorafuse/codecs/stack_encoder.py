"""A changed stack of which the base stores each matrix for itself: each stays on its own grid, under its own
names."""

import math
from collections.abc import Mapping

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, Piece
from lorafuse.codecs.own_grid import OwnGridEncoder
from lorafuse.codecs.per_expert import Stacked
from lorafuse.files.tensors import DTYPES, StoredTensor

# Tiles come in order, so those in the making are in one matrix, or in two next to each other.
N_HELD = 2


class StackEncoder(Encoder):
    """Of a stack all of whose matrices have a grid. Random numbers are those of the stack's elements."""

    clips = True
    __slots__ = ("_encoders", "_stack", "held_nbytes", "rounding", "row_multiple", "tensors")

    def __init__(self, weight: str, names: Mapping[str, str], stack: Stacked, *, unbiased: bool) -> None:
        """`names`: those of the output's tensors → those of the base's, of all matrices."""
        self._stack, self._encoders, first = stack, list[OwnGridEncoder](), 0
        for member in stack.on_grids:
            own = {out: stored for out, stored in names.items() if stored in member.names}
            self._encoders.append(OwnGridEncoder(weight, own, member, unbiased=unbiased, first=first))
            first += member.spec.numel
        tensors = (tensor for encoder in self._encoders for tensor in encoder.tensors)
        self.tensors: tuple[StoredTensor, ...] = tuple(tensors)
        self.rounding = self._encoders[0].rounding
        self.row_multiple = math.lcm(*(encoder.row_multiple for encoder in self._encoders))
        self.held_nbytes = N_HELD * max(encoder.held_nbytes for encoder in self._encoders)

    @property
    def key(self) -> tuple[object, ...]:
        return ("stack", *(encoder.key for encoder in self._encoders))

    def _n_touched(self, n: int) -> int:
        """At most so many matrices have some of `n` elements."""
        return n * len(self._encoders) // max(self._stack.spec.numel, 1) + 2

    def tile_nbytes(self, n: int) -> int:
        return self._encoders[0].tile_nbytes(n) + 2 * self._n_touched(n)

    def scratch_nbytes(self, n: int) -> int:
        return self._encoders[0].scratch_nbytes(n) + n * DTYPES[self._stack.spec.dtype][0]

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        values = arena.get("stack.recoded", tile.base.numel(), tile.base.dtype)
        pieces: list[Piece] = []
        used = n_clipped = 0
        for number, part in self._stack.tiles(tile):
            encoder = self._encoders[number]
            encoded = encoder.encode(part, buffer[used:], arena)
            values[part.start - tile.start : part.stop - tile.start].copy_(encoder.decode(encoded, arena))
            n_clipped += encoded.n_clipped
            pieces += (p if p.source else p._replace(start=p.start + used) for p in encoded.pieces)
            used = max((p.start + p.nbytes for p in pieces if not p.source), default=used)
        return Encoded(tuple(pieces), (values,), n_clipped)

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        return encoded.raw[0]

    def release(self) -> None:
        for encoder in self._encoders:
            encoder.release()
