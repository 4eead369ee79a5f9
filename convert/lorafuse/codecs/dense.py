"""Weights stored as they are. Every dtype passes through; F32, F16 and BF16 can be merged into."""

from collections.abc import Mapping

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Scheme, Sources
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Buffer
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, TensorInfo, TensorSpec


class DenseSources(Sources):
    """One stored tensor, of a checkpoint or of an adapter that replaces a weight."""

    nbytes = 0

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.names: tuple[str, ...] = (name,)
        self.scheme = scheme(self.names)
        self.spec: TensorSpec = store.tensors[name].spec
        self.out_dtype = self.spec.dtype
        self._itemsize = DTYPES[self.spec.dtype][0]

    def will_need(self, start: int, stop: int) -> None:
        self.store.will_need(self.names[0], start * self._itemsize, (stop - start) * self._itemsize)

    def fetch(self, start: int, stop: int, arena: Arena) -> tuple[torch.Tensor]:
        nbytes = (stop - start) * self._itemsize
        return (arena.fetch("dense", self.store, self.names[0], start * self._itemsize, nbytes),)

    def copy_into(self, start: int, buffer: Buffer) -> None:
        """Fill `buffer` with the stored bytes from element `start` on."""
        self.store.read_into(self.names[0], start * self._itemsize, buffer)

    def decode(self, raw: tuple[torch.Tensor, ...], start: int, stop: int, arena: Arena) -> torch.Tensor:
        return arena.place(raw[0]).view(getattr(torch, self.spec.torch_name))


def claim(stored: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in stored}


def scheme(names: tuple[str, ...]) -> Scheme:
    return Scheme("dense")


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> DenseSources:
    return DenseSources(ckpt, weight)
