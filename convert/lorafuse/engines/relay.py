"""Events of many processes as those of one run: how far all of them are together."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lorafuse.engines.engine import this_host
from lorafuse.errors import shown
from lorafuse.events import Event, OnEvent

EVERY_S = 0.3  # a worker tells how far it is

Told = tuple[str, dict[str, Any]]  # the name of a task, and an event or what a worker says of itself


class Teller:
    """In a worker: the sink of a task's events, which go to `send` in lists; progress is summed up before."""

    def __init__(self, task: str, send: Callable[[list[Told]], None]) -> None:
        self._task, self._send = task, send
        self._progress: dict[str | None, int] = {}  # by job
        self._told_at = time.monotonic()
        self._send([(task, {"event": "begun", "host": this_host()})])

    def __call__(self, event: Event) -> None:
        if event["event"] == "progress":
            job = event.get("job")
            self._progress[job] = self._progress.get(job, 0) + event["nbytes"]
            if time.monotonic() - self._told_at < EVERY_S:
                return
            self.flush()
        else:
            self.flush([(self._task, {**event})])

    def flush(self, then: Iterable[Told] = ()) -> None:
        """Send what is summed up, and then these."""
        summed = [
            (self._task, {"event": "progress", "nbytes": nbytes, **({"job": job} if job else {})})
            for job, nbytes in self._progress.items()
        ]
        self._progress, self._told_at = {}, time.monotonic()
        if told := [*summed, *then]:
            self._send(told)


@dataclass
class Relay:
    """In the process that the user called: passes on what workers tell. The plan of a single result was said
    there. What a worker resumes is progress like any other; what one that ended had written does not count
    any more."""

    on_event: OnEvent
    _hosts: dict[str, list[str]] = field(default_factory=dict)  # of tasks: who began them, in this order
    _nbytes: dict[str, int] = field(default_factory=dict)  # of tasks, as far as they are
    _passes: dict[str, int] = field(default_factory=dict)  # what tasks said that they are going to write

    @property
    def n_again(self) -> int:
        """Tasks that were begun again, each as often as it was."""
        return sum(len(hosts) - 1 for hosts in self._hosts.values())

    @property
    def n_begun(self) -> int:
        """Tasks that were begun."""
        return len(self._hosts)

    def nbytes_of(self, task: str) -> int:
        """What a task has written so far, or resumed."""
        return self._nbytes.get(task, 0)

    def pass_on(self, told: Iterable[Told]) -> None:
        """What workers tell, in the order in which they did."""
        for task, event in told:
            self._one(task, event)

    def _one(self, task: str, event: Any) -> None:
        kind = event["event"]
        if kind == "begun":
            self._begun(task, event["host"])
            # A pass says anew what is left to write: the earlier one counts as over.
            if over := self._passes.pop(task, 0) - self._nbytes.get(task, 0):
                self.on_event({"event": "progress", "nbytes": over})
            self._nbytes[task] = 0
        elif kind in ("progress", "resumed"):
            self._nbytes[task] = self._nbytes.get(task, 0) + event["nbytes"]
            self.on_event({"event": "progress", "nbytes": event["nbytes"]})
        elif kind == "pass":
            self._passes[task] = self._passes.get(task, 0) + event["nbytes"]
            self.on_event(event)
        elif kind in ("shard", "job", "warning") or (kind == "plan" and "job" in event):
            self.on_event(event)

    def _begun(self, task: str, host: str) -> None:
        hosts = self._hosts.setdefault(task, [])
        hosts.append(host)
        if len(hosts) > 1:
            message = (
                f"{shown(task)} begins again on {shown(host)} (try {len(hosts)}): its process on "
                f"{shown(hosts[-2])} ended. What that finished is kept."
            )
            self.on_event({"event": "warning", "message": message})
