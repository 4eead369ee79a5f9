"""Codes of a matrix whose tiles are a few bytes of many stored rows: collected until they are longer runs of
these rows, so that fewer pieces are written."""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch

from lorafuse.arithmetic.arena import host_view
from lorafuse.codecs.encoder import Piece
from lorafuse.codecs.held import mapped

STRIP_NBYTES = 4_000_000
_ALIGNED = 16  # strips begin with a whole element of the stored tensor
# Tiles in the making are neighbours: what is not complete lies in as many strips as they touch.
N_STRIPS_HELD = 2


class Run(NamedTuple):
    """`times` parts of `nbytes` bytes, one after another in a buffer from byte `start` on. In the stored
    tensor of codes, the first lies at byte `at`, and each other `stride` bytes after the one before it."""

    at: int
    start: int
    nbytes: int
    times: int = 1
    stride: int = 0


@dataclass
class _Strip:
    """Bytes `at` to `at` + width of `count` stored rows."""

    at: int
    stride: int
    bytes: torch.Tensor  # uint8 [count, width]
    n_left: int

    def pieces(self, tensor: str) -> Iterator[Piece]:
        count, width = self.bytes.shape
        source = host_view(self.bytes.view(-1))
        if width == self.stride:
            yield Piece(tensor, self.at, 0, count * width, source)
            return
        for row in range(count):
            yield Piece(tensor, self.at + row * self.stride, row * width, width, source)


class Strips:
    """Of one weight. Tiles may come from any thread and in any order, each byte once."""

    def __init__(self, tensor: str) -> None:
        """`tensor`: the name of the codes in the output."""
        self._tensor = tensor
        self._lock = Lock()
        self._open: dict[int, _Strip] = {}

    def add(self, run: Run, buffer: torch.Tensor) -> Iterator[Piece]:
        """The pieces of the strips that the run, in a buffer on the host, completes."""
        part = buffer[run.start : run.start + run.times * run.nbytes].view(run.times, run.nbytes)
        width = max(STRIP_NBYTES // run.times // _ALIGNED, 1) * _ALIGNED
        col = run.at % run.stride
        for first in range(col // width * width, col + run.nbytes, width):
            begin, end = max(first, col), min(first + width, col + run.nbytes)
            at = run.at - col + first
            strip = self._strip(at, run, min(width, run.stride - first))
            strip.bytes[:, begin - first : end - first].copy_(part[:, begin - col : end - col])
            if self._is_complete(strip, (end - begin) * run.times):
                yield from strip.pieces(self._tensor)

    def _strip(self, at: int, run: Run, width: int) -> _Strip:
        with self._lock:
            if at not in self._open:
                made = mapped(run.times, width)
                self._open[at] = _Strip(at, run.stride, made, made.numel())
            return self._open[at]

    def _is_complete(self, strip: _Strip, n_added: int) -> bool:
        with self._lock:
            strip.n_left -= n_added
            if not strip.n_left:
                del self._open[strip.at]
            return not strip.n_left

    def drop(self) -> None:
        """Forget what is not complete."""
        with self._lock:
            self._open.clear()
