"""The patch of trainable tokens and of layers trained whole: some rows of a weight are replaced."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lorafuse.adapters.check import misfit
from lorafuse.adapters.factor import Factor
from lorafuse.adapters.keys import check_float
from lorafuse.adapters.patch import TILE_NUMEL, Base, Patch, Target
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.codecs.sources import Arena
from lorafuse.errors import AdapterError, shown


class ReplaceRows(Patch):
    """W[indices] = rows; with a scale other than 1, W[indices] += scale · (rows − W[indices]).

    The rows are read when their tile is made, so nothing is held. PEFT 0.21 trainable_tokens/layer.py, merge, copies them
    likewise: what PEFT calls a delta is the new row itself.
    """

    def __init__(self, rows: Factor, indices: Sequence[int], scale: float) -> None:
        self.rows, self.scale = rows, scale
        self.indices = sorted(indices)
        self._stored = sorted(range(len(indices)), key=indices.__getitem__)  # stored row of each index

    @property
    def facts(self) -> dict[str, Any]:
        return {"rows": len(self.indices), "scale": self.scale}

    @property
    def scratch_nbytes(self) -> int:
        n_cols = max(self.rows.shape[1], 1)
        return 8 * n_cols * min(len(self.indices), max(TILE_NUMEL // n_cols, 1))

    @property
    def reads_base(self) -> bool:
        return False

    @property
    def follows_tie(self) -> bool:
        return True

    def prepare(self, base: Base, arena: Arena) -> None:
        """Nothing is held."""

    def apply(self, tile: torch.Tensor, first_row: int, arena: Arena) -> None:
        for row, stored, n_rows in self._runs(first_row, first_row + tile.shape[0]):
            new = self.rows.rows(stored, stored + n_rows, arena)
            old = tile[row - first_row : row - first_row + n_rows]
            if self.scale == 1.0:
                old.copy_(new)  # rather than W + (new − W), which rounds
            else:
                old.add_(new.sub_(old), alpha=self.scale)

    def _runs(self, first_row: int, stop_row: int) -> Iterator[tuple[int, int, int]]:
        """(row, stored row, count) of neighbours in both, between two rows of the weight."""
        start, stop = bisect_left(self.indices, first_row), bisect_left(self.indices, stop_row)
        while start < stop:
            n = 1
            while start + n < stop and self._follows(start + n):
                n += 1
            yield self.indices[start], self._stored[start], n
            start += n

    def _follows(self, i: int) -> bool:
        return self.indices[i] == self.indices[i - 1] + 1 and self._stored[i] == self._stored[i - 1] + 1

    def release(self) -> None:
        """Nothing is held."""

    def same_as(self, other: Patch) -> bool:
        if not isinstance(other, ReplaceRows) or (self.scale, self.indices) != (other.scale, other.indices):
            return False
        arenas = [Arena(torch.device("cpu")), Arena(torch.device("cpu"))]
        pairs = zip(self._stored, other._stored, strict=True)
        return all(torch.equal(self.rows.rows(a, a + 1, arenas[0]), other.rows.rows(b, b + 1, arenas[1])) for a, b in pairs)


def replace_rows(adapter: AdapterDir, key: str, field: str, indices: object, scale: float, target: Target) -> ReplaceRows:
    """The patch for token indices out of the config's `field`. Raises AdapterError when they, the rows and the weight do not
    fit."""
    where = adapter.path / CONFIG
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise AdapterError(f"{where}: {field} is {shown(indices)}, expected a list of integers.")
    check_float(adapter, key)
    spec = adapter.store.tensors[key].spec
    if len(spec.shape) != 2 or spec.shape[0] != len(indices):
        raise AdapterError(f"{adapter.file}: {shown(key)} is {spec}, expected one row for each of the {len(indices)} in {field}.")
    if spec.shape[1:] != target.spec.shape[1:]:
        raise misfit(adapter, target, key)
    n_rows = target.spec.shape[0]
    for i in indices:
        if not 0 <= i < n_rows:
            raise AdapterError(
                f"{where}: {field} has {i}, but {shown(target.name)} has {n_rows} rows; is the adapter for another base, or was "
                "the vocabulary resized without saving the embedding?",
                misfit=True,
            )
    if len(set(indices)) < len(indices):
        twice = next(i for i in indices if indices.count(i) > 1)
        raise AdapterError(f"{where}: {field} has {twice} twice; which row is meant?")
    return ReplaceRows(Factor(adapter.store, key), indices, scale)
