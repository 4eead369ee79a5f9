"""A destination that keeps what it gets: the shards of one plan in its OutDir."""

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from lorafuse.events import OnEvent
from lorafuse.files.safetensors_writer import ShardWriter
from lorafuse.merge.destination import Outcome, Written
from lorafuse.outdir.interrupts import UNINTERRUPTED
from lorafuse.outdir.out_dir import OutDir
from lorafuse.planning.plan import Plan, PlannedShard, Step

N_FINISHING = 4  # files that may be synced while the next ones are made
# Threads beside those that sync: two files in the making are read back, two more wait to be synced.
N_BEHIND = 4
# Up to four workers make bytes hardly faster than they are hashed: there the hash goes first. More of them do
# not wait for it long; it then ends while the next file is made.
MOST_PATIENT, WAIT_NBYTES = 4, 4 << 20
_RECORDING = Lock()  # a place is told of one file at a time


class Output:
    """One plan in the making. A shard's file is open from its first weight to its last, so that at most two
    are: shards of what changes and of what does not follow each other side by side. Then a thread of the
    output finishes it, while the next one is made; at most `n_finishing` wait for that.

    `skip` are files that are there already or come from elsewhere. `on_shard` is called when a file is
    complete, by that thread, one at a time. An error that is this output's alone ends up in `error`; no more
    is written then, and the others go on.
    """

    def __init__(
        self,
        plan: Plan,
        out_dir: OutDir,
        on_event: OnEvent,
        *,
        skip: Collection[str] = (),
        on_shard: Callable[[PlannedShard, Written], None] = lambda shard, written: None,
        n_finishing: int = N_FINISHING,
    ) -> None:
        self.plan, self.out_dir = plan, out_dir
        self.outcome = Outcome()
        self.error: Exception | None = None
        self._on_event, self._on_shard, self._n_finishing = on_event, on_shard, n_finishing
        self._shards = [shard for shard in plan.shards if shard.file not in skip]
        self._shard_of = {tensor.name: shard for shard in self._shards for tensor in shard.tensors}
        self._writers: dict[str, ShardWriter] = {}
        self._left: dict[str, int] = {}  # bytes that are not accounted for, of each file in the making
        self._finishing: deque[tuple[ShardWriter, Future[Written]]] = deque()
        self._threads = ThreadPoolExecutor(N_FINISHING + N_BEHIND, "file")

    def steps(self) -> Iterator[Step]:
        """Those that are to be made."""
        return (step for shard in self._shards for step in shard.steps)

    @property
    def lacking(self) -> list[PlannedShard]:
        """Files that are to be made and are not complete."""
        written = {written.file for written in self.outcome.written}
        return [shard for shard in self._shards if shard.file not in written]

    def is_open(self, step: Step) -> bool:
        return self._shard_of[step.encoder.tensors[0].name].file in self._writers

    def open(self, step: Step) -> None:
        """Open the file of a step, once few enough are being finished."""
        while len(self._finishing) > self._n_finishing:
            self._tell_finished()
        self._open(self._shard_of[step.encoder.tensors[0].name])

    def _open(self, shard: PlannedShard) -> None:
        wait_nbytes = WAIT_NBYTES if self.plan.memory.n_workers > MOST_PATIENT else sys.maxsize
        writer = ShardWriter(
            self.out_dir.create(shard.file, shard.file_nbytes),
            list(shard.tensors),
            self._threads.submit,
            wait_nbytes,
        )
        self._writers[shard.file], self._left[shard.file] = writer, shard.nbytes

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a stored tensor, from its byte `offset` on, into its shard."""
        self._writers[self._shard_of[tensor].file].write(tensor, offset, data)

    def wrote(self, tensor: str, nbytes: int) -> None:
        """Tell of it, and of files that are finished. A file that has all its bytes is finished soon."""
        self._on_event({"event": "progress", "nbytes": nbytes})
        shard = self._shard_of[tensor]
        self._left[shard.file] -= nbytes
        if not self._left[shard.file]:
            self._finish_soon(shard)
        while self._finishing and self._finishing[0][1].done():
            self._tell_finished()

    def finish(self) -> None:
        """Complete the files that no tile completed: those without a single byte of data. Wait for all."""
        while self._finishing:
            self._tell_finished()
        for shard in self.lacking:
            if shard.file not in self._writers:
                self._open(shard)
            self._finish_soon(shard)
        while self._finishing:
            self._tell_finished()
        self.outcome.written.sort(key=lambda written: written.file)

    def _finish_soon(self, shard: PlannedShard) -> None:
        with UNINTERRUPTED:  # `close` waits for all threads that it knows
            writer = self._writers.pop(shard.file)
            self._finishing.append((writer, self._threads.submit(self._finish, shard, writer)))

    def _finish(self, shard: PlannedShard, writer: ShardWriter) -> Written:
        try:
            written = Written(shard.file, writer.nbytes, writer.finish())
        except BaseException:
            writer.close()
            raise
        with _RECORDING:
            self._on_shard(shard, written)
        return written

    def _tell_finished(self) -> None:
        """Wait for the file that has been waiting longest."""
        writer, future = self._finishing[0]
        written = future.result()
        self._finishing.popleft()
        self.outcome.written.append(written)
        self.outcome.timing.write_s += writer.seconds
        self._on_event(
            {"event": "shard", "file": written.file, "nbytes": written.nbytes, "sha256": written.sha256}
        )

    def fail(self, error: Exception) -> None:
        """Give this output up. Its files are closed at the end, when nobody writes to them any more."""
        self.error = self.error or error

    def close(self) -> None:
        """Finish the files that have all their bytes, and close the others."""
        for writer in self._writers.values():
            writer.stop()
        self._threads.shutdown()
        ended = [future for _, future in self._finishing]
        self.outcome.written += [future.result() for future in ended if not future.exception()]
        self._finishing.clear()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def output_of(
    plan: Plan,
    out_dir: OutDir,
    on_event: OnEvent,
    elsewhere: Collection[str] = (),
    n_finishing: int = N_FINISHING,
) -> Output:
    """Where the plan's tiles go: all but those of shards that `out_dir` has already, and of files that come
    from `elsewhere`. Each shard is recorded when it is complete."""

    def record(shard: PlannedShard, written: Written) -> None:
        measures = output.outcome.measures
        own = {step.name: measures[step.name] for step in shard.steps if step.name in measures}
        out_dir.record(written, own)

    skip = {*out_dir.finished, *elsewhere}
    output = Output(plan, out_dir, on_event, skip=skip, on_shard=record, n_finishing=n_finishing)
    for shard in out_dir.finished.values():
        output.outcome.written.append(shard.written)
        output.outcome.measures |= shard.measures
    if out_dir.finished:
        nbytes = sum(shard.nbytes for shard in plan.shards if shard.file in out_dir.finished)
        on_event({"event": "resumed", "n_shards": len(out_dir.finished), "nbytes": nbytes})
    return output
