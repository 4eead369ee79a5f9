"""What simulated quantization shares: passes over a whole weight, and what is computed once of it."""

from collections.abc import Callable, Iterator
from threading import Lock

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Sources

CHUNK_NUMEL = 1 << 17  # quantized at a time: what a chunk touches stays in cache
CHUNK_NBYTES_PER_ELEMENT = 20
PASS_NUMEL = 1 << 19  # read at a time in the pass over the whole weight

State = tuple[torch.Tensor, ...]


class ComputedOnce:
    """What the first thread to ask for it computes, and what lasts until it is dropped."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._value: State | None = None

    def get(self, make: Callable[[], State]) -> State:
        with self._lock:
            if self._value is None:
                self._value = make()
            return self._value

    def drop(self) -> None:
        with self._lock:
            self._value = None


def as_loaded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values if values.dtype == dtype else values.to(dtype)


def pieces(inner: Sources, step: int, arena: Arena) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, elements from there on) over a whole weight; each is valid until the next."""
    for start in range(0, inner.spec.numel, step):
        stop = min(start + step, inner.spec.numel)
        yield start, inner.decode(inner.fetch(start, stop, arena), start, stop, arena)


def whole_rows(numel: int, n_cols: int) -> int:
    """About `numel` elements, as whole rows."""
    return max(numel // max(n_cols, 1), 1) * n_cols
