"""The jobs of a batch, done by the workers of an engine: each task is a batch of a few jobs, as a rule one
pass."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lorafuse.batching.jobs import Job, JobState
from lorafuse.batching.pass_size import MAX_MEMBERS
from lorafuse.batching.spread import (
    Call,
    ChosenEngine,
    for_workers,
    task_of,
    unseen,
    workers_event,
)
from lorafuse.engines.engines import engine_named
from lorafuse.errors import shown
from lorafuse.events import Event, OnEvent, warned_once
from lorafuse.files.seen import is_result_seen, refuse_unshared, seen_here
from lorafuse.settings import Settings


def spread_jobs(
    jobs: Sequence[Job],
    settings: Settings,
    chosen: ChosenEngine,
    sees: Iterable[str],
    call: Callable[[Sequence[Job], Settings], Call],
    on_event: OnEvent,
) -> list[JobState]:
    """Have the jobs done, so that all workers have some. `call` gives what a worker does for some of them.
    `sees`: what a worker must see beside its adapters. Returns a state for each. Raises what a worker raises
    when none of its jobs can go on, StorageError where what it made is not seen here."""
    sees = [*sees]
    refuse_unshared([*sees, *(job.adapter for job in jobs)])
    began, heard, states = time.perf_counter(), Heard(warned_once(on_event)), dict[str, JobState]()
    with engine_named(chosen.name, chosen.address, heard) as engine:
        settings = for_workers(settings, engine.cores(settings.n_workers))
        size = min(MAX_MEMBERS, -(-len(jobs) // engine.slots(settings.n_workers)))
        for first in range(0, len(jobs), size):
            some = jobs[first : first + size]
            name = f"jobs {first} to {first + len(some) - 1}"
            paths = seen_here([*sees, *(job.adapter for job in some)])
            engine.submit(task_of(name, call(some, settings), settings, paths))
        for _, made in engine.results():
            for state in made:
                if state.state == "done" and not is_result_seen(state.out_dir):
                    raise unseen(shown(state.out_dir))
                states[state.name] = state
        on_event(workers_event(engine))
    for name in heard.done:  # by a worker that ended later, so that another found the result there
        states[name].state = "done"
    counted = dict(Counter(state.state for state in states.values()))
    wall_s = time.perf_counter() - began
    on_event({"event": "total", "states": counted, "nbytes": heard.nbytes, "wall_s": wall_s})
    return [states[job.name] for job in jobs]


@dataclass
class Heard:
    """What workers say of jobs. A task that begins again says of its jobs what it said before, or finds them
    done: nothing is passed on twice, and nothing of a job that is done."""

    on_event: OnEvent
    nbytes: int = 0
    done: set[str] = field(default_factory=set)
    _said: set[tuple[str, str]] = field(default_factory=set)

    def __call__(self, event: Event) -> None:
        if event["event"] == "job":
            said = (event["job"], event["state"])
            if event["job"] in self.done or said in self._said:
                return
            self._said.add(said)
            if event["state"] == "done":
                self.done.add(event["job"])
                self.nbytes += event["nbytes"]
        self.on_event(event)
