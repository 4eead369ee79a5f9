"""What one pass over the base does: several results' plans, each tile decoded once for all of them, and each
result committed. A conversion is a pass with one result.

How a pass is put together, and how many there are, is decided in `passes.py`; where it runs, by whoever
called that.
"""

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field

import torch

from lorafuse.batching.publication import Publication
from lorafuse.errors import LorafuseError
from lorafuse.events import OnEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.names import RECEIPT, scheme_of
from lorafuse.inputs.fetching import Fetching
from lorafuse.inputs.unchanged import UnchangedInputs
from lorafuse.merge.destination import Written
from lorafuse.merge.loop import merge
from lorafuse.outdir.free_space import check_room, told_when_full
from lorafuse.outdir.journal import Attempt
from lorafuse.outdir.kinds import kind_of, shared_kind_of
from lorafuse.outdir.out_dir import OutDir, Part
from lorafuse.outdir.output import N_FINISHING, Output, output_of
from lorafuse.outdir.read_back import verify_shards
from lorafuse.outdir.sidecars import copied_files, write_json, write_sidecars
from lorafuse.planning.plan import Memory, Plan
from lorafuse.receipt.fields import InputEntry, Receipt
from lorafuse.receipt.no_update import no_update
from lorafuse.receipt.write import make_receipt
from lorafuse.settings import Settings

# A tokenizer that cannot be read is its adapter's fault; other errors of the file system are those of the
# output.
UNREADABLE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP}


@dataclass(frozen=True)
class PlannedJob:
    """A result that is planned; its adapters are open. `common`: the files that other results may need too,
    each with a key that stands for its bytes. `publication`: what is published of it, if anything is. `part`:
    the files that are made, where other workers make the others; `commits`: workers have made all files."""

    name: str
    out_dir: str
    settings: Settings
    plan: Plan
    files: UnchangedInputs
    attempt: Attempt
    on_event: OnEvent
    common: Mapping[str, str] = field(default_factory=dict)
    publication: Publication | None = None
    part: "PartOfJob | None" = None
    commits: bool = False

    def opened(self, *, overwrite: bool, restart: bool) -> OutDir:
        """Where it is made."""
        key = (self.out_dir, self.plan.plan_id, self.attempt)
        if self.part:
            return shared_kind_of(self.out_dir).open_part(
                *key, self.part.which, overwrite=overwrite, restart=restart, on_event=self.on_event
            )
        if self.commits:
            files = [shard.file for shard in self.plan.shards]
            return shared_kind_of(self.out_dir).open_whole(
                *key, files, overwrite=overwrite, on_event=self.on_event
            )
        return kind_of(self.out_dir).open_out_dir(
            *key, overwrite=overwrite, restart=restart, on_event=self.on_event
        )

    @property
    def elsewhere(self) -> Iterable[str]:
        """The files that come from other results, or that other workers make."""
        if self.part is None:
            return self.common
        return {shard.file for shard in self.plan.shards} - self.part.files


@dataclass(frozen=True)
class PartOfJob:
    """The files of a job that one of several workers makes."""

    which: Part
    files: frozenset[str]


@dataclass
class JobInProgress:
    """A job in its output directory. `main` makes what is its own alone, `commons` what it makes for others
    as well."""

    job: PlannedJob
    result: OutDir
    main: Output
    commons: Output | None = None
    waits: set[str] = field(default_factory=set)  # files that another job makes

    @property
    def error(self) -> Exception | None:
        """An error that is this job's alone."""
        return self.main.error or (self.commons.error if self.commons else None)

    def has(self, written: Written, file: str) -> None:
        """A file that came from elsewhere."""
        self.main.outcome.written.append(Written(file, written.nbytes, written.sha256))


@dataclass
class Pass:
    """What all passes of a call share. `divide` decides which job makes a file that several of them need;
    `asks_for_room`: a pass begins only where all of it fits. `stream`: files of a base on the hub are removed
    behind the merge."""

    base: Checkpoint
    ckpt_inputs: Callable[[], list[InputEntry]]
    device: torch.device
    overwrite: bool
    restart: bool
    on_done: Callable[[JobInProgress, Receipt], None]
    on_failed: Callable[[PlannedJob, Exception], None]
    divide: Callable[[Sequence[JobInProgress]], None] = lambda in_progress: None
    asks_for_room: bool = True
    stream: bool = False

    def run(self, jobs: Sequence[PlannedJob], memory: Memory, began: float) -> list[PlannedJob]:
        """Make the results of all jobs; their receipts count time from `began`, of `time.perf_counter`. An
        error of one job alone is reported, any other one raised; what was committed by then stays. Returns
        the jobs that waited for a file of one that failed: there are fewer of them each time."""
        with self._staged(jobs) as in_progress:
            if not in_progress:
                return []
            self.divide(in_progress)
            # Commons first: their files are complete before an output that waits for one is.
            outputs = [making.commons for making in in_progress if making.commons]
            outputs += [making.main for making in in_progress]
            whole = [making.job.plan for making in in_progress if not making.job.part]
            side_files = [file for plan in whole for file in copied_files(plan)]
            with closing(self._fetching(outputs, in_progress)) as fetching:
                if self.asks_for_room:
                    check_room(outputs, side_files, fetching.nbytes_beside)
                fetching.refuse_full_cache()
                allow_nonfinite = jobs[0].settings.allow_nonfinite
                with told_when_full(outputs, side_files):
                    with fetching.feed() as feed:
                        merge(outputs, memory, self.device, allow_nonfinite=allow_nonfinite, feed=feed)
                    return [making.job for making in in_progress if not self._conclude(making, began)]

    def _fetching(self, outputs: Sequence[Output], in_progress: Sequence[JobInProgress]) -> Fetching:
        """What is fetched for the outputs; with `stream` into the place of the first result."""
        first = in_progress[0]
        scratch = first.result.scratch() if self.stream else None
        return Fetching(self.base, [list(output.steps()) for output in outputs], scratch, first.job.on_event)

    @contextmanager
    def _staged(self, jobs: Sequence[PlannedJob]) -> Iterator[list[JobInProgress]]:
        """The jobs that get their output directory, be it one that a call that was cut off has begun to
        fill."""
        in_progress = []
        with ExitStack() as stack:
            for job in jobs:
                result = job.opened(overwrite=self.overwrite, restart=self.restart)
                if job.publication:
                    result = job.publication.out_dir(result, job.plan)
                try:
                    stack.enter_context(result)
                except LorafuseError as e:
                    self.on_failed(job, e)
                    continue
                # What waits for its last byte takes memory on its way to a store, and room on a small disk.
                few = bool(scheme_of(job.out_dir)) or bool(job.publication and not job.publication.keeps)
                main = output_of(job.plan, result, job.on_event, {*job.elsewhere}, 0 if few else N_FINISHING)
                in_progress.append(JobInProgress(job, result, main))
            yield in_progress

    def _conclude(self, making: JobInProgress, began: float) -> bool:
        """Commit a finished job, or say why it is not finished. False when it lacks a file through no fault
        of its own."""
        job, error = making.job, making.error
        if making.waits and not error:
            return False
        try:
            if error:
                raise error
            if making.commons:
                making.main.outcome.timing.add(making.commons.outcome.timing)
            receipt = None if job.part else self._complete(making, began)
            job.files.refuse_changed()
            making.result.commit()
        except Exception as e:
            if isinstance(e, OSError) and e.errno not in UNREADABLE:
                raise
            self.on_failed(job, e)
            return True
        if receipt is None:
            return True
        if nothing := no_update(receipt["tensors"]):
            job.on_event({"event": "warning", "message": nothing})
        self.on_done(making, receipt)
        return True

    def _complete(self, making: JobInProgress, began: float) -> Receipt:
        """Add to a result that has all its shards what else belongs into it, and check it. Returns the
        receipt. Raises ResultError."""
        job, outcome, out_dir = making.job, making.main.outcome, making.result
        write_sidecars(job.plan, self.base.config, out_dir)
        verify_shards(job.plan, outcome, out_dir)
        inputs = [*self.ckpt_inputs(), *job.files.adapter_inputs()]
        receipt = make_receipt(job.plan, outcome, out_dir, job.settings, inputs, time.perf_counter() - began)
        write_json(out_dir, RECEIPT, receipt)
        if job.publication:
            job.publication.add(out_dir, receipt, self.base.config, job.plan)
        return receipt
