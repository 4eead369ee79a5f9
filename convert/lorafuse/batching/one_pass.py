"""What one pass over the base does: several adapters' plans, each tile decoded once for all of them, and each
result committed.

How a pass is put together, and how many there are, is `batching.py`'s; where it runs, whoever called that.
"""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lorafuse.batching.existing_results import ExistingResults, Inputs, shard_key
from lorafuse.batching.jobs import Job
from lorafuse.errors import LorafuseError
from lorafuse.events import OnEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.inputs.located import LocatedAdapter
from lorafuse.inputs.unchanged import UnchangedInputs
from lorafuse.merge.destination import Written
from lorafuse.merge.loop import merge
from lorafuse.outdir.free_space import told_when_full
from lorafuse.outdir.journal import Attempt
from lorafuse.outdir.kinds import kind_of
from lorafuse.outdir.out_dir import OutDir
from lorafuse.outdir.output import Output, output_of
from lorafuse.outdir.sidecars import copied_files
from lorafuse.pipeline import complete
from lorafuse.planning.plan import Memory, Plan, PlannedShard
from lorafuse.settings import Settings

# A tokenizer that cannot be read is its adapter's fault; other errors of the file system are those of
# OUT_ROOT.
UNREADABLE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP}


@dataclass
class PlannedJob:
    """A job that is planned: its adapter is open until `close`. `keys`: the files that other results may need
    too, with what `shard_key` says of them."""

    job: Job
    settings: Settings
    located: LocatedAdapter
    out_dir: str
    plan: Plan
    inputs: Inputs  # of the adapter alone
    files: UnchangedInputs
    attempt: Attempt
    adapter_nbytes: int  # what the adapter holds in memory
    close: Callable[[], None]
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = ((shard.file, shard_key(shard)) for shard in self.plan.shards)
        self.keys = {file: key for file, key in found if key}


@dataclass
class JobInProgress:
    """A member in its staging directory. `main` makes what is its own alone, `commons` what it makes for
    others as well."""

    member: PlannedJob
    result: OutDir
    main: Output
    commons: Output | None = None
    waits: set[str] = field(default_factory=set)  # files that another one makes

    def has(self, written: Written, file: str) -> None:
        """A file that came from elsewhere."""
        self.main.outcome.written.append(Written(file, written.nbytes, written.sha256))


@dataclass
class Pass:
    """The base and the call that all passes share."""

    base: Checkpoint
    ckpt_inputs: Callable[[], Inputs]
    finished: ExistingResults
    share: str
    overwrite: bool
    restart: bool
    device: torch.device
    on_event: OnEvent
    on_done: Callable[[Job, dict[str, Any]], None]
    on_failed: Callable[[Job, LorafuseError | OSError], None]

    def run(self, members: Sequence[PlannedJob], memory: Memory) -> list[Job]:
        """Make the results of all members. An error of one member alone is reported, any other one raised;
        what was committed by then stays. Returns jobs that waited for a file of one that failed: there are
        fewer of them each time."""
        began = time.perf_counter()
        with self._staged(members) as makings:
            if not makings:
                return []
            self._divide(makings)
            mains = [making.main for making in makings]
            # Commons first: their files are complete before an output that waits for one is.
            outputs = [*(making.commons for making in makings if making.commons), *mains]
            with told_when_full(outputs, self._side_files(members)):
                merge(outputs, memory, self.device, allow_nonfinite=members[0].settings.allow_nonfinite)
                return [making.member.job for making in makings if not self._conclude(making, began)]

    def _side_files(self, members: Sequence[PlannedJob]) -> Iterator[tuple[Folder, str]]:
        return (
            file
            for member in members
            for file in copied_files(member.plan, self.base.folder, member.located.folders)
        )

    @contextmanager
    def _staged(self, members: Sequence[PlannedJob]) -> Iterator[list[JobInProgress]]:
        """The members that get a staging directory, be it one that a call that was cut off has begun to
        fill."""
        makings = []
        with ExitStack() as stack:
            for member in members:
                result = kind_of(member.out_dir).open_out_dir(
                    member.out_dir,
                    member.plan.plan_id,
                    member.attempt,
                    overwrite=self.overwrite,
                    restart=self.restart,
                    on_event=self._events_of(member),
                )
                try:
                    stack.enter_context(result)
                except LorafuseError as e:
                    self.on_failed(member.job, e)
                    continue
                main = output_of(member.plan, result, self._events_of(member), member.keys)
                makings.append(JobInProgress(member, result, main))
            yield makings

    def _events_of(self, member: PlannedJob) -> OnEvent:
        return lambda event: self.on_event(event | {"job": member.job.name})

    def _divide(self, makings: Sequence[JobInProgress]) -> None:
        """Of the files that several results may need: take each from a result, finished or resumed, or let
        one output make it for all."""
        for making in makings:
            for file, one in making.result.finished.items():
                if file in making.member.keys:
                    self.finished.offer(
                        making.member.keys[file], making.result.finished_file(file), one.written
                    )
        takers: dict[str, list[tuple[JobInProgress, str]]] = {}
        for making in makings:
            for file, key in making.member.keys.items():
                if file not in making.result.finished and not self._taken(making, file, key):
                    takers.setdefault(key, []).append((making, file))
        makes: dict[int, dict[str, list[tuple[JobInProgress, str]]]] = {}
        for first, *others in takers.values():
            maker, file = first
            makes.setdefault(id(maker), {})[file] = others
            for making, own_file in others:
                making.waits.add(own_file)
        for making in makings:
            if id(making) in makes:
                making.commons = self._commons(making, makes[id(making)])

    def _taken(self, making: JobInProgress, file: str, key: str) -> bool:
        shared = self.finished.find(key)
        if shared is None:
            return False
        try:
            making.result.take(file, shared.file, self.share)
        except FileNotFoundError:  # removed meanwhile
            self.finished.forget(key)
            return False
        making.has(shared.written, file)
        return True

    def _commons(self, maker: JobInProgress, makes: dict[str, list[tuple[JobInProgress, str]]]) -> Output:
        """An output of the maker's files that `makes` names, in its staging directory. It goes on if the
        maker's adapter fails."""

        def give(shard: PlannedShard, written: Written) -> None:
            maker.has(written, shard.file)
            # Of one result only: the others would be hashed again when they are resumed.
            maker.result.record(written, {})
            made = maker.result.finished_file(shard.file)
            for making, file in makes[shard.file]:
                if making.main.error is None:
                    making.result.take(file, made, self.share)
                    making.has(written, file)
                    making.waits.remove(file)

        plan = maker.member.plan
        skip = {shard.file for shard in plan.shards} - makes.keys()
        return Output(plan, maker.result, self._events_of(maker.member), skip=skip, on_shard=give)

    def _conclude(self, making: JobInProgress, began: float) -> bool:
        """Commit a finished member, or say why it is not one. False when it lacks a file through no fault of
        its own."""
        member, main, commons = making.member, making.main, making.commons
        error = main.error or (commons.error if commons else None)
        if making.waits and not error:
            return False
        try:
            if error:
                raise error
            if commons:
                main.outcome.timing.add(commons.outcome.timing)
            receipt = complete(
                main,
                self.base,
                member.located,
                member.settings,
                lambda: [*self.ckpt_inputs(), *member.inputs],
                began,
            )
            member.files.refuse_changed()
            making.result.commit()
        except (LorafuseError, OSError) as e:
            if isinstance(e, OSError) and e.errno not in UNREADABLE:
                raise
            self.on_failed(member.job, e)
            return True
        for written in main.outcome.written:
            if written.file in member.keys:
                self.finished.offer(
                    member.keys[written.file], making.result.finished_file(written.file), written
                )
        self.on_done(member.job, receipt)
        return True
