"""LoRA's patches: the product of two factors added to a matrix, and a vector added to a bias."""

from typing import Any, Protocol

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.patches.factor import Factor
from lorafuse.patches.patch import Base, Patch

LEFT_RESIDENT_NBYTES = 4 << 20
# The right factor is multiplied in column chunks of about this many elements, whether it is held in memory or
# read again for each tile: the chunks, and with them the order of every sum, must not depend on the memory
# limit.
RIGHT_CHUNK_NUMEL = 1 << 20


class Readable(Protocol):
    """A matrix that comes from the adapter, whole."""

    shape: tuple[int, int]
    nbytes: int  # as fp32, whole

    def whole(self, arena: Arena) -> torch.Tensor: ...


class LeftFactor(Readable, Protocol):
    """One that is also read by rows; what it returns is valid until the arena's next use."""

    def rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor: ...


class RightFactor(Readable, Protocol):
    """One that is also read by columns."""

    def cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor: ...


class LowRank(Patch):
    """W += scale · left @ right, left [rows, r], right [r, n_cols]: LoRA on Linear, Embedding, Conv1D and
    Conv1d/2d/3d.

    The products of two fp32 numbers are summed in fp32 by one matrix product that adds onto W (PEFT 0.21
    lora/layer.py, get_delta_weight, has the same formula with a separate sum).
    """

    def __init__(self, left: LeftFactor, right: RightFactor, scale: float) -> None:
        self.left, self.right, self.scale = left, right, scale
        self.rank, self.n_cols = right.shape
        self.right_resident = True
        self.left_resident = left.nbytes <= LEFT_RESIDENT_NBYTES
        self._left: torch.Tensor | None = None
        self._right: torch.Tensor | None = None
        self._chunk = max(RIGHT_CHUNK_NUMEL // self.rank, 64)

    @property
    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.scale}

    @property
    def reads_base(self) -> bool:
        return False

    @property
    def additive(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return (self.left.nbytes if self.left_resident else 0) + (
            self.right.nbytes if self.right_resident else 0
        )

    @property
    def scratch_nbytes(self) -> int:
        return 0 if self.right_resident else 8 * self.rank * min(self._chunk, self.n_cols)

    def prepare(self, base: Base, arena: Arena) -> None:
        self._left = self.left.whole(arena) if self.left_resident else None
        self._right = self.right.whole(arena) if self.right_resident else None

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        stop_row = first_row + tile.shape[0]
        left = (
            self.left.rows(first_row, stop_row, arena).clone()
            if self._left is None
            else self._left[first_row:stop_row]
        )
        if self._right is not None and self.n_cols <= self._chunk:
            tile.addmm_(left, self._right, alpha=self.scale)
            return
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
        pairs: tuple[tuple[Readable, Readable], ...] = ((self.left, other.left), (self.right, other.right))
        return all(a.shape == b.shape and torch.equal(a.whole(arena), b.whole(arena)) for a, b in pairs)


class AddVector(Patch):
    """b += scale · v for a vector: LoRA's `lora_B.bias`."""

    def __init__(self, vector: Factor, scale: float) -> None:
        self.vector, self.scale = vector, scale
        self._values: torch.Tensor | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @property
    def reads_base(self) -> bool:
        return False

    @property
    def additive(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return self.vector.nbytes

    def prepare(self, base: Base, arena: Arena) -> None:
        self._values = self.vector.whole(arena)

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        assert self._values is not None, "apply outside prepare and release"
        tile.add_(self._values[first_row : first_row + tile.shape[0]], alpha=self.scale)

    def release(self) -> None:
        self._values = None
