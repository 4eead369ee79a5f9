"""The files of one result, made by the workers of an engine: the process that the user called plans once, and
commits once."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lorafuse.arithmetic.devices import device_kind
from lorafuse.batching.division import Division
from lorafuse.batching.one_pass import PlannedJob
from lorafuse.engines.engine import Engine, Task
from lorafuse.engines.engines import ENGINES, engine_named
from lorafuse.errors import StorageError, UsageError, listed, shown
from lorafuse.events import Event, OnEvent, WorkersEvent
from lorafuse.files.seen import refuse_unshared, seen_here, there_around
from lorafuse.outdir.kinds import kind_of, shared_kind_of
from lorafuse.planning.parts import divided
from lorafuse.settings import Settings

# Each part is planned by its worker. The number depends on the plan alone, so that another cluster goes on.
MAX_PARTS = 128

Call = Callable[[OnEvent], Any]


@dataclass(frozen=True)
class ChosenEngine:
    """An engine by name, and the address of its cluster, if it has one."""

    name: str
    address: str | None


def checked_engine(name: str, address: str | None, beside: Mapping[str, bool]) -> ChosenEngine | None:
    """The engine that is asked for; None for this process. `beside`: options that do not go with an engine,
    and whether they are given. Raises UsageError."""
    if name == "local":
        if address is not None:
            raise UsageError("--address is that of a cluster: it goes with --engine ray.")
        return None
    if name not in ENGINES:
        raise UsageError(f"--engine is {shown(name)}; expected one of local, {', '.join(ENGINES)}.")
    if too_much := [f"--{option}" for option, given in beside.items() if given]:
        raise UsageError(f"{listed(too_much)}: not with --engine {name}, which divides the work itself.")
    return ChosenEngine(name, address)


def spread(
    job: PlannedJob,
    chosen: ChosenEngine,
    call: Callable[[str, Division, Settings], Call],
    *,
    inputs: Iterable[str],
    restart: bool,
) -> PlannedJob:
    """Have all files of a job made, but those that an earlier run has taken while it committed. `call` gives
    what a worker does for a part; `inputs` are the names of what it reads. Returns the job that commits them.
    Raises what a worker raises, StorageError where what they make is not seen here."""
    inputs = [*inputs]
    refuse_unshared([*inputs, job.out_dir])
    sees = seen_here([*inputs, there_around(job.out_dir)])
    if restart:  # here, since a worker that is begun again goes on
        with kind_of(job.out_dir).open_out_dir(job.out_dir, job.plan.plan_id, job.attempt, restart=True):
            pass
    of = min(len(job.plan.shards), MAX_PARTS)
    taken = shared_kind_of(job.out_dir).files_of_whole(job.out_dir, job.attempt)
    parts = [
        index
        for index, files in enumerate(divided(job.plan.shards, of))
        if {shard.file for shard in files} - taken
    ]
    with engine_named(chosen.name, chosen.address, job.on_event) as engine:
        settings = for_workers(job.settings, engine.cores(job.plan.memory.n_workers))
        for index in parts:
            made = call(job.plan.plan_id, Division(index, of), settings)
            engine.submit(task_of(f"part {index} of {of}", made, settings, sees))
        for task, _ in engine.results():
            if not shared_kind_of(job.out_dir).has_parts(job.out_dir):
                raise unseen(f"{task.name} of {shown(job.out_dir)}")
        job.on_event(workers_event(engine))
    return replace(job, on_event=partial(_but_resumed, job.on_event))


def _but_resumed(on_event: OnEvent, event: Event) -> None:
    """That all files are there already is no news where workers have just made them."""
    if event["event"] != "resumed":
        on_event(event)


def for_workers(settings: Settings, n_cpus: int) -> Settings:
    """The settings of all workers, whatever their machines have: so many cores, and one kind of device; the
    CPU, unless a plan has chosen or a user says so."""
    kind = "cpu" if settings.device == "auto" else device_kind(settings.device)
    return replace(settings, n_threads=n_cpus, device=kind)


def task_of(name: str, call: Call, settings: Settings, sees: tuple[str, ...]) -> Task:
    """A call with these settings as a task, for machines that see these paths."""
    on_gpu = device_kind(settings.device) != "cpu"
    return Task(name, call, settings.n_workers, settings.memory_nbytes, on_gpu, os.getcwd(), sees)


def unseen(what: str) -> StorageError:
    """What a worker says that it made is not on this machine's file system."""
    return StorageError(
        f"{what}: a worker has made it, and this machine does not see it. All machines need the same file "
        "system, with the inputs and OUT_DIR on it."
    )


def workers_event(engine: Engine) -> WorkersEvent:
    """What each machine did."""
    tally = engine.tally
    return {
        "event": "workers",
        "workers": [
            {"host": worker.host, "n_tasks": worker.n_tasks, "nbytes": worker.nbytes, "busy_s": worker.busy_s}
            for _, worker in sorted(tally.workers.items())
        ],
        "n_again": tally.n_again,
    }
