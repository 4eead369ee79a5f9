"""The first rows of a weight: what a vocabulary that became smaller leaves of it."""

from dataclasses import replace

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.files.tensors import Box, TensorSpec


class FirstRows(Sources):
    """Of `sources`, the rows that `shape` has; of a bias [1, n], the first elements."""

    def __init__(self, sources: Sources, shape: tuple[int, ...]) -> None:
        self._all = sources
        self.spec = TensorSpec(sources.spec.dtype, shape)
        self.out_dtype, self.names, self.store = sources.out_dtype, sources.names, sources.store
        self.scheme, self.nbytes = sources.scheme, sources.nbytes
        self.held_nbytes, self.window_nbytes = sources.held_nbytes, sources.window_nbytes

    def _box(self, box: Box) -> Box:
        """The same elements of the whole weight."""
        spec = self._all.spec
        if box.width == spec.n_cols and box.height == self.spec.shape[0] > 1:
            return replace(box, height=spec.shape[0])
        return Box.of_run(spec, *box.run)

    def prepare(self, arena: Arena) -> None:
        self._all.prepare(arena)

    def release(self) -> None:
        self._all.release()

    def will_need(self, box: Box) -> None:
        self._all.will_need(self._box(box))

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return self._all.fetch(self._box(box), arena)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        return self._all.decode(raw, self._box(box), arena)
