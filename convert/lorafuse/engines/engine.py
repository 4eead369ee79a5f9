"""The interface of engines, and what every engine is given and gives back."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from lorafuse.events import OnEvent


@dataclass(frozen=True)
class Task:
    """A call that another process makes, with a sink for its events; what it returns comes back. `call` must
    be what pickle can name: functions of modules, and their arguments. It needs so many cores, so much memory
    in bytes, and perhaps a GPU. Relative paths start at `folder`; the machine must have the paths in `sees`.
    """

    name: str
    call: Callable[[OnEvent], Any]
    n_cpus: int
    memory_nbytes: int
    on_gpu: bool
    folder: str
    sees: tuple[str, ...] = ()


@dataclass
class Worker:
    """What a machine did of it."""

    host: str
    n_tasks: int = 0
    nbytes: int = 0  # that were written
    busy_s: float = 0.0


@dataclass
class Tally:
    """Who did what, for the table at the end. `n_again`: tasks that were begun again, since the process that
    was at work on them had ended."""

    workers: dict[str, Worker] = field(default_factory=dict)
    n_again: int = 0

    def add(self, host: str, nbytes: int, busy_s: float) -> None:
        """A task is done."""
        worker = self.workers.setdefault(host, Worker(host))
        worker.n_tasks, worker.nbytes = worker.n_tasks + 1, worker.nbytes + nbytes
        worker.busy_s += busy_s


class Engine(Protocol):
    """A context in which tasks run in other processes. When a process ends before its task has, the engine
    gives the task to another one; what the first finished is resumed there."""

    tally: Tally

    def __enter__(self) -> Self:
        """Raises UsageError for an engine that is not installed or of another version than the workers,
        StorageError for one that cannot be reached."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """What has not ended is stopped."""

    def cores(self, wanted: int) -> int:
        """How many of so many cores one machine has."""

    def slots(self, n_cpus: int) -> int:
        """How many tasks that need so many cores may run at once; at least 1."""

    def submit(self, task: Task) -> None:
        """Raises UsageError for a task that no machine has room for. Waits where many are under way."""

    def results(self) -> Iterator[tuple[Task, Any]]:
        """What the tasks return, in the order in which they end; meanwhile their events are passed on. Raises
        what a task raised, StorageError when its processes ended again and again."""


def this_host() -> str:
    """The name of this machine."""
    return socket.gethostname()
