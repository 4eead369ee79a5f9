"""batch(): many adapters, each into a result of its own, with few passes over the base.

Jobs are planned as they come, until the next one would not fit into the pass: into the memory limit, the
number of files that may be open, the disk. Then the pass runs, its adapters are closed, and the next one is
put together. So nothing but a line for each job grows with their number.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from os import fspath
from pathlib import Path
from typing import Any

from lorafuse.adapters.reading.directory import BIN
from lorafuse.arithmetic.arena import pick_device
from lorafuse.batching.existing_results import ExistingResults, Inputs
from lorafuse.batching.jobs import Job, JobState, checked_share, read_jobs, refuse_overlap, share_of
from lorafuse.batching.one_pass import Pass, PlannedJob
from lorafuse.batching.pass_size import (
    JOB_NBYTES,
    MAX_MEMBERS,
    MEMBER_FILES,
    SPARE_FILES,
    STEP_NBYTES,
    disk_error,
    files_left,
    speed,
)
from lorafuse.errors import LorafuseError, OutDirError, StorageError, UsageError, shown
from lorafuse.events import OnEvent, ignore
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.folders import open_folder
from lorafuse.files.sharing import SHARE_CHOICES
from lorafuse.inputs.hashes import InputHashes, adapter_hashes
from lorafuse.inputs.located import LocatedAdapter, Name, checkpoint_folder, located_adapter, opened
from lorafuse.inputs.unchanged import UnchangedInputs
from lorafuse.outdir.kinds import kind_of
from lorafuse.pipeline import announce
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.memory import RUNTIME_NBYTES, fit_memory, within_limit
from lorafuse.planning.plan import STORED_TENSOR_NBYTES, Memory
from lorafuse.planning.shared_weights import shared_weights
from lorafuse.settings import Settings, parse_nbytes
from lorafuse.trained_base.base_weights import base_weights
from lorafuse.trained_base.options import chosen_base_quant


def batch(
    ckpt: Name,
    jobs: Name,
    out_root: Name,
    *,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    memory_limit: str | int = "100MB",
    adapter_scale: float = 1.0,
    base_quant: str = "none",
    double_quant: bool = True,
    quant_blocksize: int = 64,
    quant_skip: Sequence[str] = (),
    quant_experts: bool = False,
    base_quant_from: Name | None = None,
    share: str = "auto",
    index: int | None = None,
    of: int | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> list[JobState]:
    """Merge many adapters into one checkpoint, each result in `out_root`/NAME, byte for byte what `convert`
    makes.

    `jobs` is a directory whose sub-directories are adapters, or a JSONL file of {"adapter", "name", "scale"?,
    "dtype"?}; `index` and `of` choose a share of them (default: that of a Slurm array task or a Kubernetes
    Indexed Job, else all). A result that is there already and was made from the same inputs with the same
    settings is skipped. `share` says how files that no adapter changes are shared between results: "reflink",
    "hardlink", "copy", or "auto", the first of these that works. The other options are those of `convert`.

    Returns a state for each job; a failed job does not cost the others. `on_event` gets the events of
    `convert` with a "job" more, "pass" and "job". Raises a LorafuseError or an OSError when no job can go on:
    wrong options or lists, a bad checkpoint, a full disk. What is finished by then stays; the same call goes
    on with the rest.
    """
    settings = Settings(
        dtype=dtype, device=device, adapter_scale=adapter_scale, allow_nonfinite=allow_nonfinite,
        max_shard_nbytes=parse_nbytes(max_shard_size), memory_nbytes=parse_nbytes(memory_limit),
        base_quant=chosen_base_quant(base_quant=base_quant, double_quant=double_quant, quant_skip=quant_skip,
            quant_blocksize=quant_blocksize, quant_experts=quant_experts, base_quant_from=base_quant_from),
    )  # fmt: skip
    chosen = Chosen(share, index, of, overwrite, restart, dry_run)
    kind_of(fspath(out_root))  # before it is looked at as a folder: the scheme must be known
    return _batch(fspath(ckpt), Path(jobs), open_folder(fspath(out_root)), settings, chosen, on_event)


@dataclass(frozen=True)
class Chosen:
    """What the caller chose beside the settings of a merge."""

    share: str
    index: int | None
    of: int | None
    overwrite: bool
    restart: bool
    dry_run: bool


def _batch(
    ckpt: str, jobs: Path, root: Folder, settings: Settings, chosen: Chosen, on_event: OnEvent
) -> list[JobState]:
    """The same with checked settings."""
    share, overwrite, dry_run = chosen.share, chosen.overwrite, chosen.dry_run
    if share not in SHARE_CHOICES:
        raise UsageError(f"share is {shown(share)}; expected one of {', '.join(SHARE_CHOICES)}.")
    number, n_workers = checked_share(chosen.index, chosen.of, os.environ)
    everything = read_jobs(jobs)
    todo = share_of(everything, number, n_workers)
    target = pick_device(settings.device)
    ckpt_folder = checkpoint_folder(ckpt)
    refuse_overlap(everything, root, ckpt_folder)
    with closing(Checkpoint(ckpt_folder)) as base, InputHashes(base, ckpt, []) as hashes:
        finished = ExistingResults(root, settings, hashes.result)
        call = Batch(base, root, settings, overwrite, share, finished, on_event, deque(todo), dry_run)
        one_pass = Pass(
            base, hashes.result, finished, share, overwrite, chosen.restart, target, on_event,
            call.done, call.failed,
        )  # fmt: skip
        call.run(None if dry_run else one_pass.run)
    return [call.states[job.name] for job in todo]


@dataclass
class Batch:
    """A batch under way: what is to do, and what became of what is done."""

    base: Checkpoint
    root: Folder
    settings: Settings
    overwrite: bool
    share: str
    finished: ExistingResults
    on_event: OnEvent
    todo: deque[Job]
    dry_run: bool
    states: dict[str, JobState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = base_weights(self.base, self.settings.base_quant, self._warn)
        self.kind = kind_of(str(self.root))
        self._n_jobs = len(self.todo)

    def _warn(self, message: str) -> None:
        self.on_event({"event": "warning", "message": message})

    def run(self, run_pass: Callable[[Sequence[PlannedJob], Memory], list[Job]] | None) -> None:
        """Pass after pass, until nothing is to do; without `run_pass`, plan only."""
        while self.todo:
            with self._members() as (members, memory):
                jobs = [member.job for member in members]
                if members:
                    self.on_event(
                        {"event": "pass", "jobs": [job.name for job in jobs], "n_workers": memory.n_workers}
                    )
                if members and run_pass:
                    self.todo.extendleft(reversed(run_pass(members, memory)))
                elif members:
                    for job in jobs:
                        self._state(job, "planned")

    @contextmanager
    def _members(self) -> Iterator[tuple[list[PlannedJob], Memory]]:
        """The next jobs that go into one pass, and how its memory is spent; none when no job that is left can
        be planned."""
        members: list[PlannedJob] = []
        memory = Memory(0, 0, 0, 0, 0)
        with ExitStack() as stack:
            while self.todo and len(members) < MAX_MEMBERS:
                job, notes, full = self.todo[0], list[dict[str, Any]](), None
                try:
                    located = located_adapter(
                        job.adapter, job.settings(self.settings).adapter_scale, None, notes.append
                    )
                    if members and not self._may_open(located.folder, members):
                        break
                    member = self._planned(job, located)
                    if member:
                        stack.callback(member.close)
                        more, full = (
                            self._memory([*members, member], memory),
                            disk_error([*members, member], self.root, self.share, self.finished),
                        )
                        if more is None or (full and members):
                            break
                        for note in notes:
                            self._events_of(job)(note)
                        announce(member.plan, self._events_of(job), dry_run=self.dry_run)
                        members, memory = [*members, member], more
                except (LorafuseError, OSError) as e:
                    self.failed(job, e)
                if full:
                    raise full
                self.todo.popleft()
            yield members, memory

    def _planned(self, job: Job, located: LocatedAdapter) -> PlannedJob | None:
        """The job with its plan and an open adapter; None when its result is there already. Raises
        LorafuseError or OSError."""
        settings, out_dir = job.settings(self.settings), str(self.root.sub_folder(job.name))
        self.kind.check_out_dir(out_dir, [self.base.folder, located.root], overwrite=True)
        with ExitStack() as stack:
            [lora] = stack.enter_context(opened([located]))
            files = UnchangedInputs(self.base, [lora])
            inputs = adapter_hashes(lora, files.hashed)
            if self._is_there(job.name, settings, inputs):
                if not self.dry_run:
                    self.kind.clean_up(out_dir)
                self._state(job, "skipped")
                return None
            plan = make_plan(self.base, lora.adapter, settings, weights=self.weights)
            files.refuse_nonfinite()
            attempt = files.attempt(plan, settings, pick_device(settings.device).type)
            nbytes, close = lora.adapter.nbytes, stack.pop_all().close
            return PlannedJob(job, settings, located, out_dir, plan, inputs, files, attempt, nbytes, close)

    def _is_there(self, name: str, settings: Settings, inputs: Inputs) -> bool:
        try:
            return self.finished.holds(name, settings, inputs)
        except OutDirError:
            if self.overwrite:
                return False
            if self.dry_run:
                raise
        self.kind.clean_up(str(self.root.sub_folder(name)))  # it may be a part that a run was cut off at
        return self.finished.holds(name, settings, inputs)

    def _may_open(self, adapter: Folder, members: Sequence[PlannedJob]) -> bool:
        """Whether one more adapter may be opened beside these: by its files, and what is loaded of it."""
        sizes = {name: adapter.facts(name).nbytes for name in adapter.names("*") if adapter.exists(name)}
        n_files = sum(name.endswith(".safetensors") for name in sizes)
        loaded = 0 if n_files else sizes.get(BIN, 0)
        enough_files = n_files + (len(members) + 1) * MEMBER_FILES + SPARE_FILES <= files_left()
        return (
            enough_files
            and self._held_nbytes(members) + loaded + RUNTIME_NBYTES <= self.settings.memory_nbytes
        )

    def _memory(self, members: Sequence[PlannedJob], before: Memory) -> Memory | None:
        """How the limit is spent on a pass of these; `before`, on all but the last. None when they do not fit
        together, or would be slower. Raises UsageError when a single one does not fit."""
        planned = shared_weights([member.plan.steps for member in members])
        held_nbytes = self._held_nbytes(members)
        if len(members) == 1:
            return fit_memory(planned, held_nbytes, self.settings)
        memory = within_limit(planned, held_nbytes, self.settings)
        slower = memory and speed(memory, len(members)) < speed(before, len(members) - 1)
        return None if slower else memory

    def _held_nbytes(self, members: Sequence[PlannedJob]) -> int:
        own = sum(
            member.adapter_nbytes + sum(1 for _ in member.plan.steps) * STEP_NBYTES for member in members
        )
        return (
            len(self.base.tensors) * STORED_TENSOR_NBYTES
            + self._n_jobs * JOB_NBYTES
            + self.finished.nbytes
            + own
        )

    def _events_of(self, job: Job) -> OnEvent:
        return lambda event: self.on_event(event | {"job": job.name})

    def failed(self, job: Job, error: LorafuseError | OSError) -> None:
        """An error that is the job's own."""
        if isinstance(error, OSError):
            error = StorageError(f"{shown(error.filename or job.adapter)}: {error.strerror or shown(error)}.")
        self._state(job, "failed", error)

    def done(self, job: Job, receipt: dict[str, Any]) -> None:
        """The result has its name."""
        self._state(
            job,
            "done",
            wall_s=receipt["timing"]["wall_s"],
            nbytes=sum(one["size"] for one in receipt["outputs"]),
        )

    def _state(self, job: Job, state: str, error: LorafuseError | None = None, **facts: Any) -> None:
        out_dir = self.root.sub_folder(job.name)
        one = JobState(job.name, state, out_dir.local_path or str(out_dir), error)
        self.states[job.name] = one
        facts |= {"error": str(error), "exit_code": error.exit_code} if error else {}
        name = fspath(one.out_dir)
        self.on_event({"event": "job", "job": job.name, "state": state, "out_dir": name, **facts})
