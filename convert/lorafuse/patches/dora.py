"""DoRA: a LoRA update, and then each output's weights scaled to a trained length.

With V = W + scale · B A and W as (out, in): W' = (m / ‖V‖)[:, None] · V, the norm over each row. For an
embedding (vocab, dim) the norm is over each column, as it is for a weight stored (in, out), and for a
convolution over all but the output channel (PEFT 0.21 lora/dora.py, get_weight_norm). W is the dequantized
weight where the base is quantized. Norms are fp32.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.files.stores import Store
from lorafuse.patches.factor import load
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Base, Patch, PatchTraits
from lorafuse.patches.row_function import reading_nbytes, tile_nbytes
from lorafuse.patches.target import Target


class Dora(Patch):
    """`update`, then the weight's rows, or its columns, scaled to the lengths in the tensor `key`.

    With a `strength` x other than 1 the result is W + x · (W' − W).
    """

    traits = PatchTraits()

    def __init__(
        self, update: LowRank, store: Store, key: str, target: Target, *, by_columns: bool, strength: float
    ) -> None:
        self.update, self.by_columns, self.strength = update, by_columns, strength
        self._store, self._key, self._target = store, key, target
        self._magnitude: torch.Tensor | None = (
            None  # with by_columns, divided by the norm of the whole column
        )
        own, spec = update.needs, target.spec
        # With by_columns, the sums, and what reading the weight takes.
        turned = spec.numel if target.is_conv1d else 0
        reading = reading_nbytes(spec) + turned + own.scratch_nbytes if by_columns else 0
        self.needs = replace(
            own,
            nbytes=own.nbytes + 16 * store.tensors[key].spec.numel + reading,
            scratch_nbytes=own.scratch_nbytes + (0 if strength == 1.0 else tile_nbytes(spec)),
            reads_base=by_columns,
        )

    @property
    def facts(self) -> Mapping[str, Any]:
        strength = {} if self.strength == 1.0 else {"strength": self.strength}
        return {**self.update.facts, "dora": True, **strength}

    def lighter(self) -> "Dora | None":
        update = self.update.lighter()
        if update is None:
            return None
        return Dora(
            update,
            self._store,
            self._key,
            self._target,
            by_columns=self.by_columns,
            strength=self.strength,
        )

    def prepare(self, base: Base, arena: Arena) -> None:
        self.update.prepare(base, arena)
        self._magnitude = load(self._store, self._key, arena.device).view(-1)
        if self.by_columns:
            squares = torch.zeros(self._target.spec.n_cols, dtype=torch.float64, device=arena.device)
            for first_row, rows in base.tiles():
                self.update.apply(rows, first_row, arena)
                squares += torch.linalg.vector_norm(rows, dim=0).double().square()
            self._magnitude /= squares.sqrt().float()

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        assert self._magnitude is not None, "apply outside prepare and release"
        before = (
            None
            if self.strength == 1.0
            else arena.get("dora.before", tile.numel(), torch.float32).view(tile.shape).copy_(tile)
        )
        self.update.apply(tile, first_row, arena)
        if self.by_columns:
            tile.mul_(self._magnitude)
        else:
            magnitude = self._magnitude[first_row : first_row + tile.shape[0]]
            tile.mul_((magnitude / torch.linalg.vector_norm(tile, dim=1))[:, None])
        if before is not None:
            tile.sub_(before).mul_(self.strength).add_(before)

    def release(self) -> None:
        self.update.release()
        self._magnitude = None

    def same_as(self, other: Patch) -> bool:
        if not isinstance(other, Dora) or (self.by_columns, self.strength) != (
            other.by_columns,
            other.strength,
        ):
            return False
        host = torch.device("cpu")
        magnitudes = (load(dora._store, dora._key, host).view(-1) for dora in (self, other))
        return torch.equal(*magnitudes) and self.update.same_as(other.update)
