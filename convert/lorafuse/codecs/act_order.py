"""Groups of columns that do not lie together: act-order, where a tensor says the group of each column."""

import torch

from lorafuse.arithmetic.arena import to_device_of
from lorafuse.codecs.held import ComputedOnce
from lorafuse.codecs.sources import Raw
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import DTYPES

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


class Groups:
    """The groups of a matrix's columns, held while tiles of it are in the making."""

    def __init__(self, ckpt: Checkpoint, name: str, n_groups: int) -> None:
        self._ckpt, self._name, self._n_groups = ckpt, name, n_groups
        n_cols = ckpt.tensors[name].spec.numel
        self._held = ComputedOnce()
        self.held_nbytes = 8 * n_cols
        self.scratch_nbytes = 8 * max(_CHUNK_NUMEL, n_cols)

    def release(self) -> None:
        """Drop what was read."""
        self._held.drop()

    def _load(self) -> Raw:
        groups = read_groups(self._ckpt, self._name, self._n_groups)
        assert groups is not None, "it was looked at before"
        return (groups,)

    def scale(self, matrix: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
        """(matrix − zeros) · scales in place, all fp32; scales and zeros are [rows or 1, groups]."""
        groups = to_device_of(matrix, self._held.get(self._load)[0])
        step = max(_CHUNK_NUMEL // matrix.shape[1], 1)
        for first in range(0, len(matrix), step):
            part = matrix[first : first + step]
            if zeros is not None:
                part.sub_(_spread(zeros, first, step, groups))
            part.mul_(_spread(scales, first, step, groups))

    def spread(self, by_group: torch.Tensor) -> torch.Tensor:
        """[rows, columns] of what is [rows, groups]."""
        groups = to_device_of(by_group, self._held.get(self._load)[0])
        return _spread(by_group, 0, len(by_group), groups)


def _spread(by_group: torch.Tensor, first: int, step: int, groups: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of some rows of what is [rows or 1, groups]."""
    part = by_group if len(by_group) == 1 else by_group[first : first + step]
    return part.index_select(1, groups)
