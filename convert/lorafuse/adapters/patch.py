"""What an adapter does to one weight: a tile goes in, a tile comes out.

A patch is not "a delta": it may replace rows or rescale them. `prepare` and `release` bracket the tiles of its weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lorafuse.checkpoint import Store
from lorafuse.codecs.sources import Arena, Sources
from lorafuse.tensors import DTYPES, TensorSpec

LEFT_RESIDENT_NBYTES = 4 << 20
# The right factor is multiplied in column chunks of about this many elements, whether it is held in memory or read again for
# each tile: the chunks, and with them the order of every sum, must not depend on the memory limit.
RIGHT_CHUNK_NUMEL = 1 << 20
READ_NUMEL = 1 << 18


class Patch(Protocol):
    """An update of one weight."""

    facts: dict[str, Any]  # what the receipt says about it: rank, scale
    nbytes: int  # held from prepare to release
    scratch_nbytes: int  # needed per worker while a tile is patched

    def prepare(self, arena: Arena) -> None: ...

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        """Update `tile` (fp32 [rows, n_cols], rows from first_row on) in place."""

    def release(self) -> None: ...

    def same_as(self, other: "Patch") -> bool:
        """Whether both make the same update; tied weights need to know."""


@dataclass(frozen=True)
class Target:
    """The weight that an update found: its name in the checkpoint, spec, and whether it belongs to an HF Conv1D."""

    name: str
    spec: TensorSpec
    is_conv1d: bool


@dataclass(frozen=True)
class Update:
    """What an adapter says about one parameter, before the checkpoint is known: a replacement, or a patch that
    `make(target)` builds, which raises AdapterError when it does not fit."""

    parameter: str  # in the adapter's naming
    keys: tuple[str, ...]
    replaced: Sources | None = None
    make: Callable[[Target], Patch] | None = None


@dataclass
class Edit:
    """Everything one adapter does to one weight: perhaps other sources, then patches in order."""

    replaced: Sources | None = None
    patches: list[Patch] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # the adapter tensors that it uses

    def same_as(self, other: "Edit") -> bool:
        return (
            len(self.patches) == len(other.patches)
            and _same_sources(self.replaced, other.replaced)
            and all(a.same_as(b) for a, b in zip(self.patches, other.patches, strict=True))
        )


def _same_sources(a: Sources | None, b: Sources | None) -> bool:
    """Whether two replacements are equal to the bit, compared in pieces."""
    if a is None or b is None:
        return a is b
    if a.spec != b.spec:
        return False
    arenas = [Arena(torch.device("cpu")), Arena(torch.device("cpu"))]
    for start in range(0, a.spec.numel, READ_NUMEL):
        stop = min(start + READ_NUMEL, a.spec.numel)
        raws = [s.fetch(start, stop, arena) for s, arena in zip((a, b), arenas, strict=True)]
        if not all(torch.equal(x, y) for x, y in zip(*raws, strict=True)):
            return False
    return True


class Factor:
    """A 2-D adapter tensor as fp32, whole or in parts, perhaps transposed. `shape` is the logical one, after transposing."""

    def __init__(self, store: Store, key: str, *, transposed: bool = False) -> None:
        spec = store.tensors[key].spec
        self.store, self.key, self.transposed = store, key, transposed
        self._stored = (spec.shape[0], spec.n_cols)
        self.shape = self._stored[::-1] if transposed else self._stored
        self._dtype = getattr(torch, spec.torch_name)
        self._itemsize = DTYPES[spec.dtype][0]
        self.nbytes = spec.numel * 4

    def whole(self, arena: Arena) -> torch.Tensor:
        """float32 `shape`, on the arena's device, in memory of its own."""
        n_rows, n_cols = self._stored
        stored = torch.empty(n_rows, n_cols, device=arena.device)
        step = max(READ_NUMEL // max(n_cols, 1), 1)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            stored[start:stop] = self._stored_rows(start, stop, arena)
        return stored.T if self.transposed else stored

    def rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return self._stored_cols(start, stop, arena).T if self.transposed else self._stored_rows(start, stop, arena)

    def cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return self._stored_rows(start, stop, arena).T if self.transposed else self._stored_cols(start, stop, arena)

    def _stored_rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        n_cols = self._stored[1]
        row_nbytes = n_cols * self._itemsize
        raw = arena.fetch("factor.raw", self.store, self.key, start * row_nbytes, (stop - start) * row_nbytes)
        return self._float(raw, arena).view(stop - start, n_cols)

    def _stored_cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        n_rows, n_cols = self._stored
        nbytes = (stop - start) * self._itemsize
        raw = arena.get("factor.raw", n_rows * nbytes, torch.uint8, host=True)
        view = memoryview(raw.numpy())
        for row in range(n_rows):
            self.store.read_into(
                self.key, (row * n_cols + start) * self._itemsize, view[row * nbytes : (row + 1) * nbytes]
            )
        return self._float(raw, arena).view(n_rows, stop - start)

    def _float(self, raw: torch.Tensor, arena: Arena) -> torch.Tensor:
        values = raw.view(self._dtype)
        return arena.get("factor.float", values.numel(), torch.float32).copy_(values)


class LowRank:
    """W += scale · left @ right, left [rows, r], right [r, n_cols]: LoRA on Linear, Embedding, Conv1D and Conv1d/2d/3d.

    The products of two fp32 numbers are summed in fp32 by one matrix product that adds onto W (PEFT 0.21 lora/layer.py,
    get_delta_weight, has the same formula with a separate sum).
    """

    def __init__(self, left: Factor, right: Factor, scale: float) -> None:
        self.left, self.right, self.scale = left, right, scale
        self.rank, self.n_cols = right.shape
        self.facts = {"rank": self.rank, "scale": scale}
        self.right_resident = True
        self.left_resident = left.nbytes <= LEFT_RESIDENT_NBYTES
        self._left: torch.Tensor | None = None
        self._right: torch.Tensor | None = None
        self._chunk = max(RIGHT_CHUNK_NUMEL // self.rank, 64)

    @property
    def nbytes(self) -> int:
        return (self.left.nbytes if self.left_resident else 0) + (self.right.nbytes if self.right_resident else 0)

    @property
    def scratch_nbytes(self) -> int:
        return 0 if self.right_resident else 8 * self.rank * min(self._chunk, self.n_cols)

    def prepare(self, arena: Arena) -> None:
        self._left = self.left.whole(arena) if self.left_resident else None
        self._right = self.right.whole(arena) if self.right_resident else None

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        stop_row = first_row + tile.shape[0]
        left = (
            self.left.rows(first_row, stop_row, arena).clone() if self._left is None else self._left[first_row:stop_row]
        )
        for start in range(0, self.n_cols, self._chunk):
            stop = min(start + self._chunk, self.n_cols)
            right = self.right.cols(start, stop, arena) if self._right is None else self._right[:, start:stop]
            tile[:, start:stop].addmm_(left, right, alpha=self.scale)

    def release(self) -> None:
        self._left = self._right = None

    def same_as(self, other: Patch) -> bool:
        if not isinstance(other, LowRank) or self.scale != other.scale:
            return False
        arena = Arena(torch.device("cpu"))
        pairs = ((self.left, other.left), (self.right, other.right))
        return all(a.shape == b.shape and torch.equal(a.whole(arena), b.whole(arena)) for a, b in pairs)


class AddVector:
    """b += scale · v for a vector: LoRA's `lora_B.bias`."""

    scratch_nbytes = 0

    def __init__(self, vector: Factor, scale: float) -> None:
        self.vector, self.scale = vector, scale
        self.facts = {"scale": scale}
        self.nbytes = vector.nbytes
        self._values: torch.Tensor | None = None

    def prepare(self, arena: Arena) -> None:
        self._values = self.vector.whole(arena)

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        assert self._values is not None, "apply outside prepare and release"
        tile.add_(self._values[first_row : first_row + tile.shape[0]], alpha=self.scale)

    def release(self) -> None:
        self._values = None

    def same_as(self, other: Patch) -> bool:
        return False
