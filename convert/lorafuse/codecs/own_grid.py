"""Changed weights that stay stored as the base stores them: scales and all else are the base's own bytes,
and codes move to a neighbouring value of the base's own grid, without bias (arithmetic/on_grid.py)."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.draws import Draws
from lorafuse.arithmetic.measure import Measures
from lorafuse.arithmetic.on_grid import SCRATCH_NBYTES
from lorafuse.codecs.encoder import Encoded, Encoder, FinishedTile, Piece
from lorafuse.codecs.sources import Sources
from lorafuse.codecs.stored import StoredEncoder
from lorafuse.codecs.strips import N_STRIPS_HELD, STRIP_NBYTES, Run, Strips
from lorafuse.files.tensors import DTYPES, StoredTensor

N_TILES_AHEAD = 8
# Companions are copied beside one tile of several, so many bytes and a tile's share at a time: a call for
# each tile would cost more than the copy.
COPIED_NBYTES = 1 << 16


class Recoded(NamedTuple):
    """A tile whose codes are those of the sums. `codes`: runs of a buffer that hold them; `values` (1-D) is
    what a reader decodes; `measures` as in Encoded."""

    codes: tuple[Run, ...]
    values: torch.Tensor
    n_clipped: int
    measures: Measures | None = None


@runtime_checkable
class GridSources(Sources, Protocol):
    """Sources whose codes can be written anew. `names[0]` are the codes; `grid_rows`: tiles begin at whole
    multiples of so many rows, where codes begin at whole bytes."""

    grid_rows: int
    grid_nbytes_per_element: int = 0  # of a tile, beyond what round_tile takes
    scattered: bool = False  # the codes of a tile are parts of many stored rows

    def codes_nbytes(self, n: int) -> int:
        """At most so many bytes hold the codes of a tile of `n` elements."""

    def recode(self, tile: FinishedTile, draws: Draws | None, buffer: torch.Tensor, arena: Arena) -> Recoded:
        """Fill `buffer` with the codes of the tile's values: without bias, or to the nearest value where
        `draws` is None."""


class OwnGridEncoder(Encoder):
    """A changed weight on the grid of the base. Companions are copied in slices, beside the tiles."""

    clips = True
    __slots__ = (
        "_beside_nbytes",
        "_codes",
        "_companions",
        "_draws",
        "_first",
        "_numel",
        "_sources",
        "_strips",
        "held_nbytes",
        "rounding",
        "row_multiple",
        "tensors",
    )

    def __init__(
        self, weight: str, names: Mapping[str, str], sources: GridSources, *, unbiased: bool, first: int = 0
    ) -> None:
        """`names`: those of the output's tensors → those of the base's, the codes first. `first`: the element
        of the weight that the first of `sources` is, where others are a part of the weight too."""
        specs = ((out, sources.store.tensors[stored].spec) for out, stored in names.items())
        self.tensors: tuple[StoredTensor, ...] = tuple(StoredTensor(out, spec) for out, spec in specs)
        codes, *_ = names
        self._codes, self._sources, self._numel = codes, sources, max(sources.spec.numel, 1)
        self._companions = StoredEncoder(sources.store, {out: names[out] for out in names if out != codes})
        self._beside_nbytes = sum(tensor.nbytes for tensor in self._companions.tensors)
        self._draws, self._first = Draws(weight) if unbiased else None, first
        self.rounding = "unbiased" if unbiased else "nearest"
        self.row_multiple = sources.grid_rows
        self._strips = Strips(codes)
        most = min(N_STRIPS_HELD * STRIP_NBYTES, self.tensors[0].nbytes)
        self.held_nbytes = most if sources.scattered else 0

    @property
    def key(self) -> tuple[object, ...]:
        return ("own grid", self._codes, self._draws is None)

    def _companion_bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Those that are copied beside the elements [start, stop) of the sources."""
        nbytes = self._beside_nbytes
        first, last = (nbytes * at // self._numel // COPIED_NBYTES * COPIED_NBYTES for at in (start, stop))
        return first, nbytes if stop == self._numel else last

    def tile_nbytes(self, n: int) -> int:
        beside = self._beside_nbytes * n // self._numel + 1 + COPIED_NBYTES
        return self._sources.codes_nbytes(n) + min(beside, self._beside_nbytes)

    def scratch_nbytes(self, n: int) -> int:
        stored = DTYPES[self._sources.spec.dtype][0]
        # Codes of the tiles that a worker is ahead of the writer lie in strips too.
        strips = N_TILES_AHEAD * self._sources.codes_nbytes(n) if self._sources.scattered else 0
        return n * (stored + self._sources.grid_nbytes_per_element) + SCRATCH_NBYTES + strips

    def encode(self, tile: FinishedTile, buffer: torch.Tensor, arena: Arena) -> Encoded:
        runs, values, n_clipped, measures = self._sources.recode(tile, self._draws, buffer, arena)
        used = max((run.start + run.times * run.nbytes for run in runs), default=0)
        pieces = [piece for run in runs for piece in self._pieces(run, buffer)]
        first, last = self._companion_bytes(tile.start - self._first, tile.stop - self._first)
        copied = self._companions.copy(first, last, buffer[used:]) if first < last else ()
        pieces += (piece._replace(start=piece.start + used) for piece in copied)
        return Encoded(tuple(pieces), (values,), n_clipped, measures)

    def _pieces(self, run: Run, buffer: torch.Tensor) -> Iterable[Piece]:
        if run.times > 1:
            return self._strips.add(run, buffer)
        return (Piece(self._codes, run.at, run.start, run.nbytes),)

    def decode(self, encoded: Encoded, arena: Arena) -> torch.Tensor:
        return encoded.raw[0]

    def release(self) -> None:
        self._strips.drop()
