"""The patches of several adapters on one weight: W + Σ (W'_i − W), where W'_i is what adapter i alone makes
of W."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.files.tensors import TensorSpec
from lorafuse.patches.patch import TILE_NUMEL, Base, Patch


class Summed(Patch):
    """`groups` are the patches of each adapter, with the adapter's name; they see each weight as it was
    before any of them.

    Groups of additive patches follow each other in place, after at most one of other patches; each further
    one of these works on a copy of the tile. The sum is fp32, in the order given, except that additive groups
    come last.
    """

    def __init__(self, groups: Sequence[tuple[str, Sequence[Patch]]], spec: TensorSpec) -> None:
        self._named, self._spec = list(groups), spec
        self._groups = sorted((list(patches) for _, patches in groups), key=_is_additive)  # stable

    @property
    def facts(self) -> dict[str, Any]:
        updates = []
        for name, patches in self._named:
            facts: dict[str, Any] = {"adapter": name}
            for patch in patches:
                facts |= patch.facts
            updates.append(facts)
        return {"updates": updates}

    @property
    def members(self) -> tuple[Patch, ...]:
        return tuple(patch for group in self._groups for patch in group)

    @property
    def nbytes(self) -> int:
        return sum(patch.nbytes for patch in self.members)

    @property
    def scratch_nbytes(self) -> int:
        copies = 2 * 4 * self._tile_numel(self.row_multiple) if self._n_copied else 0
        return copies + sum(patch.scratch_nbytes * self._growth(patch) for patch in self.members)

    @property
    def stacked(self) -> bool:
        return any(patch.stacked for patch in self.members)

    @property
    def reads_base(self) -> bool:
        return any(patch.reads_base for patch in self.members)

    @property
    def additive(self) -> bool:
        return all(patch.additive for patch in self.members)

    @property
    def row_multiple(self) -> int:
        return math.lcm(*(patch.row_multiple for patch in self.members))

    @property
    def _n_copied(self) -> int:
        return max(sum(not _is_additive(group) for group in self._groups) - 1, 0)

    def _tile_numel(self, row_multiple: int) -> int:
        return min(max(TILE_NUMEL, row_multiple * self._spec.n_cols), self._spec.numel)

    def _growth(self, patch: Patch) -> int:
        """How much larger a tile is than the one that the patch counts on."""
        return -(-self._tile_numel(self.row_multiple) // max(self._tile_numel(patch.row_multiple), 1))

    def prepare(self, base: Base, arena: Arena) -> None:
        for patch in self.members:
            patch.prepare(base, arena)

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        base = self._copy("summed.base", tile, arena) if self._n_copied else tile
        for i, group in enumerate(self._groups):
            apart = i > 0 and not _is_additive(group)
            changed = self._copy("summed.changed", base, arena) if apart else tile
            for patch in group:
                patch.apply(changed, first_row, arena)
            if apart:
                tile.add_(changed.sub_(base))

    def _copy(self, name: str, tile: torch.Tensor, arena: Arena) -> torch.Tensor:
        return arena.get(name, tile.numel(), torch.float32).view(tile.shape).copy_(tile)

    def release(self) -> None:
        for patch in self.members:
            patch.release()

    def same_as(self, other: Patch) -> bool:
        if not isinstance(other, Summed) or [len(group) for group in self._groups] != [
            len(group) for group in other._groups
        ]:
            return False
        return all(a is b or a.same_as(b) for a, b in zip(self.members, other.members, strict=True))


def _is_additive(patches: Sequence[Patch]) -> bool:
    return all(patch.additive for patch in patches)
