"""Weights stored as they are. Every dtype passes through; F32, F16 and BF16 can be merged into."""

from collections.abc import Mapping
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Claims, Raw, Scheme, Sources
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, Box, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ()
DENSE = Scheme("dense", words="full precision")


class DenseSources(Sources):
    """One stored tensor, of a checkpoint or of an adapter that replaces a weight."""

    as_stored = True

    __slots__ = ("names", "out_dtype", "scheme", "spec", "store")  # most weights of a large model have one

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.names: tuple[str, ...] = (name,)
        self.scheme = DENSE
        self.spec: TensorSpec = store.tensors[name].spec
        self.out_dtype = self.spec.dtype

    @property
    def _itemsize(self) -> int:
        return DTYPES[self.spec.dtype][0]

    def will_need(self, box: Box) -> None:
        start, stop = box.run
        self.store.will_need(self.names[0], start * self._itemsize, (stop - start) * self._itemsize)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        start, stop = box.run
        nbytes = (stop - start) * self._itemsize
        return (arena.fetch("dense", self.store, self.names[0], start * self._itemsize, nbytes),)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        return arena.place(raw[0]).view(getattr(torch, self.spec.torch_name))


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {weight: (stored tensor,)} for all that is stored."""
    return Claims({name: (name,) for name in stored})


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the scheme of every dense weight."""
    return DENSE


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> DenseSources:
    """Returns the sources of a weight that is one stored tensor."""
    return DenseSources(ckpt, weight)
