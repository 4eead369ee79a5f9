"""Groups of columns that do not lie together: act-order, where a tensor says the group of each column."""

import torch

from lorafuse.codecs.held import ComputedOnce
from lorafuse.codecs.scaled import Recipe, ScaledRows
from lorafuse.codecs.sources import Raw, Scheme
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import DTYPES, TensorSpec

_CHUNK_NUMEL = 1 << 16  # values whose scales are spread at a time


def read_groups(ckpt: Checkpoint, name: str, n_groups: int) -> torch.Tensor | None:
    """int64 [columns]: the group of each; None where −1 says that they lie in order. Raises CheckpointError
    for a group that there is not."""
    dtype = getattr(torch, DTYPES[ckpt.tensors[name].spec.dtype][1])
    groups = torch.frombuffer(read_all(ckpt, name), dtype=dtype).long()
    if bool((groups == -1).any()):
        return None
    least, most = int(groups.min()), int(groups.max())
    if least < 0 or most >= n_groups:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(name)} has groups from {least} to {most}; there are {n_groups}."
        )
    return groups


class ActOrderRows(ScaledRows):
    """A matrix by rows whose columns have the scales of the groups that `g_idx` says."""

    def __init__(
        self,
        ckpt: Checkpoint,
        names: tuple[str, ...],
        spec: TensorSpec,
        scheme: Scheme,
        recipe: Recipe,
        g_idx: str,
    ) -> None:
        super().__init__(ckpt, names, spec, scheme, recipe)
        self._ckpt, self._g_idx, self._groups = ckpt, g_idx, ComputedOnce()
        self.held_nbytes = 8 * spec.shape[-1]
        self.nbytes = 8 * max(_CHUNK_NUMEL, spec.shape[-1])

    def release(self) -> None:
        self._groups.drop()

    def _load(self) -> Raw:
        groups = read_groups(self._ckpt, self._g_idx, self._recipe.scales.n_cols)
        assert groups is not None, "it was looked at before"
        return (groups,)

    def _scale(
        self, matrix: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, rows: range
    ) -> None:
        groups = self._groups.get(self._load)[0].to(matrix.device)
        step = max(_CHUNK_NUMEL // matrix.shape[1], 1)
        scales = self._recipe.scales.by_rows(scales, rows)
        if zeros is not None and self._recipe.zeros:
            zeros = self._recipe.zeros.by_rows(zeros, rows)
        for first in range(0, len(rows), step):
            part = matrix[first : first + step]
            if zeros is not None:
                part.sub_(_spread(zeros, first, step, groups))
            part.mul_(_spread(scales, first, step, groups))


def _spread(by_group: torch.Tensor, first: int, step: int, groups: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of some rows of what is [rows or 1, groups]."""
    part = by_group if len(by_group) == 1 else by_group[first : first + step]
    return part.index_select(1, groups)
