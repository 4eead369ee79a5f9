"""`lora_A` and `lora_B` of one update: checked, and fitted to the weight that they update."""

import math
from dataclasses import dataclass

from lorafuse.adapters.reading.check_tensors import check_shape, misfit, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.factor import BlockDiagonal, Factor
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.target import Target


@dataclass(frozen=True)
class Pair:
    """The keys of A, (r, in, …), and B, (out, r, …); or of an embedding's, (r, vocab) and (dim, r).

    `n_blocks`: one of them may be block-diagonal and hold only its blocks, as bdLoRA stores it. `diagonal`
    names a vector [r] between B and A, as KaSA has it.
    """

    adapter: AdapterDir
    key_a: str
    key_b: str
    n_blocks: int = 1
    diagonal: str | None = None
    embedding: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key_a, self.key_b, *([self.diagonal] if self.diagonal else []))

    @property
    def rank(self) -> int:
        return shape_of(self.adapter, self.key_a)[0]

    def check(self, *, convolutions: bool = True) -> None:
        """Raises AdapterError where the tensors are not the two factors of one update, of a matrix or also of
        a convolution."""
        a, b = (self.adapter.store.tensors[key].spec for key in (self.key_a, self.key_b))
        same_rank = len(b.shape) > 1 and a.shape[:1] in ((b.shape[1],), (b.shape[1] * self.n_blocks,))
        right_dims = len(a.shape) == len(b.shape) >= 2 and (convolutions or len(a.shape) == 2)
        fits = right_dims and same_rank and math.prod(b.shape[2:]) == 1
        if not fits or a.numel == 0 or b.numel == 0:
            raise AdapterError(
                f"{self.adapter.file}: {shown(self.key_a)} is {a} and {shown(self.key_b)} is {b}; they are "
                "not the two factors of one update."
            )
        for key in (self.key_a, self.key_b):
            check_float(self.adapter, key)
        if self.diagonal:
            check_shape(self.adapter, self.diagonal, (self.rank,), f"from {shown(self.key_a)}")

    def is_transposed(self, target: Target) -> bool:
        """Whether the weight is stored (in, out), as HF Conv1D does; decided by its shape and, when that is
        square, by the architecture. Raises AdapterError where the update fits neither way."""
        a, b = (shape_of(self.adapter, key) for key in (self.key_a, self.key_b))
        matrix, conv = (target.spec.shape[0], target.spec.n_cols), len(a) > 2
        n_in, square = math.prod(a[1:]), matrix[0] == matrix[1]
        n_ins = {n_in, n_in * self.n_blocks}
        kernel_fits = not conv or target.spec.shape[1:] == a[1:]
        plain = b[1] == a[0] and not self.diagonal
        if matrix[0] == b[0] and matrix[1] in n_ins and kernel_fits and not (square and target.is_conv1d):
            return False
        if matrix == (n_in, b[0]) and plain and not conv and len(target.spec.shape) == 2:
            return True
        grouped = " Convolutions with groups have no merged form." if conv else ""
        raise misfit(self.adapter, target, self.key_a, self.key_b, hint=grouped)

    def patch(self, scaling: float, target: Target) -> LowRank:
        """W += scaling · B A in the weight's orientation. Raises AdapterError where it does not fit."""
        if self.embedding:
            return self._embedding_patch(scaling, target)
        if self.is_transposed(target):
            left, right = (
                Factor(self.adapter.store, key, transposed=True) for key in (self.key_a, self.key_b)
            )
            return LowRank(left, right, scaling)
        a, b = (
            Factor(self.adapter.store, self.key_a, row_scale=self.diagonal),
            Factor(self.adapter.store, self.key_b),
        )
        whole_a = a if a.shape[1] == target.spec.n_cols else BlockDiagonal(a, self.n_blocks)
        whole_b = b if b.shape[1] == a.shape[0] else BlockDiagonal(b, self.n_blocks)
        return LowRank(whole_b, whole_a, scaling)

    def _embedding_patch(self, scaling: float, target: Target) -> LowRank:
        left, right = (Factor(self.adapter.store, key, transposed=True) for key in (self.key_a, self.key_b))
        if (left.shape[0], right.shape[1]) != target.spec.shape:
            raise AdapterError(
                f"{self.adapter.file}: {shown(self.key_a)} and {shown(self.key_b)} update {left.shape[0]} × "
                f"{right.shape[1]}, but {shown(target.name)} is {list(target.spec.shape)}; is the adapter "
                "for another base, or was the vocabulary resized without saving the embedding?",
                misfit=True,
            )
        return LowRank(left, right, scaling)
