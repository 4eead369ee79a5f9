"""batch(): many adapters, each into a result of its own, with few passes over the base.

Jobs are planned as they come, until the next one would not fit into the pass: into the memory limit, the
number of files that may be open, the disk. Then the pass runs, its adapters are closed, and the next one is
put together. So nothing but a line for each job grows with their number.
"""

import os
import resource
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
from lorafuse.errors import LorafuseError, OutDirError, StorageError, UsageError, listed, shown
from lorafuse.events import OnEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
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

# A pass of 32 spends 3% of its time on what its jobs share: a larger one would gain little, and no result is
# complete before its end.
MAX_MEMBERS = 32
JOB_NBYTES = 1500  # a job, its state and its error
# A weight's step, patch, adapter tensors and measures; 1,650 were measured with LoRA on 560 of 723.
STEP_NBYTES = 3000
MEMBER_FILES = (
    5  # open at once beside its adapter: two shards, a lock, a journal, and one that is synced or copied
)
SPARE_FILES = 16  # for hashing, sidecars, directories that are synced


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
    share: str = "auto",
    index: int | None = None,
    of: int | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = lambda event: None,
    **training: Any,
) -> list[JobState]:
    """Merge many adapters into one checkpoint, each result in `out_root`/NAME, byte for byte what `convert`
    makes of it.

    `jobs` is a directory whose sub-directories are adapters, or a JSONL file of {"adapter", "name", "scale"?,
    "dtype"?}; `index` and `of` choose a share of them (default: that of a Slurm array task or a Kubernetes
    Indexed Job, else all). A result that is there already and was made from the same inputs with the same
    settings is skipped. `share` says how files that no adapter changes are shared between results: "reflink",
    "hardlink", "copy", or "auto", the first of these that works. The other options are those of `convert`.

    Returns a state for each job: one that fails does not cost the others. `on_event` gets a dict for each
    "event": those of `convert` with a "job" more, "pass" and "job". Raises a LorafuseError or an OSError when
    no job can go on: for options and lists that are wrong, a bad checkpoint, a full disk. What is finished by
    then stays, and the same call goes on with the rest.
    """
    given: dict[str, Any] = {
        "max_shard_nbytes": parse_nbytes(max_shard_size),
        "memory_nbytes": parse_nbytes(memory_limit),
    }
    given |= {"adapter_scale": adapter_scale, "allow_nonfinite": allow_nonfinite}
    settings = Settings(dtype=dtype, device=device, base_quant=chosen_base_quant(**training), **given)
    if share not in SHARE_CHOICES:
        raise UsageError(f"share is {shown(share)}; expected one of {', '.join(SHARE_CHOICES)}.")
    number, n_workers = checked_share(index, of, os.environ)
    everything, root = read_jobs(Path(jobs)), Path(out_root)
    todo = share_of(everything, number, n_workers)
    target = pick_device(device)
    ckpt_folder = checkpoint_folder(fspath(ckpt))
    refuse_overlap(everything, root, ckpt_folder)
    with closing(Checkpoint(ckpt_folder)) as base, InputHashes(base, fspath(ckpt), []) as hashes:
        finished = ExistingResults(root, settings, hashes.result)
        call = Batch(base, root, settings, overwrite, share, finished, on_event, deque(todo), dry_run)
        one_pass = Pass(
            base, hashes.result, finished, share, overwrite, restart, target, on_event, call.done, call.failed
        )
        call.run(None if dry_run else one_pass.run)
    return [call.states[job.name] for job in todo]


@dataclass
class Batch:
    """A batch under way: what is to do, and what became of what is done."""

    base: Checkpoint
    root: Path
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
        self.kind = kind_of(fspath(self.root))
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
                            self._disk_error([*members, member]),
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
        settings, out_dir = job.settings(self.settings), self.root / job.name
        self.kind.check_out_dir(fspath(out_dir), [self.base.folder, located.root], overwrite=True)
        with ExitStack() as stack:
            [lora] = stack.enter_context(opened([located]))
            files = UnchangedInputs(self.base, [lora])
            inputs = adapter_hashes(lora, files.hashed)
            if self._is_there(out_dir, settings, inputs):
                if not self.dry_run:
                    self.kind.clean_up(fspath(out_dir))
                self._state(job, "skipped")
                return None
            plan = make_plan(self.base, lora.adapter, settings, weights=self.weights)
            files.refuse_nonfinite()
            attempt, nbytes = (
                files.attempt(plan, settings, pick_device(settings.device).type),
                lora.adapter.nbytes,
            )
            return PlannedJob(
                job,
                settings,
                located,
                fspath(out_dir),
                plan,
                inputs,
                files,
                attempt,
                nbytes,
                stack.pop_all().close,
            )

    def _is_there(self, out_dir: Path, settings: Settings, inputs: Inputs) -> bool:
        try:
            return self.finished.holds(out_dir, settings, inputs)
        except OutDirError:
            if not self.overwrite:
                raise
            return False

    def _may_open(self, adapter: Folder, members: Sequence[PlannedJob]) -> bool:
        """Whether one more adapter may be opened beside these: by its files, and what is loaded of it."""
        sizes = {name: adapter.facts(name).nbytes for name in adapter.names("*") if adapter.exists(name)}
        n_files = sum(name.endswith(".safetensors") for name in sizes)
        loaded = 0 if n_files else sizes.get(BIN, 0)
        enough_files = n_files + (len(members) + 1) * MEMBER_FILES + SPARE_FILES <= _files_left()
        return (
            enough_files
            and self._held_nbytes(members) + loaded + RUNTIME_NBYTES <= self.settings.memory_nbytes
        )

    def _memory(self, members: Sequence[PlannedJob], before: Memory) -> Memory | None:
        """How the limit is spent on a pass of these; `before`, on all but the last. None when they do not fit
        together, or would be slower. Raises UsageError when a single one does not fit."""
        planned, held_nbytes = (
            shared_weights([member.plan.steps for member in members]),
            self._held_nbytes(members),
        )
        if len(members) == 1:
            return fit_memory(planned, held_nbytes, self.settings)
        memory = within_limit(planned, held_nbytes, self.settings)
        slower = memory and _speed(memory, len(members)) < _speed(before, len(members) - 1)
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

    def _disk_error(self, members: Sequence[PlannedJob]) -> StorageError | None:
        """What is wrong when there is no room for what these write."""
        wanted: dict[str, int] = {}
        for member in members:
            for shard in member.plan.shards:
                key = member.keys.get(shard.file)
                one = key if key and self.share != "copy" else f"{member.job.name}/{shard.file}"
                wanted[one] = 0 if key == one and self.finished.find(one) else shard.nbytes
        space, needed = self.kind.space_of(fspath(self.root)), sum(wanted.values())
        free = space.free_nbytes if space else None
        if free is not None and needed > free:  # not before: it lists OUT_ROOT for each member
            free += self.kind.left_nbytes(member.out_dir for member in members)
        if free is None or needed <= free:
            return None
        names = listed(member.job.name for member in members)
        return StorageError(
            f"{shown(self.root)}: {needed / 1e6:,.0f} MB are needed for {names}, {free / 1e6:,.0f} MB are "
            "free."
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
        one = JobState(job.name, state, self.root / job.name, error)
        self.states[job.name] = one
        why = {"error": str(error), "exit_code": error.exit_code} if error else {}
        self.on_event(
            {"event": "job", "job": job.name, "state": state, "out_dir": fspath(one.out_dir), **why, **facts}
        )


def _speed(memory: Memory, n_members: int) -> float:
    """Of a pass, in jobs: decoding costs about as much as what is done to a tile for one result."""
    return memory.n_workers * n_members / (n_members + 1)


def _files_left() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (limit if limit != resource.RLIM_INFINITY else 1 << 30) - len(os.listdir("/proc/self/fd"))
