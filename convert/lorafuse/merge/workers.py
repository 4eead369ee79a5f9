"""The threads that make tiles and write them.

A tile belongs to one worker, whose torch ops are single-threaded and work in buffers that it reuses;
parallelism is over tiles, never inside one, so the result does not depend on the number of threads.
"""

import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from threading import local

import torch

from lorafuse.arithmetic.torch_state import one_thread_here
from lorafuse.codecs import Arena, Sources
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.merge.destination import Destination
from lorafuse.merge.feed import EVERYTHING_HERE, Feed
from lorafuse.merge.tile import Made, make_tile, prepare, release, write_tile
from lorafuse.planning.plan import Memory
from lorafuse.planning.shared_weights import SharedWeight, SharedWeights


@dataclass
class Tile:
    """A finished tile: what was made and written for each variant of its weight."""

    weight: SharedWeight
    made: list[Made]
    last: bool  # of its weight


class TileWorkers:
    """Worker threads, and the scratch memory and buffers of each."""

    def __init__(
        self, planned: SharedWeights, memory: Memory, device: torch.device, feed: Feed = EVERYTHING_HERE
    ) -> None:
        self._planned, self._memory, self._device, self._feed = planned, memory, device, feed
        self._executor = ThreadPoolExecutor(memory.n_workers, "tile", initializer=self._start_worker)
        self._local = local()
        self._buffers: queue.SimpleQueue[list[torch.Tensor]] = queue.SimpleQueue()  # of each worker
        self._pending: deque[tuple[SharedWeight, int | None, Future[Tile]]] = deque()
        self._held_nbytes = 0  # by weights that are prepared and not released
        self._loader = Arena(device)

    def __enter__(self) -> "TileWorkers":
        # Not by the workers themselves: malloc keeps some of what is freed for a thread that is no more.
        memory = self._memory
        for _ in range(memory.n_workers):
            sizes = [memory.tile_nbytes] * memory.n_variants
            self._buffers.put([self._loader.host_buffer(n) for n in sizes])
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        # The executor refers to this object, a cycle: without this, scratch may still be there when the next
        # pass makes its own.
        self._pending.clear()
        self._local, self._buffers, self._loader = local(), queue.SimpleQueue(), Arena(self._device)

    def _start_worker(self) -> None:
        one_thread_here()
        self._local.arena = Arena(self._device)
        self._local.arena.bind()
        self._local.buffers = self._buffers.get()

    def tiles(self, outputs: Sequence[Destination]) -> Iterator[Tile]:
        """Finished tiles, weight by weight; none for outputs that were given up meanwhile."""
        for n, (whole, following) in enumerate(pairwise(chain(self._planned, [None]))):
            assert whole is not None
            weight = whole.only({number for number, output in enumerate(outputs) if output.error is None})
            if not weight.variants:
                continue
            # What is held at once stays within the budget; a weight alone always fits, the plan saw to that.
            while self._pending and (
                self._held_nbytes + weight.resident_nbytes > self._memory.resident_nbytes
                or self._shares_patch(weight)
            ):
                yield self._take()
            yield from self._until_ready(n)
            weight = self._prepared(weight, outputs)
            if not weight.variants:
                continue
            self._held_nbytes += weight.resident_nbytes
            yield from self._opened(weight, outputs)
            if following and following.needs_values and self._feed.is_ready(n + 1):
                # A pass over the next weight, if it needs one, beside the making of this one; tiles report
                # its errors.
                self._executor.submit(self._prepare, following.sources)
            for start, stop in weight.tiles():
                if len(self._pending) >= self._memory.n_tiles:
                    yield from self._half()
                weight.will_need(start, stop)
                future = self._executor.submit(self._make, weight, start, stop, outputs)
                self._pending.append((weight, n if stop == weight.size else None, future))
        while self._pending:
            yield self._take()

    def _until_ready(self, n: int) -> Iterator[Tile]:
        """Finished tiles of the weights before the one of that number, while what it is made from is not
        here."""
        while self._pending and not self._feed.is_ready(n):
            yield self._take()
        if not self._pending:
            self._feed.made(n - 1)
        self._feed.wait(n)

    def _opened(self, weight: SharedWeight, outputs: Sequence[Destination]) -> Iterator[Tile]:
        """Finished tiles of the weights before, where an output has to be opened for this one."""
        for variant in weight.variants if weight.size else ():
            for output in (outputs[number] for number in variant.outputs):
                if output.error is None and not output.is_open(variant.step):
                    while self._pending:
                        yield self._take()
                    if output.error is None:
                        output.open(variant.step)

    def _prepared(self, weight: SharedWeight, outputs: Sequence[Destination]) -> SharedWeight:
        """The weight with its patches prepared, less the outputs whose patches cannot be."""
        failed: set[int] = set()
        for variant in weight.variants:
            try:
                prepare(variant.step, weight.sources, self._loader)
                self._loader.settle()
            except Exception as e:  # whatever it is, the other outputs go on
                release(variant.step)
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

    def _half(self) -> Iterator[Tile]:
        """The older half of what is pending, once all of it is finished: to wake the calling thread for each
        tile takes longer than to account for it."""
        n = (len(self._pending) + 1) // 2
        _, _, future = self._pending[n - 1]
        future.exception()
        for _ in range(n):
            yield self._take()

    def _take(self) -> Tile:
        weight, number, future = self._pending.popleft()
        tile = future.result()
        if number is not None:
            self._feed.made(number)
            for variant in weight.variants:
                release(variant.step)
            if weight.needs_values:
                weight.sources.release()
            self._held_nbytes -= weight.resident_nbytes
        return tile

    def _prepare(self, sources: Sources) -> None:
        sources.prepare(self._local.arena)
        self._local.arena.settle()

    def _make(self, weight: SharedWeight, start: int, stop: int, outputs: Sequence[Destination]) -> Tile:
        buffers = self._local.buffers[: len(weight.variants)]
        try:
            made = make_tile(weight, start, stop, buffers, self._local.arena)
        except Exception as e:
            if isinstance(weight.sources.store, Checkpoint):  # which all outputs share
                raise
            made = [Made(error=e) for _ in weight.variants]
        self._local.arena.settle()
        for variant, of_variant, buffer in zip(weight.variants, made, buffers, strict=True):
            takers = [outputs[number] for number in variant.outputs]
            write_tile(of_variant, buffer, [output for output in takers if output.error is None])
        return Tile(weight, made, last=stop == weight.size)
