"""LoRA's patches: the product of two factors added to a matrix, and a vector added to a bias."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.patches.factor import Factor
from lorafuse.patches.patch import Base, Patch, PatchNeeds, PatchTraits

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

    traits = PatchTraits(additive=True)

    def __init__(
        self, left: LeftFactor, right: RightFactor, scale: float, *, right_resident: bool = True
    ) -> None:
        """`right_resident`: whether the right factor is held, or read again for each tile."""
        self.left, self.right, self.scale, self.right_resident = left, right, scale, right_resident
        self.rank, self.n_cols = right.shape
        self.left_resident = left.nbytes <= LEFT_RESIDENT_NBYTES
        self._left: torch.Tensor | None = None
        self._right: torch.Tensor | None = None
        self._chunk = max(RIGHT_CHUNK_NUMEL // self.rank, 64)
        self.needs = PatchNeeds(
            nbytes=(left.nbytes if self.left_resident else 0) + (right.nbytes if right_resident else 0),
            scratch_nbytes=0 if right_resident else 8 * self.rank * min(self._chunk, self.n_cols),
            reads_base=False,
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"rank": self.rank, "scale": self.scale}

    def lighter(self) -> "LowRank | None":
        """With the right factor read again."""
        if not self.right_resident:
            return None
        return LowRank(self.left, self.right, self.scale, right_resident=False)

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
        return (
            isinstance(other, LowRank)
            and self.scale == other.scale
            and same_matrix(self.left, other.left)
            and same_matrix(self.right, other.right)
        )


class AddVector(Patch):
    """b += scale · v for a vector: LoRA's `lora_B.bias`."""

    traits = PatchTraits(additive=True)

    def __init__(self, vector: Factor, scale: float) -> None:
        self.vector, self.scale = vector, scale
        self.needs = PatchNeeds(nbytes=vector.nbytes, reads_base=False)
        self._values: torch.Tensor | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"scale": self.scale}

    def prepare(self, base: Base, arena: Arena) -> None:
        self._values = self.vector.whole(arena)

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        assert self._values is not None, "apply outside prepare and release"
        tile.add_(self._values[first_row : first_row + tile.shape[0]], alpha=self.scale)

    def release(self) -> None:
        self._values = None

    def same_as(self, other: Patch) -> bool:
        return (
            isinstance(other, AddVector)
            and self.scale == other.scale
            and same_matrix(self.vector, other.vector)
        )


def same_matrix(matrix: Readable, other: Readable) -> bool:
    """Whether two matrices are equal as fp32, read whole."""
    arena = Arena(torch.device("cpu"))
    return matrix.shape == other.shape and torch.equal(matrix.whole(arena), other.whole(arena))
