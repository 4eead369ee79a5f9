"""Ray as an engine (the extra `ray`): tasks of Ray, with the cores and the memory that each needs.

Ray decides where a task runs, and gives it to another process when the first one ends, or its machine is
lost.
"""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any, Self

from lorafuse.engines.engine import Tally, Task
from lorafuse.engines.ray_cluster import connect, imported
from lorafuse.engines.ray_worker import Ended, carry_out, versions
from lorafuse.engines.relay import Relay
from lorafuse.engines.signals import signals_wait
from lorafuse.errors import StorageError, UsageError, shown, sized
from lorafuse.events import OnEvent

RETRIES = 8  # of a task whose process ended
AHEAD = 2  # tasks that wait for each that runs
PROCESS_NBYTES = 400_000_000  # Ray's worker with torch in it, beside what --memory-limit bounds
WAIT_S = 0.2
SILENCE_S = 60.0  # after which the user is told what is waited for
GOES_ON = "The same command goes on from what is finished."


def open_engine(address: str | None, on_event: OnEvent) -> "RayEngine":
    """See `engine_named`."""
    return RayEngine(address, on_event)


class RayEngine:
    """A cluster at an address, that of a Ray job or, without any, processes of this machine."""

    def __init__(self, address: str | None, on_event: OnEvent) -> None:
        self.tally = Tally()
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._on_event, self._relay = on_event, Relay(on_event)
        self._pending: dict[Any, Task] = {}
        self._done: list[tuple[Task, Any]] = []
        self._heard_at, self._said_silent = time.monotonic(), False

    def __enter__(self) -> Self:
        self._ray = imported()
        if self._address.startswith("ray://"):
            raise UsageError(
                f"{shown(self._address)}: Ray's client is not supported; call lorafuse on a machine of the "
                "cluster, or by `ray job submit`."
            )
        self._is_own = not self._ray.is_initialized()
        try:
            if self._is_own:  # else the caller's, which stays as it is
                connect(self._ray, self._address)
            with signals_wait():
                self._prepare()
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        return self

    def _prepare(self) -> None:
        from ray.util.queue import Queue

        head = self._ray.get_runtime_context().get_node_id()
        self._queue = Queue(
            actor_options={"num_cpus": 0, "scheduling_strategy": _on_node(head), "max_restarts": 0}
        )
        self._remote = self._ray.remote(_run)
        self._versions = versions()
        self._heard_at, self._nodes = time.monotonic(), self._alive()
        if not self._nodes:
            raise UsageError(
                f"{shown(self._address)}: no machine of this Ray offers CPUs. Start it with CPUs, or workers "
                "beside it (`ray start`)."
            )

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        # After an interruption a second one ends the process at once.
        ended = kind is None or issubclass(kind, Exception)
        with signals_wait() if ended else nullcontext():
            for ref in self._pending:
                with suppress(Exception):
                    self._ray.cancel(ref, force=True)
            if self._is_own:
                self._ray.shutdown()

    def cores(self, wanted: int) -> int:
        return max(min(wanted, int(max(node["CPU"] for node in self._nodes))), 1)

    def slots(self, n_cpus: int) -> int:
        return max(sum(int(node["CPU"]) // n_cpus for node in self._nodes), 1)

    def submit(self, task: Task) -> None:
        _refuse_unfit(task, self._nodes)
        options = {
            "num_cpus": task.n_cpus, "memory": _memory_of(task), "num_gpus": int(task.on_gpu),
            "max_retries": RETRIES, "name": task.name,
        }  # fmt: skip
        with signals_wait():
            pickled = self._ray.cloudpickle.dumps(task)
            ref = self._remote.options(**options).remote(pickled, self._versions, self._queue)
            self._pending[ref] = task
        while len(self._pending) > self.slots(task.n_cpus) * (1 + AHEAD):
            self._wait()

    def results(self) -> Iterator[tuple[Task, Any]]:
        while self._pending or self._done:
            yield from self._done
            self._done = []
            if self._pending:
                self._wait()

    def _wait(self) -> None:
        """Until a task has ended, or for a moment."""
        with signals_wait():
            ready, _ = self._ray.wait([*self._pending], num_returns=1, timeout=WAIT_S)
            self._listen()
            for ref in ready:
                ended = self._ended(ref, self._pending.pop(ref))
                if ended.error:
                    raise ended.error
            if ready:
                self._heard_at, self._said_silent = time.monotonic(), False
            elif time.monotonic() - self._heard_at > SILENCE_S and not self._said_silent:
                self._said_silent = True
                self._on_event({"event": "warning", "message": self._awaited()})

    def _ended(self, ref: Any, task: Task) -> Ended:
        errors = self._ray.exceptions
        try:
            ended: Ended = self._ray.get(ref)
        except errors.RayTaskError as e:
            if "ModuleNotFoundError" in str(e) or "failed to import" in str(e):
                raise UsageError(
                    f"{shown(task.name)}: a worker cannot import what it needs; install lorafuse in the "
                    f"environment of Ray's workers, too. {_last_line(e)}"
                ) from e
            if isinstance(e.cause, errors.RayError):  # the queue is gone
                raise self._lost(e.cause) from e
            raise
        except errors.RayError as e:
            raise StorageError(
                f"{shown(task.name)}: its worker ended {RETRIES + 1} times, the last time so: "
                f"{shown(str(e).strip().splitlines()[0])} {GOES_ON}"
            ) from e
        if not ended.error:
            self.tally.add(ended.host, self._relay.nbytes_of(task.name), ended.busy_s)
            self.tally.n_again = self._relay.n_again
            self._done.append((task, ended.result))
        return ended

    def _listen(self) -> None:
        try:
            told = [each for some in self._queue.get_nowait_batch(self._queue.qsize()) for each in some]
        except self._ray.exceptions.RayError as e:
            raise self._lost(e) from e
        if told:
            self._heard_at, self._said_silent = time.monotonic(), False
        self._relay.pass_on(told)

    def _lost(self, error: Exception) -> StorageError:
        return StorageError(
            f"{shown(self._address)}: what Ray passes the workers' messages through is gone: "
            f"{shown(str(error).strip().splitlines()[0])} {GOES_ON}"
        )

    def _alive(self) -> list[dict[str, float]]:
        """What each machine offers that has CPUs."""
        offered = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [node for node in offered if node.get("CPU")]

    def _awaited(self) -> str:
        """What to say when no worker says anything."""
        task, alive = next(iter(self._pending.values())), self._alive()
        n_cpus, free = sum(node["CPU"] for node in alive), self._ray.available_resources()
        said = (
            f"No worker has said anything for {SILENCE_S:.0f} s. Of {n_cpus:g} CPUs of this Ray "
            f"{free.get('CPU', 0):g} are free, and {sized(free.get('memory', 0))} of memory; a task asks for "
            f"{task.n_cpus} and {sized(_memory_of(task))}. lorafuse waits: for workers that start, or for "
            "others that end."
        )
        try:
            _refuse_unfit(task, alive)
        except UsageError as e:
            return f"{said} No machine that is left can do it: {e}"
        return said


def _run(pickled: bytes, expected: dict[str, str], queue: Any) -> Ended:
    return carry_out(pickled, expected, queue.put)


def _memory_of(task: Task) -> int:
    """What Ray is asked for."""
    return task.memory_nbytes + PROCESS_NBYTES


def _refuse_unfit(task: Task, machines: list[dict[str, float]]) -> None:
    """Raises UsageError for a task that Ray would never begin: one machine must have all that it asks for."""
    cores = [machine for machine in machines if machine["CPU"] >= task.n_cpus]
    able = [machine for machine in cores if machine.get("GPU", 0) >= int(task.on_gpu)]
    largest = max((machine.get("memory", 0) for machine in able), default=0)
    if not cores:
        most = max((machine["CPU"] for machine in machines), default=0)
        raise UsageError(
            f"{shown(task.name)} needs {task.n_cpus} CPUs, and the largest machine offers Ray {most:g}."
        )
    if not able:
        raise UsageError(
            f"{shown(task.name)} needs a GPU, and no machine with {task.n_cpus} CPUs offers Ray any; give "
            "--device cpu."
        )
    if _memory_of(task) > largest:
        raise UsageError(
            f"{shown(task.name)} needs {sized(_memory_of(task))} of memory, and the largest machine offers "
            f"Ray {sized(largest)}; lower --memory-limit."
        )


def _last_line(error: Exception) -> str:
    return shown(str(error).strip().splitlines()[-1])


def _on_node(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)
