"""How a tile is made: by one worker thread, in buffers that it reuses.

A tile belongs to one worker, whose torch ops are single-threaded; parallelism is over tiles, never inside
one, so the variant does not depend on the number of threads.
"""

import math
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from threading import local

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, host_view
from lorafuse.arithmetic.measure import Measures, count_broken, measure_tile
from lorafuse.arithmetic.torch_state import one_thread_here
from lorafuse.codecs import Arena, Sources
from lorafuse.codecs.dense import DenseSources
from lorafuse.errors import LorafuseError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.merge.destination import Destination, Timing
from lorafuse.patches.patch import Base
from lorafuse.planning.plan import Memory, Step
from lorafuse.planning.shared_weights import SharedWeight, Variant


@dataclass
class Piece:
    """What a finished tile holds for one variant."""

    nbytes: int = 0
    timing: Timing = field(default_factory=Timing)
    measures: Measures | None = None
    error: LorafuseError | None = None  # of these outputs alone


@dataclass
class Tile:
    """A finished tile: a piece for each variant of its weight, in buffers that go back to the pool once they
    are written."""

    weight: SharedWeight
    buffers: list[torch.Tensor]
    pieces: list[Piece]
    last: bool  # of its weight


class TileWorkers:
    """Worker threads, their scratch memory, and a pool of buffers for finished tiles."""

    def __init__(self, planned: list[SharedWeight], memory: Memory, device: torch.device) -> None:
        self._planned, self._memory, self._device = planned, memory, device
        self._executor = ThreadPoolExecutor(memory.n_workers, "tile", initializer=self._start_worker)
        self._local = local()
        # Last in, first out: the buffer that was written last is still in cache.
        self._buffers: queue.LifoQueue[torch.Tensor] = queue.LifoQueue()
        self._pending: deque[tuple[SharedWeight, bool, Future[Tile]]] = deque()
        self._held_nbytes = 0  # by turns that are prepared and not released
        self._loader = Arena(device)

    def __enter__(self) -> "TileWorkers":
        for _ in range(self._memory.n_tiles * self._memory.n_variants):
            self._buffers.put(torch.empty(self._memory.tile_nbytes, dtype=torch.uint8))
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        # The executor refers to this object, a cycle: without this, buffers may still be there when the next
        # pass makes its own.
        self._pending.clear()
        self._buffers, self._loader = queue.LifoQueue(), Arena(self._device)

    def _start_worker(self) -> None:
        one_thread_here()
        self._local.arena = Arena(self._device)

    def give_back(self, buffers: list[torch.Tensor]) -> None:
        for buffer in buffers:
            self._buffers.put(buffer)

    def tiles(self, outputs: Sequence[Destination]) -> Iterator[Tile]:
        """Finished tiles, weight by weight; none for outputs that were given up meanwhile."""
        for whole, following in pairwise([*self._planned, None]):
            assert whole is not None
            weight = whole.only({number for number, output in enumerate(outputs) if output.error is None})
            # What is held at once stays within the budget; a weight alone always fits, the plan saw to that.
            while self._pending and (
                self._held_nbytes + weight.resident_nbytes > self._memory.resident_nbytes
                or self._shares_patch(weight)
            ):
                yield self._take()
            weight = self._prepared(weight, outputs)
            self._held_nbytes += weight.resident_nbytes
            if following and weight.variants:
                # A pass over the next weight, if it needs one, beside the making of this one; tiles report
                # its errors.
                self._executor.submit(self._prepare, following.sources)
            for start, stop in weight.tiles() if weight.variants else ():
                while len(self._pending) >= self._memory.n_tiles:
                    yield self._take()
                weight.sources.will_need(start, stop)
                buffers = [self._buffers.get() for _ in weight.variants]
                future = self._executor.submit(self._make, weight, start, stop, buffers)
                self._pending.append((weight, stop == weight.sources.spec.numel, future))
        while self._pending:
            yield self._take()

    def _prepared(self, weight: SharedWeight, outputs: Sequence[Destination]) -> SharedWeight:
        """The weight with its patches prepared, less the outputs whose patches cannot be."""
        failed: set[int] = set()
        for variant in weight.variants:
            try:
                for patch in variant.step.patches:
                    patch.prepare(Base(weight.sources, self._loader), self._loader)
            except LorafuseError as e:
                for patch in variant.step.patches:
                    patch.release()
                for number in variant.outputs:
                    outputs[number].fail(e)
                failed |= {*variant.outputs}
        return weight.only({number for variant in weight.variants for number in variant.outputs} - failed)

    def _shares_patch(self, weight: SharedWeight) -> bool:
        """Whether a weight in the making has a patch of this one, as tied weights that are both stored do: it
        is prepared for one."""
        return any(
            mine is other
            for mine in weight.patches
            for pending, _, _ in self._pending
            for other in pending.patches
        )

    def _take(self) -> Tile:
        weight, last, future = self._pending.popleft()
        tile = future.result()
        if last:
            for patch in weight.patches:
                patch.release()
            weight.sources.release()
            self._held_nbytes -= weight.resident_nbytes
        return tile

    def _prepare(self, sources: Sources) -> None:
        sources.prepare(self._local.arena)

    def _make(self, weight: SharedWeight, start: int, stop: int, buffers: list[torch.Tensor]) -> Tile:
        last = stop == weight.sources.spec.numel
        try:
            if weight.verbatim:
                pieces = [copy_tile(weight.variants[0].step, start, stop, buffers[0])]
            else:
                pieces = make_pieces(weight, start, stop, buffers, self._local.arena)
        except LorafuseError as e:
            if isinstance(weight.sources.store, Checkpoint):  # which all outputs share
                raise
            pieces = [Piece(error=e) for _ in weight.variants]
        return Tile(weight, buffers, pieces, last)


def copy_tile(step: Step, start: int, stop: int, buffer: torch.Tensor) -> Piece:
    """Stored bytes as they are."""
    nbytes = (stop - start) * step.itemsize
    assert isinstance(step.sources, DenseSources), "only a dense weight is copied"
    began = time.perf_counter()
    step.sources.copy_into(start, host_view(buffer)[:nbytes])
    return Piece(nbytes, Timing(read_s=time.perf_counter() - began))


@torch.inference_mode()
def make_pieces(
    weight: SharedWeight, start: int, stop: int, buffers: list[torch.Tensor], arena: Arena
) -> list[Piece]:
    """Elements [start, stop) of a weight: decoded once, then patched, rounded once and measured for each
    variant, in its buffer. The time of reading and decoding counts for the first."""
    began = time.perf_counter()
    raw = weight.sources.fetch(start, stop, arena)
    read_s, cpu_began = time.perf_counter() - began, time.thread_time()
    base = weight.sources.decode(raw, start, stop, arena)
    pieces = []
    for variant, buffer in zip(weight.variants, buffers, strict=True):
        piece = _make_piece(variant, base, start, stop, buffer, arena, cpu_began)
        piece.timing.read_s, read_s = read_s, 0.0
        pieces.append(piece)
        cpu_began = time.thread_time()
    return pieces


def _make_piece(
    variant: Variant,
    base: torch.Tensor,
    start: int,
    stop: int,
    buffer: torch.Tensor,
    arena: Arena,
    cpu_began: float,
) -> Piece:
    """One variant of a decoded tile; its time counts from `cpu_began` on."""
    step = variant.step
    piece = Piece((stop - start) * step.itemsize)
    finished = buffer[: piece.nbytes].view(getattr(torch, step.spec.torch_name))
    try:
        total, stored = compute_tile(step, base, start, stop, finished, arena)
    except LorafuseError as e:
        piece.error = e
        return piece
    cpu_ended = time.thread_time()
    piece.timing.compute_cpu_s = cpu_ended - cpu_began
    piece.measures = (
        measure_tile(base, total, stored, arena) if step.patches else _check_values(step, base, stored)
    )
    piece.timing.stats_cpu_s = time.thread_time() - cpu_ended
    return piece


def compute_tile(
    step: Step, base: torch.Tensor, start: int, stop: int, finished: torch.Tensor, arena: Arena
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch a decoded tile and round it into `finished`, 1-D on the host; `base` stays as it is. Returns, on
    the arena's device, the sum in fp32 (the base itself without patches), and what is stored."""
    on_host = arena.device.type == "cpu"
    stored = finished if on_host else arena.get("merge.stored", stop - start, finished.dtype)
    total = base
    if step.patches:
        name = "sum.fp32" if base.dtype == torch.float32 else DECODED_FP32
        total = arena.get(name, stop - start, torch.float32).copy_(base)
        for patch in step.patches:
            patch.apply(total.view(-1, step.row_numel), start // step.row_numel, arena)
    stored.copy_(total)  # the one rounding, to nearest even
    if not on_host:
        finished.copy_(stored)
    return total, stored


def _check_values(step: Step, base: torch.Tensor, stored: torch.Tensor) -> Measures | None:
    """A cast to a narrower range can overflow, and a scale of a quantized weight can be NaN; what is copied
    is not looked at."""
    # One sum rather than isfinite: a hundredth of the time. It can overflow itself, so that elements are
    # counted then.
    if step.verbatim or math.isfinite(float(stored.sum())):
        return None
    return count_broken(base, stored)
