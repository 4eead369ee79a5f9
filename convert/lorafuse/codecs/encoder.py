"""How a weight is stored in the output: the twin of Sources.

A weight of the output becomes one or more stored tensors. An encoder says which, before a byte is made; then
it turns the tiles of the weight into the bytes of these tensors, each with its place in them, so that tiles
may come in any order.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.measure import Measures
from lorafuse.codecs.sources import Raw
from lorafuse.files.tensors import Box, StoredTensor

# (first element, values in fp32, 1-D) of every tile of a finished weight, in order; each is valid until the
# next.
FinishedTiles = Callable[[], Iterator[tuple[int, torch.Tensor]]]


class FinishedTile(NamedTuple):
    """Elements [start, stop) of a weight, ready to be stored. `values` (1-D, in fp32, or in the dtype that
    the weight was decoded to where nothing changes it) are on the arena's device; so is `base`, what was
    decoded before any patch, from what the sources fetched (`raw`, as decode_and_keep returns it) for
    `box`."""

    start: int
    stop: int
    values: torch.Tensor
    base: torch.Tensor
    raw: Raw
    box: Box

    @property
    def is_changed(self) -> bool:
        return self.values is not self.base


class Piece(NamedTuple):
    """Bytes [start, start + nbytes) of a tile's buffer, or of `source`, and where they belong: byte `at` of
    the stored tensor `tensor`."""

    tensor: str
    at: int
    start: int
    nbytes: int
    source: memoryview | None = None

    def bytes_of(self, buffer: memoryview) -> memoryview:
        """The bytes, of a piece of a tile in that buffer."""
        return (self.source or buffer)[self.start : self.start + self.nbytes]


class Encoded(NamedTuple):
    """An encoded tile. `raw` is what `decode` needs, on the arena's device; valid until the arena's next
    use. `n_clipped`: elements beyond the largest value that the weight's codes can stand for. `measures`:
    those of what `decode` returns, where they were taken in passing."""

    pieces: tuple[Piece, ...]
    raw: tuple[torch.Tensor, ...] = ()
    n_clipped: int = 0
    measures: Measures | None = None


class Encoder(Protocol):
    """How one weight is stored. A class that lists it as its base takes the defaults below.

    `tensors`: the stored tensors that the weight becomes, in the order of the file. `needs_values`: False
    where stored bytes are copied; then a tile is a run of bytes of all tensors, one behind the other, and no
    value of the weight is computed. `needs_pass`: `prepare` looks at the whole finished weight.
    `row_multiple`: a tile covers whole multiples of so many rows. `held_nbytes`: held from the weight's first
    tile to its last. `clips`: codes cannot stand for any value; `rounding`: a word of `--rounding`, then.
    """

    __slots__ = ()

    tensors: tuple[StoredTensor, ...]
    needs_values: bool = True
    needs_pass: bool = False
    row_multiple: int = 1
    held_nbytes: int = 0
    clips: bool = False
    rounding: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Two encoders of one weight with equal keys make the same bytes out of the same values."""

    def tile_nbytes(self, n: int) -> int:
        """Bytes of an encoded tile of `n` elements (of `n` bytes, where no values are needed)."""

    def scratch_nbytes(self, n: int) -> int:
        """Bytes that a worker holds while it encodes a tile of `n` elements, beyond the tile itself."""
        return 0

    def prepare(self, tiles: FinishedTiles) -> None:
        """Compute what encoding needs of the whole finished weight. Called before the first tile where
        `needs_pass`."""
        return

    def will_need(self, start: int, stop: int) -> None:
        """Hint that the tile [start, stop) is encoded soon."""
        return

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        """Fill `buffer` (uint8 on the host) with the bytes of the tile. Rounds once."""

    def copy(self, start: int, stop: int, buffer: torch.Tensor) -> tuple[Piece, ...]:
        """Fill `buffer` with the stored bytes [start, stop), where no values are needed."""
        raise AssertionError("values are needed")

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        """What a reader will decode from these bytes: 1-D, in any floating-point dtype, on the arena's
        device."""

    def release(self) -> None:
        """Drop what prepare computed."""
        return
