"""Patches of stacks of experts' matrices: one for each expert's matrix, out of factors that all experts
share."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.errors import AdapterError, shown
from lorafuse.files.stores import Store
from lorafuse.patches.factor import Factor, same_tensor
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Base, Patch, PatchNeeds, PatchTraits
from lorafuse.patches.target import Target


class Stack:
    """The factors of all experts: `matrix` gives those of one. `keys` are the tensors of lora_A and lora_B in
    `store`, which messages call `file`."""

    def __init__(
        self,
        store: Store,
        file: str,
        keys: tuple[str, str],
        *,
        rank: int,
        n_experts: int,
        scale: float,
        transposed: bool,
    ) -> None:
        self.store, self.file, self.keys, self.transposed = store, file, keys, transposed
        self.rank, self.n_experts, self.scale = rank, n_experts, scale
        self._needs: dict[int, PatchNeeds] = {}

    def matrix(self, expert: int, rows: range) -> LowRank:
        """The update of these rows of one expert's matrix."""
        own_rows = range(expert * self.rank, (expert + 1) * self.rank)
        own_cols = range(expert, self.rank * self.n_experts, self.n_experts)
        store, (key_a, key_b) = self.store, self.keys
        if self.transposed:
            left = Factor(store, key_a, transposed=True, rows=own_rows, cols=rows)  # [rows, r]
            right = Factor(store, key_b, transposed=True, cols=own_cols)  # [r, n_cols]
        else:
            left = Factor(store, key_b, rows=rows, cols=own_cols)
            right = Factor(store, key_a, rows=own_rows)
        return LowRank(left, right, self.scale)

    def patch(self, target: Target) -> Patch:
        part = target.part
        if part is not None and part.expert is not None:
            return Expert(self, part.expert, range(part.row, part.row + part.n_rows))
        if part is None or part.whole:
            return Experts(self, target.spec.shape[1])
        raise AdapterError(
            f"{self.file}: {shown(self.keys[0])} updates a part of {shown(target.name)}, which is not "
            "supported."
        )

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        return {"rank": self.rank, "scale": self.scale}

    def needs(self, n_rows: int) -> PatchNeeds:
        """What the update of so many rows of one matrix needs; made once, for all experts."""
        if n_rows not in self._needs:
            self._needs[n_rows] = self.matrix(0, range(n_rows)).needs
        return self._needs[n_rows]

    def same_as(self, other: "Stack") -> bool:
        """Whether all experts have the same factors and scale."""
        return (
            (type(self), self.rank, self.n_experts, self.scale, self.transposed)
            == (type(other), other.rank, other.n_experts, other.scale, other.transposed)
        ) and all(
            same_tensor(self.store, mine, other.store, its)
            for mine, its in zip(self.keys, other.keys, strict=True)
        )


class SwitchStack(Stack):
    """The factors of MLX's stacks: lora_A [E · r, in], and lora_B [E, out, r], a stack itself."""

    def matrix(self, expert: int, rows: range) -> LowRank:
        key_a, key_b = self.keys
        left = Factor(self.store, key_b, matrix=expert, rows=rows)
        right = Factor(self.store, key_a, rows=range(expert * self.rank, (expert + 1) * self.rank))
        return LowRank(left, right, self.scale)


class Expert(Patch):
    """The update of a weight that is one expert's matrix, or some rows of it; small until it is prepared,
    since there are many."""

    __slots__ = ("_expert", "_inner", "_rows", "_stack", "needs")
    traits = PatchTraits(additive=True)

    def __init__(self, stack: Stack, expert: int, rows: range) -> None:
        self._stack, self._expert, self._rows = stack, expert, rows
        self.needs = stack.needs(len(rows))
        self._inner: LowRank | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._stack.facts

    def prepare(self, base: Base, arena: Arena) -> None:
        self._inner = self._matrix()
        self._inner.prepare(base, arena)

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        assert self._inner is not None, "apply outside prepare and release"
        self._inner.apply(tile, first_row, arena)

    def release(self) -> None:
        self._inner = None

    def same_as(self, other: Patch) -> bool:
        return isinstance(other, Expert) and self._matrix().same_as(other._matrix())

    def _matrix(self) -> LowRank:
        return self._stack.matrix(self._expert, self._rows)


class Experts(Patch):
    """The update of a weight that is the whole stack [E, n_rows, n_cols]. The factors of the two experts that
    were used last are kept: tiles come in order, so workers are at most at a boundary between two."""

    traits = PatchTraits(additive=True)

    def __init__(self, stack: Stack, n_rows: int) -> None:
        self._stack, self._n_rows = stack, n_rows
        self._loaded: dict[int, LowRank] = {}
        self._base: Base | None = None
        self._lock = Lock()
        held = stack.needs(n_rows).nbytes  # of one expert; a worker may load a third
        self.needs = replace(stack.needs(n_rows), nbytes=2 * held, scratch_nbytes=held, stacked=True)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._stack.facts

    def prepare(self, base: Base, arena: Arena) -> None:
        self._base = base

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        expert, row = divmod(first_row, self._n_rows)
        self._matrix(expert, arena).apply(tile, row, arena)

    def _matrix(self, expert: int, arena: Arena) -> LowRank:
        with self._lock:
            if expert not in self._loaded:
                assert self._base is not None, "apply outside prepare and release"
                while len(self._loaded) > 1:
                    del self._loaded[min(self._loaded)]
                matrix = self._stack.matrix(expert, range(self._n_rows))
                matrix.prepare(self._base, arena)
                self._loaded[expert] = matrix
            return self._loaded[expert]

    def release(self) -> None:
        self._loaded, self._base = {}, None

    def same_as(self, other: Patch) -> bool:
        return (
            isinstance(other, Experts) and self._n_rows == other._n_rows and self._stack.same_as(other._stack)
        )
