"""How a batch's passes are put together, and what became of each job.

Jobs are planned as they come, until the next one would not fit into the pass: into the memory limit, the
number of files that may be open, the disk. Then the pass runs, its adapters are closed, and the next one is
put together. So nothing but a line for each job grows with their number.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import fspath

from lorafuse.adapters.reading.beside import TRAINED_BESIDE
from lorafuse.adapters.reading.directory import BIN
from lorafuse.batching.answers import refuse_full
from lorafuse.batching.common_files import CommonFiles
from lorafuse.batching.destinations import UPLOAD_NBYTES, Destinations
from lorafuse.batching.existing_results import ExistingResults, common_files_of
from lorafuse.batching.jobs import Job, JobState
from lorafuse.batching.one_pass import JobInProgress, Pass, PlannedJob
from lorafuse.batching.pass_size import (
    JOB_NBYTES,
    MAX_MEMBERS,
    MEMBER_FILES,
    OUTPUT_NBYTES,
    SPARE_FILES,
    STEP_NBYTES,
    disk_error,
    files_left,
    speed,
    wanted_nbytes,
)
from lorafuse.batching.rehearsal import Rehearsal
from lorafuse.errors import LorafuseError, OutDirError, StorageError, as_own, shown
from lorafuse.events import Event, JobEvent, OnEvent, TotalEvent, of_job, warn_by
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.inputs.fetching import streamed_nbytes
from lorafuse.inputs.located import LocatedAdapter, located_adapter, opened
from lorafuse.inputs.unchanged import UnchangedInputs
from lorafuse.outdir.kinds import kind_of
from lorafuse.planning.announce import announced
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.memory import RUNTIME_NBYTES, Needs, fit_memory, within_limit
from lorafuse.planning.plan import STORED_TENSOR_NBYTES, Memory
from lorafuse.planning.shared_weights import SharedWeights
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import kept_in_sum
from lorafuse.settings import Settings
from lorafuse.trained_base.base_weights import base_weights


@dataclass
class Member:
    """A job that goes into the next pass. Its adapter is open until `stack` is closed."""

    job: Job
    planned: PlannedJob
    adapter_nbytes: int  # what the adapter holds in memory
    stack: ExitStack

    @property
    def held_nbytes(self) -> int:
        of_steps = sum(1 for _ in self.planned.plan.steps) * STEP_NBYTES
        of_upload = UPLOAD_NBYTES if self.planned.publication else 0
        return self.adapter_nbytes + of_steps + of_upload + OUTPUT_NBYTES


@dataclass
class Batch:
    """A batch under way: what is to do, and what became of what is done."""

    base: Checkpoint
    root: Folder
    settings: Settings
    finished: ExistingResults
    common_files: CommonFiles
    todo: deque[Job]
    on_event: OnEvent
    rehearsal: Rehearsal | None  # of a dry run
    overwrite: bool
    stream: bool
    destinations: Destinations
    states: dict[str, JobState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = base_weights(self.base, self.settings.base_quant, warn_by(self.on_event))
        self.kind = kind_of(str(self.root))
        self._n_jobs, self._nbytes, self._began = len(self.todo), 0, time.perf_counter()

    @property
    def dry_run(self) -> bool:
        return self.rehearsal is not None

    def run(self, one_pass: Pass) -> None:
        """Pass after pass, until nothing is to do; of a dry run, plan only. Raises StorageError, of a dry run
        where the results do not fit the disk."""
        while self.todo:
            with self._members() as (members, memory):
                names = [member.job.name for member in members]
                planned = [member.planned for member in members]
                if members:
                    nbytes = wanted_nbytes(planned, self.finished)
                    self.on_event(
                        {"event": "pass", "jobs": names, "nbytes": nbytes, "n_workers": memory.n_workers}
                    )
                if members and not self.rehearsal:
                    waiting = {job.name for job in one_pass.run(planned, memory, time.perf_counter())}
                    again = [member.job for member in members if member.job.name in waiting]
                    self.todo.extendleft(reversed(again))
                for name in names if self.rehearsal else ():
                    self._state(name, "planned")
        self._total()

    def _total(self) -> None:
        """Say what became of all jobs. Raises StorageError."""
        states = dict(Counter(state.state for state in self.states.values()))
        said: TotalEvent = {"event": "total", "states": states, "nbytes": self._nbytes,
                            "wall_s": time.perf_counter() - self._began}  # fmt: skip
        if self.rehearsal:
            said |= {"disk": self.rehearsal.disk(), "estimate": self.rehearsal.estimate()}
            said["nbytes"] = self.rehearsal.nbytes
        self.on_event(said)
        if self.rehearsal:
            refuse_full(str(self.root), self.rehearsal.disk())

    @contextmanager
    def _members(self) -> Iterator[tuple[list[Member], Memory]]:
        """The next jobs that go into one pass, and how its memory is spent; none when no job that is left can
        be planned."""
        members: list[Member] = []
        memory = Memory(0, 0, 0, 0, 0)
        with ExitStack() as stack:
            while self.todo and len(members) < MAX_MEMBERS:
                job, notes, full = self.todo[0], list[Event](), None
                try:  # what a job says comes after it: an error of who listens is not the job's
                    scale = job.settings(self.settings).adapter_scale
                    located = located_adapter(job.adapter, scale, None, notes.append)
                    if members and not self._may_open(located.folder, members):
                        break
                    member = self._member(job, located)
                    if member:
                        stack.callback(member.stack.close)
                        more = self._memory([*members, member], memory)
                        full = None if self.rehearsal else self._disk_error([*members, member])
                        if more is None or (full and members):
                            break
                        warnings, plan = announced(member.planned.plan, dry_run=self.dry_run)
                        if push := self.destinations.pushes.get(job.name):
                            plan["push_to_hub"] = push.repo
                        if self.rehearsal:
                            self.rehearsal.add(plan, member.planned)
                        notes += [*warnings, plan]
                        members, memory = [*members, member], more
                except Exception as e:
                    self._failed(job.name, job.adapter, e)
                else:
                    if full:
                        raise full
                    if member is None:
                        self._state(job.name, "skipped")
                    for note in notes if member else ():
                        of_job(self.on_event, job.name)(note)
                self.todo.popleft()
            yield members, memory

    def _member(self, job: Job, located: LocatedAdapter) -> Member | None:
        """The job with its plan and an open adapter; None when its result is there already. Raises
        LorafuseError or OSError."""
        settings, out_dir = job.settings(self.settings), str(self.root.sub_folder(job.name))
        self.kind.check_out_dir(out_dir, [self.base.folder, located.root], overwrite=True)
        with ExitStack() as stack:
            adapters = stack.enter_context(opened([located]))
            files = UnchangedInputs(self.base, adapters)
            if self._is_there(job.name, settings, files) and self._is_published(job.name):
                if not self.dry_run:
                    self.kind.clean_up(out_dir)
                return None
            plan = make_plan(
                self.base, adapters, settings, weights=self.weights, each_format=self.dry_run,
                held_by_writing=self.kind.held_nbytes,
            )  # fmt: skip
            files.refuse_nonfinite()
            planned = PlannedJob(
                job.name, out_dir, settings, plan, files, files.attempt(plan, settings),
                of_job(self.on_event, job.name), common_files_of(plan),
                self.destinations.of(job.name, self.base, adapters),
            )  # fmt: skip
            return Member(job, planned, adapters[0].adapter.nbytes, stack.pop_all())

    def _is_there(self, name: str, settings: Settings, files: UnchangedInputs) -> bool:
        inputs = files.adapter_inputs()
        try:
            return self.finished.holds(name, settings, inputs)
        except OutDirError:
            if self.overwrite:
                return False
            if self.dry_run:
                raise
        self.kind.clean_up(str(self.root.sub_folder(name)))  # it may be a part that a run was cut off at
        return self.finished.holds(name, settings, inputs)

    def _is_published(self, name: str) -> bool:
        """Whether a result that is there is also where it is to go. Raises OutDirError."""
        missing = self.destinations.lacks(name, self.root.sub_folder(name))
        if missing and not self.overwrite:
            raise OutDirError(missing)
        return missing is None

    def _may_open(self, adapter: Folder, members: Sequence[Member]) -> bool:
        """Whether one more adapter may be opened beside these: by its files, and what is loaded of it."""
        sizes = {name: adapter.facts(name).nbytes for name in adapter.names("*") if adapter.exists(name)}
        n_files = sum(name.endswith(".safetensors") for name in sizes)
        loaded = sum(sizes.get(name, 0) for name in (*TRAINED_BESIDE, *([] if n_files else [BIN])))
        enough_files = n_files + (len(members) + 1) * MEMBER_FILES + SPARE_FILES <= files_left()
        held_nbytes = self._held_nbytes(members) + loaded + RUNTIME_NBYTES
        return enough_files and held_nbytes <= self.settings.memory_nbytes

    def _memory(self, members: Sequence[Member], before: Memory) -> Memory | None:
        """How the limit is spent on a pass of these; `before`, on all but the last. None when they do not fit
        together, or would be slower. Raises UsageError when a single one does not fit."""
        weights = SharedWeights([member.planned.plan.steps for member in members])
        held_nbytes = self._held_nbytes(members)
        if len(members) == 1:
            return fit_memory(weights, held_nbytes, self.settings)
        memory = within_limit(Needs.of(weights), held_nbytes, self.settings)
        slower = memory and speed(memory, len(members)) < speed(before, len(members) - 1)
        return None if slower else memory

    def _held_nbytes(self, members: Sequence[Member]) -> int:
        of_hub = max(self.base.folder.held_nbytes, self.destinations.held_nbytes)
        of_base = len(self.base.tensors) * STORED_TENSOR_NBYTES + of_hub
        of_jobs = self._n_jobs * JOB_NBYTES + sum(member.held_nbytes for member in members)
        largest = [max(shard.nbytes for shard in member.planned.plan.shards) for member in members]
        of_writing = self.kind.held_nbytes(largest, self.base.folder)
        return of_base + of_jobs + of_writing + self.finished.nbytes

    def _disk_error(self, members: Sequence[Member]) -> StorageError | None:
        planned = [member.planned for member in members]
        beside = streamed_nbytes(self.base) if self.stream else 0
        return disk_error(planned, self.root, self.common_files.share, self.finished, beside)

    def done(self, made: JobInProgress, receipt: Receipt) -> None:
        """The result has its name."""
        self.common_files.offer(made)
        publication = made.job.publication
        upload = publication.upload if publication else None
        self._state(made.job.name, "done", receipt=receipt, url=upload.url if upload else None)

    def failed(self, job: PlannedJob, error: Exception) -> None:
        """An error that is the job's own."""
        self._failed(job.name, job.out_dir, error)

    def _failed(self, name: str, where: str, error: Exception) -> None:
        if isinstance(error, OSError):
            error = StorageError(f"{shown(error.filename or where)}: {error.strerror or shown(error)}.")
        self._state(name, "failed", as_own(error))

    def _state(
        self,
        name: str,
        state: str,
        error: LorafuseError | None = None,
        receipt: Receipt | None = None,
        url: str | None = None,
    ) -> None:
        folder = self.root.sub_folder(name)
        out_dir = folder.local_path or str(folder)
        self.states[name] = JobState(name, state, out_dir, error)
        said: JobEvent = {"event": "job", "job": name, "state": state, "out_dir": fspath(out_dir)}
        if receipt:
            said["wall_s"] = receipt["timing"]["wall_s"]
            said["nbytes"] = sum(output["size"] for output in receipt["outputs"])
            said["update"] = kept_in_sum(receipt["tensors"], receipt["settings"])
            said |= {"url": url} if url else {}
            self._nbytes += said["nbytes"]
        if error:
            said["error"], said["exit_code"] = str(error), error.exit_code
        self.on_event(said)
