"""Weights of the output that are quantized here, as bitsandbytes quantizes a weight when a model is loaded.

What is quantized is the finished weight, cast to the dtype that it would have in full precision: then codes
are those of the nearest values, or, where asked for, the fp32 sums are rounded without bias onto the grid
that these scales make. Or it is the base, which training saw quantized so: then the sums are rounded onto its
own grid. All of it is computed on the host.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from lorafuse.arithmetic.arena import Arena, transposed
from lorafuse.arithmetic.draws import Draws, TileDraws, TurnedDraws, of_run
from lorafuse.arithmetic.on_grid import SCRATCH_NBYTES, Grid, count_beyond, round_tile
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, FinishedTiles, Piece
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.files.tensors import DTYPES, StoredTensor, TensorSpec
from lorafuse.settings import BaseQuant


@runtime_checkable
class QuantizedOnLoad(Sources, Protocol):
    """Sources of a weight in full precision that training saw quantized."""

    quant: BaseQuant

    def loaded(self, tile: FinishedTile, arena: Arena) -> Raw:
        """The elements of the tile before they were quantized (1-D, in the model's dtype, on the host; valid
        until the arena's next use), and what was found of the whole weight."""


class OnGrid(NamedTuple):
    """A quantized tile. `grid` has its codes, which lie in the tile's buffer; `values` (1-D) is what they
    stand for."""

    grid: Grid
    values: torch.Tensor
    pieces: tuple[Piece, ...]


class Quantizer(Protocol):
    """How one weight is quantized, in the order (out, in) in which it is stored. A class that lists it as its
    base takes the defaults below.

    `spec`: that order's shape, and the dtype of what is quantized. `tensors`, `needs_pass`, `row_multiple`
    and `held_nbytes` are those of its encoder. `by_columns`: the weight itself is (in, out), so that a tile
    has some columns of what is stored. `decoded_itemsize`: bytes of a decoded element.
    """

    __slots__ = ()

    quant: BaseQuant
    spec: TensorSpec
    tensors: tuple[StoredTensor, ...]
    needs_pass: bool = False
    row_multiple: int = 1
    held_nbytes: int = 0
    by_columns: bool = False
    decoded_itemsize: int

    def tile_nbytes(self, n: int) -> int:
        """Bytes of a tile of `n` elements."""

    def scratch_nbytes(self, n: int) -> int:
        """Bytes of scratch for it, beyond what is quantized and what is decoded."""
        return 0

    def pass_over(self, tiles: FinishedTiles) -> Raw:
        """What tiles need of the whole weight, where `needs_pass`."""
        return ()

    def quantize(
        self, values: torch.Tensor, start: int, found: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        """Quantizes the tile that begins with element `start` (1-D, on the host, in the order in which it is
        stored) into the buffer, given what the pass over the weight found."""


class QuantizingEncoder(Encoder):
    """One weight, by its quantizer."""

    __slots__ = (
        "_base", "_draws", "_dtype", "_found", "_moves", "_name", "_quantizer", "held_nbytes", "needs_pass",
        "rounding", "row_multiple", "tensors",
    )  # fmt: skip

    clips = True

    def __init__(
        self, name: str, quantizer: Quantizer, rounding: str | None, base: QuantizedOnLoad | None = None
    ) -> None:
        """`rounding`: of sums onto the grid of what is quantized; None where sums are what is quantized, or
        nothing changes. `base`: whose own grid it is."""
        self._name, self._quantizer, self._base = name, quantizer, base
        self._dtype: torch.dtype = getattr(torch, quantizer.spec.torch_name)
        self._moves, self.rounding = rounding is not None, rounding or "nearest"
        self._draws = Draws(name) if rounding == "unbiased" else None
        self._found: Raw = ()
        self.tensors, self.row_multiple = quantizer.tensors, quantizer.row_multiple
        self.needs_pass = quantizer.needs_pass and base is None
        self.held_nbytes = quantizer.held_nbytes if base is None else 0

    @property
    def key(self) -> tuple[object, ...]:
        quantizer = self._quantizer
        return ("quantizing", self._name, quantizer.quant, quantizer.spec, self.rounding, self._base is None)

    def tile_nbytes(self, n: int) -> int:
        return self._quantizer.tile_nbytes(n)

    def scratch_nbytes(self, n: int) -> int:
        quantizer = self._quantizer
        itemsize = DTYPES[quantizer.spec.dtype][0]
        per_element = itemsize + quantizer.decoded_itemsize * (2 if self._moves else 1)
        per_element += 4 if self._moves else 0  # sums
        of_turned = per_element if quantizer.by_columns else 0
        return n * (per_element + of_turned) + quantizer.scratch_nbytes(n) + SCRATCH_NBYTES

    def prepare(self, tiles: FinishedTiles) -> None:
        self._found = self._quantizer.pass_over(tiles)

    def release(self) -> None:
        self._found = ()

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        host = arena.host
        if self._base is None:
            values, found = host.here(tile.values, "quantizing.values", self._dtype), self._found
        else:
            values, *of_base = self._base.loaded(tile, arena)
            found = tuple(of_base)
        values = self._in_stored_order(values, "values", host)
        grid, stored, pieces = self._quantizer.quantize(values, tile.start, found, buffer, host)
        if self._moves:
            sums = host.here(tile.values, "quantizing.sums", torch.float32)
            sums = self._in_stored_order(sums, "sums", host)
            stored, n_clipped, _ = round_tile(grid, stored, sums, self._drawn(tile, host), host)
        else:
            n_clipped = count_beyond(grid, values, host)
        return Encoded(pieces, (arena.place(self._in_order(stored, host)),), n_clipped)

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        return encoded.raw[0]

    def _in_stored_order(self, values: torch.Tensor, name: str, arena: Arena) -> torch.Tensor:
        """The values of a tile in the order in which they are stored."""
        if not self._quantizer.by_columns:
            return values
        return transposed(values, -1, self._quantizer.spec.shape[0], f"quantizing.turned.{name}", arena)

    def _in_order(self, values: torch.Tensor, arena: Arena) -> torch.Tensor:
        """What is in the order in which it is stored, in that of the weight."""
        if not self._quantizer.by_columns:
            return values
        return transposed(values, self._quantizer.spec.shape[0], -1, "quantizing.turned.back", arena)

    def _drawn(self, tile: FinishedTile, arena: Arena) -> TileDraws:
        if not self._quantizer.by_columns or self._draws is None:
            return of_run(self._draws, tile.start)
        n_out = self._quantizer.spec.shape[0]
        return TurnedDraws(self._draws, tile.start, (tile.stop - tile.start) // n_out, n_out, arena)


def stored(name: str, dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, TensorSpec(dtype, shape))
