"""Groups of columns that do not lie together: act-order, where a tensor says the group of each column."""

import torch

from lorafuse.arithmetic.arena import to_device_of
from lorafuse.arithmetic.coded_rows import spread_nbytes
from lorafuse.codecs.held import ComputedOnce
from lorafuse.codecs.sources import Raw
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import DTYPES


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
        self.scratch_nbytes = spread_nbytes(n_cols)

    def release(self) -> None:
        """Drop what was read."""
        self._held.drop()

    def _load(self) -> Raw:
        groups = read_groups(self._ckpt, self._name, self._n_groups)
        assert groups is not None, "it was looked at before"
        return (groups,)

    def load(self) -> torch.Tensor:
        """int64 [columns]: the group of each, on the host."""
        return self._held.get(self._load)[0]

    def spread(self, by_group: torch.Tensor) -> torch.Tensor:
        """[rows, columns] of what is [rows, groups]."""
        return by_group.index_select(1, to_device_of(by_group, self.load()))
