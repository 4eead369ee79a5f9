"""Weights of the output that are quantized here, as bitsandbytes quantizes a weight when a model is loaded.

What is quantized is the finished weight, cast to the dtype that it would have in full precision: then codes
are those of the nearest values, or, where asked for, the fp32 sums are rounded without bias onto the grid
that these scales make. Or it is the base, which training saw quantized so: then the sums are rounded onto its
own grid. All of it is computed on the host.
"""

from abc import abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.draws import Draws, TileDraws, of_run
from lorafuse.arithmetic.on_grid import SCRATCH_NBYTES, Grid, count_beyond, round_tile
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, Piece
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


class QuantizingEncoder(Encoder):
    """One weight. `rounding`: of sums onto the grid that is made of what is quantized."""

    __slots__ = ("_base", "_draws", "_dtype", "_moves", "_name", "_quant", "_spec", "_state", "rounding")

    clips = True

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        quant: BaseQuant,
        rounding: str | None,
        base: QuantizedOnLoad | None = None,
    ) -> None:
        """`spec`: (out, in). `rounding`: None where sums are not rounded, since they are what is quantized,
        or nothing changes. `base`: whose own grid it is."""
        self._name, self._spec, self._quant, self._base = name, spec, quant, base
        self._dtype: torch.dtype = getattr(torch, spec.torch_name)
        self._moves, self.rounding = rounding is not None, rounding or "nearest"
        self._draws = Draws(name) if rounding == "unbiased" else None
        self._state: Raw = ()

    @property
    def key(self) -> tuple[object, ...]:
        quant = self._quant
        how = (quant.kind, quant.double_quant, quant.blocksize, self.rounding, self._base is None)
        return ("quantizing", self._name, self._spec, *how)

    def scratch_nbytes(self, n: int) -> int:
        itemsize = DTYPES[self._spec.dtype][0]
        rounding = n * (4 + itemsize) + SCRATCH_NBYTES if self._moves else SCRATCH_NBYTES
        return n * (itemsize + self._decoded_itemsize) + rounding

    @property
    @abstractmethod
    def _decoded_itemsize(self) -> int:
        """Bytes of a decoded element."""

    @abstractmethod
    def _quantized(
        self, values: torch.Tensor, start: int, state: Raw, buffer: torch.Tensor, arena: Arena
    ) -> OnGrid:
        """Quantize the elements of the tile that begins with element `start` (1-D, on the host, in the order
        in which they are stored) into the buffer."""

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        host = arena.host
        if self._base is None:
            values, state = host.here(tile.values, "quantizing.values", self._dtype), self._state
        else:
            values, *found = self._base.loaded(tile, host)
            state = tuple(found)
        values = self._in_stored_order(values, "values", host)
        grid, stored, pieces = self._quantized(values, tile.start, state, buffer, host)
        if self._moves:
            sums = host.here(tile.values, "quantizing.sums", torch.float32)
            sums = self._in_stored_order(sums, "sums", host)
            stored, n_clipped = round_tile(grid, stored, sums, self._drawn(tile, host), host)
        else:
            n_clipped = count_beyond(grid, values, host)
        return Encoded(pieces, (arena.place(self._in_order(stored, host)),), n_clipped)

    def _in_stored_order(self, values: torch.Tensor, name: str, arena: Arena) -> torch.Tensor:
        """The values of a tile in the order in which they are stored."""
        return values

    def _in_order(self, values: torch.Tensor, arena: Arena) -> torch.Tensor:
        """What is in the order in which it is stored, in that of the weight."""
        return values

    def _drawn(self, tile: FinishedTile, arena: Arena) -> TileDraws:
        return of_run(self._draws, tile.start)

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        return encoded.raw[0]

    def release(self) -> None:
        self._state = ()


def put(buffer: torch.Tensor, at: int, tensor: torch.Tensor) -> int:
    """Copies the bytes of `tensor` (1-D) to byte `at` of the buffer. Returns where they end."""
    raw = tensor.contiguous().view(torch.uint8)
    buffer[at : at + raw.numel()].copy_(raw)
    return at + raw.numel()


def stored(name: str, dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, TensorSpec(dtype, shape))
