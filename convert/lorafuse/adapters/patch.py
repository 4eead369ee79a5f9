"""What an adapter does to one weight: a tile goes in, a tile comes out.

A patch is not "a delta": it may replace rows or rescale them. `prepare` and `release` bracket the tiles of its weight.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lorafuse.codecs.sources import Arena, Sources
from lorafuse.tensors import TensorSpec

# Elements of a tile. It depends on nothing, so that the bytes written do not either; a tile of this size stays in cache while it is
# decoded, updated and cast, and smaller ones cost more in calls (bench/tiles.py).
TILE_NUMEL = 1 << 19
COMPARE_NUMEL = 1 << 18
WHOLE = -1


@dataclass(frozen=True)
class Base:
    """The weight before any patch, as fp32, for patches that need a statistic of it: norms of columns, an SVD."""

    sources: Sources
    arena: Arena

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (of the first dimension) and elements per row."""
        return self.sources.spec.shape[0], self.sources.spec.n_cols

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, n_cols]; valid until the next call."""
        n_cols = self.shape[1]
        first, last = start * n_cols, stop * n_cols
        values = self.sources.decode(self.sources.fetch(first, last, self.arena), first, last, self.arena)
        return self.arena.get("base.rows", last - first, torch.float32).copy_(values).view(-1, n_cols)

    def tiles(self, numel: int = 1 << 18) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) over the whole weight, about `numel` elements at a time."""
        n_rows, n_cols = self.shape
        step = max(numel // max(n_cols, 1), 1)
        for start in range(0, n_rows, step):
            yield start, self.rows(start, min(start + step, n_rows))


class Patch(Protocol):
    """An update of one weight. A class that lists it as its base takes the defaults below."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the receipt says about it: rank, scale."""
        return {}

    @property
    def nbytes(self) -> int:
        """Held from prepare to release."""
        return 0

    @property
    def scratch_nbytes(self) -> int:
        """Needed by each worker while it patches a tile."""
        return 0

    @property
    def stacked(self) -> bool:
        """The weight is a stack of matrices: its rows are those of all matrices, and a tile stays within one of them."""
        return False

    @property
    def members(self) -> tuple["Patch", ...]:
        """The patches that it is made of, if any."""
        return ()

    @property
    def reads_base(self) -> bool:
        """Whether prepare reads the weight."""
        return True

    @property
    def holds_weight(self) -> bool:
        """Whether it holds the whole weight from prepare to release, for a decomposition; the plan says so."""
        return any(patch.holds_weight for patch in self.members)

    @property
    def additive(self) -> bool:
        """Whether apply adds what does not depend on the values in the tile, so that it may follow another adapter's patches."""
        return False

    @property
    def follows_tie(self) -> bool:
        """Whether a tied embedding has this update too when the adapter names only the other."""
        return False

    @property
    def row_multiple(self) -> int:
        """Tiles start at multiples of this many rows, for patches that mix neighbouring rows."""
        return 1

    def prepare(self, base: Base, arena: Arena) -> None:
        """Load what the tiles need. `base` reads the weight, for statistics of the whole."""

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        """Update `tile` (fp32 [rows, n_cols], rows from first_row on) in place."""

    def release(self) -> None:
        """Drop what prepare loaded."""

    def same_as(self, other: "Patch") -> bool:
        """Whether both make the same update; tied weights need to know."""
        return False


@dataclass(frozen=True, slots=True)
class Part:
    """What a weight holds of a parameter, where these differ because loading stacks, joins or cuts tensors.

    Rows [row, row + n_rows) of the parameter are rows [weight_row, …) of the weight; with `expert`, the parameter is a stack of
    matrices, and rows are those of that matrix.
    """

    weight: str
    n_rows: int = WHOLE
    row: int = 0
    weight_row: int = 0
    expert: int | None = None
    transposed: bool = False  # in memory

    @property
    def whole(self) -> bool:
        """Whether weight and parameter hold the same."""
        return self.expert is None and self.row == self.weight_row == 0 and self.n_rows == WHOLE


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model in memory, found in the checkpoint: its shape there, and the weights that hold it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    in_out: bool = False  # a stack that transformers 5 keeps as (E, in, out), against its custom


@dataclass(frozen=True)
class Target:
    """The weight that an update found: its name in the checkpoint, spec, and whether its matrix is stored as (in, out), as
    HF Conv1D's is."""

    name: str
    spec: TensorSpec
    is_conv1d: bool
    part: Part | None = None
    beside: Sources | None = None  # the other parameter that the update asked for, before any patch
    quantized: bool = False  # whether the base is


@dataclass(frozen=True)
class Update:
    """What an adapter says about one parameter, before the checkpoint is known: a replacement, or a patch that
    `make(target)` builds, which raises AdapterError when it does not fit.

    An `optional` one is left out where the checkpoint has no such parameter (a bias); its keys belong to another update too.
    """

    parameter: str  # in the adapter's naming
    keys: tuple[str, ...]
    replaced: Sources | None = None
    make: Callable[[Target], Patch] | None = None
    optional: bool = False
    beside: str | None = None  # another parameter that the patch has to read: a bias that depends on its weight
    stacked: bool = False  # `make` knows stacks of matrices and their parts
    # rank and scale, where they are known before the weight is
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Choice:
    """What an adapter says about some of several parameters, without saying which: their shapes decide.

    `settle` maps the parameters found, by name, to updates; it raises AdapterError when none or several ways fit.
    """

    parameters: tuple[str, ...]  # in the adapter's naming
    keys: tuple[str, ...]
    settle: Callable[[Mapping[str, Parameter]], list[Update]]


@dataclass
class Edit:
    """Everything that one adapter, or all of them, do to one weight: perhaps other sources, then patches in order."""

    replaced: Sources | None = None
    patches: list[Patch] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # the adapter tensors that it uses

    def same_as(self, other: "Edit") -> bool:
        return (
            len(self.patches) == len(other.patches)
            and _same_sources(self.replaced, other.replaced)
            and all(a is b or a.same_as(b) for a, b in zip(self.patches, other.patches, strict=True))
        )


def _same_sources(a: Sources | None, b: Sources | None) -> bool:
    """Whether two replacements are equal to the bit, compared in pieces."""
    if a is b:
        return True
    if a is None or b is None:
        return False
    if a.spec != b.spec:
        return False
    arenas = [Arena(torch.device("cpu")), Arena(torch.device("cpu"))]
    for start in range(0, a.spec.numel, COMPARE_NUMEL):
        stop = min(start + COMPARE_NUMEL, a.spec.numel)
        raws = [s.fetch(start, stop, arena) for s, arena in zip((a, b), arenas, strict=True)]
        if not all(torch.equal(x, y) for x, y in zip(*raws, strict=True)):
            return False
    return True
