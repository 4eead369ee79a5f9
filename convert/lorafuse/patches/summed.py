"""The patches of several adapters on one weight: W + Σ (W'_i − W), where W'_i is what adapter i alone makes
of W."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.files.tensors import TensorSpec
from lorafuse.patches.patch import TILE_NUMEL, Base, Patch, PatchNeeds, PatchTraits, same_patches


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
        self.patches = tuple(patch for group in self._groups for patch in group)
        self._n_copied = max(sum(not _is_additive(group) for group in self._groups) - 1, 0)
        self.needs = self._needs([patch.needs for patch in self.patches])
        self.traits = PatchTraits(additive=all(patch.traits.additive for patch in self.patches))

    def _needs(self, members: Sequence[PatchNeeds]) -> PatchNeeds:
        """Named one by one: each field is joined in another way."""
        row_multiple = math.lcm(*(needs.row_multiple for needs in members))
        copies = 2 * 4 * self._tile_numel(row_multiple) if self._n_copied else 0
        return PatchNeeds(
            nbytes=sum(needs.nbytes for needs in members),
            scratch_nbytes=copies + sum(self._grown_nbytes(needs, row_multiple) for needs in members),
            row_multiple=row_multiple,
            stacked=any(needs.stacked for needs in members),
            reads_base=any(needs.reads_base for needs in members),
            holds_weight=any(needs.holds_weight for needs in members),
        )

    def _grown_nbytes(self, needs: PatchNeeds, row_multiple: int) -> int:
        """A patch's scratch, times how much larger a tile is than the one that the patch counts on."""
        own = max(self._tile_numel(needs.row_multiple), 1)
        return needs.scratch_nbytes * -(-self._tile_numel(row_multiple) // own)

    def _tile_numel(self, row_multiple: int) -> int:
        return min(max(TILE_NUMEL, row_multiple * self._spec.n_cols), self._spec.numel)

    @property
    def facts(self) -> Mapping[str, Any]:
        updates = []
        for name, patches in self._named:
            facts: dict[str, Any] = {"adapter": name}
            for patch in patches:
                facts |= patch.facts
            updates.append(facts)
        return {"updates": updates}

    def lighter(self) -> "Summed | None":
        """With the first patch that can hold less; the next call takes the next."""
        for heavy in self.patches:
            light = heavy.lighter()
            if light is not None:
                groups = [
                    (name, [light if patch is heavy else patch for patch in patches])
                    for name, patches in self._named
                ]
                return Summed(groups, self._spec)
        return None

    def prepare(self, base: Base, arena: Arena) -> None:
        for patch in self.patches:
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
        for patch in self.patches:
            patch.release()

    def same_as(self, other: Patch) -> bool:
        return (
            isinstance(other, Summed)
            and len(self._groups) == len(other._groups)
            and all(same_patches(own, its) for own, its in zip(self._groups, other._groups, strict=True))
        )


def _is_additive(patches: Sequence[Patch]) -> bool:
    return all(patch.traits.additive for patch in patches)
