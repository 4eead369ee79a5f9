"""A destination that keeps what it gets: the shards of one plan in its OutDir."""

import time
from collections.abc import Callable, Collection, Iterator

from lorafuse.events import OnEvent
from lorafuse.files.safetensors_writer import ShardWriter
from lorafuse.merge.destination import Outcome, Written
from lorafuse.outdir.interrupts import UNINTERRUPTED
from lorafuse.outdir.out_dir import OutDir
from lorafuse.planning.plan import Plan, PlannedShard, Step


class Output:
    """One plan in the making. A shard's file is open from its first weight to its
    last, so that at most two are: shards of what changes and of what does not follow each other side by side.

    `skip` are files that are there already or come from elsewhere. `on_shard` is called when a file is
    complete. An error that is this output's alone ends up in `error`; no more is written then, and the others
    go on.
    """

    def __init__(
        self,
        plan: Plan,
        out_dir: OutDir,
        on_event: OnEvent,
        *,
        skip: Collection[str] = (),
        on_shard: Callable[[PlannedShard, Written], None] = lambda shard, written: None,
    ) -> None:
        self.plan, self.out_dir = plan, out_dir
        self.outcome = Outcome()
        self.error: Exception | None = None
        self._on_event, self._on_shard = on_event, on_shard
        self._shards = [shard for shard in plan.shards if shard.file not in skip]
        self._shard_of = {tensor.name: shard for shard in self._shards for tensor in shard.tensors}
        self._writers: dict[str, ShardWriter] = {}

    def steps(self) -> Iterator[Step]:
        """Those that are to be made."""
        return (step for shard in self._shards for step in shard.steps)

    @property
    def lacking(self) -> list[PlannedShard]:
        """Files that are to be made and are not complete."""
        written = {written.file for written in self.outcome.written}
        return [shard for shard in self._shards if shard.file not in written]

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a stored tensor, from its byte `offset` on, into its shard."""
        began = time.perf_counter()
        shard = self._shard_of[tensor]
        writer = self._writers.get(shard.file) or self._open(shard)
        writer.write(tensor, offset, data)
        self.outcome.timing.write_s += time.perf_counter() - began
        self._on_event({"event": "progress", "nbytes": len(data)})
        if writer.is_complete:
            self._finish(shard, writer)

    def finish(self) -> None:
        """Complete the files that no tile completed: those without a single byte of data."""
        for shard in self.lacking:
            self._finish(shard, self._writers.get(shard.file) or self._open(shard))
        self.outcome.written.sort(key=lambda written: written.file)

    def _open(self, shard: PlannedShard) -> ShardWriter:
        writer = ShardWriter(self.out_dir.create(shard.file, shard.file_nbytes), list(shard.tensors))
        self._writers[shard.file] = writer
        return writer

    def _finish(self, shard: PlannedShard, writer: ShardWriter) -> None:
        began = time.perf_counter()
        with UNINTERRUPTED:
            written = Written(shard.file, writer.nbytes, writer.finish())
            self.outcome.timing.write_s += time.perf_counter() - began
            del self._writers[shard.file]
            self.outcome.written.append(written)
            self._on_shard(shard, written)
        self._on_event(
            {"event": "shard", "file": written.file, "nbytes": written.nbytes, "sha256": written.sha256}
        )

    def fail(self, error: Exception) -> None:
        """Give this output up."""
        self.error = self.error or error
        self.close()

    def close(self) -> None:
        """Close files that are not complete."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def output_of(plan: Plan, out_dir: OutDir, on_event: OnEvent, elsewhere: Collection[str] = ()) -> Output:
    """Where the plan's tiles go: all but those of shards that `out_dir` has already, and of files that come
    from `elsewhere`. Each shard is recorded when it is complete."""

    def record(shard: PlannedShard, written: Written) -> None:
        measures = output.outcome.measures
        own = {step.name: measures[step.name] for step in shard.steps if step.name in measures}
        out_dir.record(written, own)

    output = Output(plan, out_dir, on_event, skip={*out_dir.finished, *elsewhere}, on_shard=record)
    for shard in out_dir.finished.values():
        output.outcome.written.append(shard.written)
        output.outcome.measures |= shard.measures
    if out_dir.finished:
        nbytes = sum(shard.nbytes for shard in plan.shards if shard.file in out_dir.finished)
        on_event({"event": "resumed", "n_shards": len(out_dir.finished), "nbytes": nbytes})
    return output
