"""The loop: for every weight, for every tile: read, decode, patch, round once, write.

A tile belongs to one worker thread, whose torch ops are single-threaded and work in buffers that it reuses; parallelism is over
tiles, never inside one, so the result does not depend on the number of threads. Tiles are made ahead of the writer, within the
plan's memory; they are hashed and written in order by the calling thread. The first error ends the run.
"""

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import Any

import torch

from lorafuse.adapters.patch import Base
from lorafuse.codecs import Arena
from lorafuse.codecs.dense import DenseSources
from lorafuse.codecs.sources import DECODED_FP32, host_view
from lorafuse.errors import ResultError, shown
from lorafuse.measure import Measures, measure_tile
from lorafuse.shardfile import ShardWriter
from lorafuse.steps import Plan, PlannedShard, Step
from lorafuse.tensors import DTYPES

OnEvent = Callable[[dict[str, Any]], None]


@dataclass
class Timing:
    """Seconds. `compute_cpu_s` is decode + update + cast over all workers, `stats_cpu_s` what the measures cost beside it."""

    compute_cpu_s: float = 0.0
    stats_cpu_s: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0


@dataclass
class Written:
    """One finished output file."""

    file: str
    nbytes: int
    sha256: str


@dataclass
class Outcome:
    """What the loop did."""

    written: list[Written] = field(default_factory=list)
    measures: dict[str, Measures] = field(default_factory=dict)  # of merged weights
    timing: Timing = field(default_factory=Timing)


@dataclass
class Tile:
    """A finished tile; `buffer` goes back to the pool once it is written."""

    buffer: torch.Tensor
    nbytes: int
    timing: Timing
    measures: Measures | None = None


def merge(plan: Plan, staging: Path, device: torch.device, on_event: OnEvent) -> Outcome:
    """Write every shard of the plan into `staging`. Errors of reading and writing pass through."""
    outcome = Outcome()
    with _exact_single_threaded_torch(), Workshop(plan, device) as workshop:
        tiles = workshop.tiles()
        for shard in plan.shards:
            _write_shard(shard, staging, tiles, workshop, outcome, on_event)
    return outcome


@contextmanager
def _exact_single_threaded_torch() -> Iterator[None]:
    """One thread per op, and no reduced-precision matrix products, whatever the calling program chose; restored afterwards."""
    n_threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        torch.set_float32_matmul_precision(precision)


def _write_shard(
    shard: PlannedShard, staging: Path, tiles: Iterator[Tile], workshop: "Workshop", outcome: Outcome, on_event: OnEvent
) -> None:
    writer = ShardWriter(staging / shard.file, [(step.name, step.spec) for step in shard.steps])
    try:
        for step in shard.steps:
            for _ in step.tiles():
                tile = next(tiles)
                began = time.perf_counter()
                writer.write(host_view(tile.buffer)[: tile.nbytes])
                outcome.timing.write_s += time.perf_counter() - began
                _account(step, tile, outcome)
                workshop.give_back(tile.buffer)
                on_event({"event": "progress", "nbytes": tile.nbytes})
        began = time.perf_counter()
        sha256 = writer.finish()
        outcome.timing.write_s += time.perf_counter() - began
        outcome.written.append(Written(shard.file, writer.nbytes, sha256))
        on_event({"event": "shard", "file": shard.file, "nbytes": writer.nbytes, "sha256": sha256})
    finally:
        writer.close()


def _account(step: Step, tile: Tile, outcome: Outcome) -> None:
    for name in ("compute_cpu_s", "stats_cpu_s", "read_s"):
        setattr(outcome.timing, name, getattr(outcome.timing, name) + getattr(tile.timing, name))
    if tile.measures:
        if tile.measures.n_broken:
            raise ResultError(
                f"{shown(step.name)}: {tile.measures.n_broken} values of a tile are not finite in {step.spec.torch_name}, though "
                "the base's are: the adapter holds non-finite values, or the sum overflows. --dtype bfloat16 or float32 has a "
                "wider range."
            )
        if step.patches:
            outcome.measures.setdefault(step.name, Measures()).add(tile.measures)


class Workshop:
    """Worker threads, their scratch memory, and a pool of buffers for finished tiles."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._executor = ThreadPoolExecutor(plan.memory.n_workers, "tile", initializer=self._start_worker)
        self._local = local()
        # Last in, first out: the buffer that was written last is still in cache.
        self._buffers: queue.LifoQueue[torch.Tensor] = queue.LifoQueue()
        self._pending: deque[tuple[Step, bool, Future[Tile]]] = deque()
        self._held_nbytes = 0  # by steps that are prepared and not released
        self._loader = Arena(device)

    def __enter__(self) -> "Workshop":
        for _ in range(self._plan.memory.n_tiles):
            self._buffers.put(torch.empty(self._plan.memory.tile_nbytes, dtype=torch.uint8))
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _start_worker(self) -> None:
        torch.set_num_threads(1)  # OpenMP's number is each thread's own
        self._local.arena = Arena(self._device)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._buffers.put(buffer)

    def tiles(self) -> Iterator[Tile]:
        """Finished tiles in the plan's order."""
        for step in self._plan.steps:
            # What is held at once stays within the budget; a step alone always fits, the plan saw to that.
            while self._pending and (
                self._held_nbytes + step.resident_nbytes > self._plan.memory.resident_nbytes or self._shares_patch(step)
            ):
                yield self._take()
            self._held_nbytes += step.resident_nbytes
            for patch in step.patches:
                patch.prepare(Base(step.sources, self._loader), self._loader)
            for start, stop in step.tiles():
                while len(self._pending) >= self._plan.memory.n_tiles:
                    yield self._take()
                step.sources.will_need(start, stop)
                future = self._executor.submit(self._make, step, start, stop, self._buffers.get())
                self._pending.append((step, stop == step.spec.numel, future))
        while self._pending:
            yield self._take()

    def _shares_patch(self, step: Step) -> bool:
        """Whether a step in the making has a patch of this one, as tied weights that are both stored do: it is prepared for one."""
        return any(mine is other for mine in step.patches for pending, _, _ in self._pending for other in pending.patches)

    def _take(self) -> Tile:
        step, last, future = self._pending.popleft()
        tile = future.result()
        if last:
            for patch in step.patches:
                patch.release()
            self._held_nbytes -= step.resident_nbytes
        return tile

    def _make(self, step: Step, start: int, stop: int, buffer: torch.Tensor) -> Tile:
        if step.verbatim:
            return copy_tile(step, start, stop, buffer)
        return merge_tile(step, start, stop, buffer, self._local.arena)


def copy_tile(step: Step, start: int, stop: int, buffer: torch.Tensor) -> Tile:
    """Stored bytes as they are."""
    nbytes = (stop - start) * DTYPES[step.spec.dtype][0]
    assert isinstance(step.sources, DenseSources), "only a dense weight is copied"
    began = time.perf_counter()
    step.sources.copy_into(start, host_view(buffer)[:nbytes])
    return Tile(buffer, nbytes, Timing(read_s=time.perf_counter() - began))


@torch.inference_mode()
def merge_tile(step: Step, start: int, stop: int, buffer: torch.Tensor, arena: Arena) -> Tile:
    """Elements [start, stop) of a weight: decoded, patched, rounded once into `buffer`, measured."""
    nbytes = (stop - start) * DTYPES[step.spec.dtype][0]
    began = time.perf_counter()
    raw = step.sources.fetch(start, stop, arena)
    timing = Timing(read_s=time.perf_counter() - began)

    cpu_began = time.thread_time()
    finished = buffer[:nbytes].view(getattr(torch, step.spec.torch_name))
    base, total, stored = compute_tile(step, raw, start, stop, finished, arena)
    cpu_ended = time.thread_time()
    timing.compute_cpu_s = cpu_ended - cpu_began

    measures = measure_tile(base, total, stored, arena) if step.patches else _check_cast(base, stored)
    timing.stats_cpu_s = time.thread_time() - cpu_ended
    return Tile(buffer, nbytes, timing, measures)


def compute_tile(
    step: Step, raw: tuple[torch.Tensor, ...], start: int, stop: int, finished: torch.Tensor, arena: Arena
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode, patch and round what was fetched of a tile into `finished`, 1-D on the host. Returns, on the arena's device, the
    base, the sum in fp32 (the base itself without patches), and what is stored."""
    base = step.sources.decode(raw, start, stop, arena)
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
    return base, total, stored


def _check_cast(base: torch.Tensor, stored: torch.Tensor) -> Measures | None:
    """A cast to a narrower range can overflow."""
    if stored.dtype == base.dtype or bool(stored.isfinite().all()):
        return None
    return Measures(n_broken=int((~stored.isfinite() & base.isfinite()).sum()))
