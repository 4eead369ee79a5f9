"""The loop: for every weight, for every tile: read, decode, then for every output patch, round once, write.

A tile belongs to one worker thread, whose torch ops are single-threaded and work in buffers that it reuses; parallelism is over
tiles, never inside one, so the result does not depend on the number of threads. Tiles are made ahead of the writer, within the
plan's memory; they are hashed and written in order by the calling thread. The first error ends the run; one that is an output's own
ends that output.
"""

import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from threading import local

import torch

from lorafuse.adapters.patch import Base
from lorafuse.checkpoint import Checkpoint
from lorafuse.codecs import Arena, Sources
from lorafuse.codecs.dense import DenseSources
from lorafuse.codecs.sources import DECODED_FP32, host_view
from lorafuse.errors import LorafuseError, ResultError, shown
from lorafuse.measure import Measures, measure_tile
from lorafuse.outputs import Destination, Timing
from lorafuse.steps import Memory, Step
from lorafuse.turns import Result, Turn, turns


@dataclass
class Piece:
    """What a finished tile holds for one result."""

    nbytes: int = 0
    timing: Timing = field(default_factory=Timing)
    measures: Measures | None = None
    error: LorafuseError | None = None  # of these outputs alone


@dataclass
class Tile:
    """A finished tile: a piece for each result of its turn, in buffers that go back to the pool once they are written."""

    turn: Turn
    buffers: list[torch.Tensor]
    pieces: list[Piece]


def merge(outputs: Sequence[Destination], memory: Memory, device: torch.device) -> None:
    """Make what the outputs need. Errors of reading and writing pass through; what is wrong with one output alone ends
    up in its `error`, and when nothing else is left, ends the loop."""
    planned = turns([output.steps() for output in outputs])
    try:
        with one_thread(), Workshop(planned, memory, device) as workshop:
            for tile in workshop.tiles(outputs):
                for result, piece, buffer in zip(tile.turn.results, tile.pieces, tile.buffers, strict=True):
                    for number in result.outputs:
                        if outputs[number].error is None:
                            _deliver(outputs[number], result.step, piece, buffer)
                workshop.give_back(tile.buffers)
        for output in outputs:
            if output.error is None:
                output.finish()
    finally:
        for output in outputs:
            output.close()


def _deliver(output: Destination, step: Step, piece: Piece, buffer: torch.Tensor) -> None:
    """A finished piece to one output: account for it and write it, or give the output up."""
    error = piece.error or _complaint(step, piece.measures)
    if error:
        output.fail(error)
        return
    output.outcome.timing.add(piece.timing)
    if step.patches and piece.measures:
        output.outcome.measures.setdefault(step.name, Measures()).add(piece.measures)
    output.write(step.name, host_view(buffer)[: piece.nbytes])


def _complaint(step: Step, measures: Measures | None) -> ResultError | None:
    if measures is None or not measures.n_broken:
        return None
    return ResultError(
        f"{shown(step.name)}: {measures.n_broken} values of a tile are not finite in {step.spec.torch_name}, though the base's "
        "are: the adapter holds non-finite values, or the sum overflows. --dtype bfloat16 or float32 has a wider range."
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread per op, and no reduced-precision matrix products, whatever the calling program chose; restored afterwards."""
    n_threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        torch.set_float32_matmul_precision(precision)


class Workshop:
    """Worker threads, their scratch memory, and a pool of buffers for finished tiles."""

    def __init__(self, planned: list[Turn], memory: Memory, device: torch.device) -> None:
        self._planned, self._memory, self._device = planned, memory, device
        self._executor = ThreadPoolExecutor(memory.n_workers, "tile", initializer=self._start_worker)
        self._local = local()
        # Last in, first out: the buffer that was written last is still in cache.
        self._buffers: queue.LifoQueue[torch.Tensor] = queue.LifoQueue()
        self._pending: deque[tuple[Turn, bool, Future[Tile]]] = deque()
        self._held_nbytes = 0  # by turns that are prepared and not released
        self._loader = Arena(device)

    def __enter__(self) -> "Workshop":
        for _ in range(self._memory.n_tiles * self._memory.n_results):
            self._buffers.put(torch.empty(self._memory.tile_nbytes, dtype=torch.uint8))
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        # The executor refers to this object, a cycle: without this, buffers may still be there when the next pass makes its own.
        self._pending.clear()
        self._buffers, self._loader = queue.LifoQueue(), Arena(self._device)

    def _start_worker(self) -> None:
        torch.set_num_threads(1)  # OpenMP's number is each thread's own
        self._local.arena = Arena(self._device)

    def give_back(self, buffers: list[torch.Tensor]) -> None:
        for buffer in buffers:
            self._buffers.put(buffer)

    def tiles(self, outputs: Sequence[Destination]) -> Iterator[Tile]:
        """Finished tiles, weight by weight; none for outputs that were given up meanwhile."""
        for whole, following in pairwise([*self._planned, None]):
            assert whole is not None
            turn = whole.only({number for number, output in enumerate(outputs) if output.error is None})
            # What is held at once stays within the budget; a turn alone always fits, the plan saw to that.
            while self._pending and (
                self._held_nbytes + turn.resident_nbytes > self._memory.resident_nbytes or self._shares_patch(turn)
            ):
                yield self._take()
            turn = self._prepared(turn, outputs)
            self._held_nbytes += turn.resident_nbytes
            if following and turn.results:
                # A pass over the next weight, if it needs one, beside the making of this one; tiles report its errors.
                self._executor.submit(self._prepare, following.sources)
            for start, stop in turn.tiles() if turn.results else ():
                while len(self._pending) >= self._memory.n_tiles:
                    yield self._take()
                turn.sources.will_need(start, stop)
                buffers = [self._buffers.get() for _ in turn.results]
                future = self._executor.submit(self._make, turn, start, stop, buffers)
                self._pending.append((turn, stop == turn.sources.spec.numel, future))
        while self._pending:
            yield self._take()

    def _prepared(self, turn: Turn, outputs: Sequence[Destination]) -> Turn:
        """The turn with its patches prepared, less the outputs whose patches cannot be."""
        failed: set[int] = set()
        for result in turn.results:
            try:
                for patch in result.step.patches:
                    patch.prepare(Base(turn.sources, self._loader), self._loader)
            except LorafuseError as e:
                for patch in result.step.patches:
                    patch.release()
                for number in result.outputs:
                    outputs[number].fail(e)
                failed |= {*result.outputs}
        return turn.only({number for result in turn.results for number in result.outputs} - failed)

    def _shares_patch(self, turn: Turn) -> bool:
        """Whether a turn in the making has a patch of this one, as tied weights that are both stored do: it is prepared for one."""
        return any(mine is other for mine in turn.patches for pending, _, _ in self._pending for other in pending.patches)

    def _take(self) -> Tile:
        turn, last, future = self._pending.popleft()
        tile = future.result()
        if last:
            for patch in turn.patches:
                patch.release()
            turn.sources.release()
            self._held_nbytes -= turn.resident_nbytes
        return tile

    def _prepare(self, sources: Sources) -> None:
        sources.prepare(self._local.arena)

    def _make(self, turn: Turn, start: int, stop: int, buffers: list[torch.Tensor]) -> Tile:
        try:
            if turn.verbatim:
                return Tile(turn, buffers, [copy_tile(turn.results[0].step, start, stop, buffers[0])])
            return Tile(turn, buffers, make_pieces(turn, start, stop, buffers, self._local.arena))
        except LorafuseError as e:
            if isinstance(turn.sources.store, Checkpoint):  # which all outputs share
                raise
            return Tile(turn, buffers, [Piece(error=e) for _ in turn.results])


def copy_tile(step: Step, start: int, stop: int, buffer: torch.Tensor) -> Piece:
    """Stored bytes as they are."""
    nbytes = (stop - start) * step.itemsize
    assert isinstance(step.sources, DenseSources), "only a dense weight is copied"
    began = time.perf_counter()
    step.sources.copy_into(start, host_view(buffer)[:nbytes])
    return Piece(nbytes, Timing(read_s=time.perf_counter() - began))


@torch.inference_mode()
def make_pieces(turn: Turn, start: int, stop: int, buffers: list[torch.Tensor], arena: Arena) -> list[Piece]:
    """Elements [start, stop) of a weight: decoded once, then patched, rounded once and measured for each result, in its buffer. The
    time of reading and decoding counts for the first."""
    began = time.perf_counter()
    raw = turn.sources.fetch(start, stop, arena)
    read_s, cpu_began = time.perf_counter() - began, time.thread_time()
    base = turn.sources.decode(raw, start, stop, arena)
    pieces = []
    for result, buffer in zip(turn.results, buffers, strict=True):
        piece = _make_piece(result, base, start, stop, buffer, arena, cpu_began)
        piece.timing.read_s, read_s = read_s, 0.0
        pieces.append(piece)
        cpu_began = time.thread_time()
    return pieces


def _make_piece(
    result: Result, base: torch.Tensor, start: int, stop: int, buffer: torch.Tensor, arena: Arena, cpu_began: float
) -> Piece:
    """One result of a decoded tile; its time counts from `cpu_began` on."""
    step = result.step
    piece = Piece((stop - start) * step.itemsize)
    finished = buffer[: piece.nbytes].view(getattr(torch, step.spec.torch_name))
    try:
        total, stored = compute_tile(step, base, start, stop, finished, arena)
    except LorafuseError as e:
        piece.error = e
        return piece
    cpu_ended = time.thread_time()
    piece.timing.compute_cpu_s = cpu_ended - cpu_began
    piece.measures = measure_tile(base, total, stored, arena) if step.patches else _check_cast(base, stored)
    piece.timing.stats_cpu_s = time.thread_time() - cpu_ended
    return piece


def compute_tile(
    step: Step, base: torch.Tensor, start: int, stop: int, finished: torch.Tensor, arena: Arena
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch a decoded tile and round it into `finished`, 1-D on the host; `base` stays as it is. Returns, on the arena's device,
    the sum in fp32 (the base itself without patches), and what is stored."""
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


def _check_cast(base: torch.Tensor, stored: torch.Tensor) -> Measures | None:
    """A cast to a narrower range can overflow."""
    if stored.dtype == base.dtype or bool(stored.isfinite().all()):
        return None
    return Measures(n_broken=int((~stored.isfinite() & base.isfinite()).sum()))
