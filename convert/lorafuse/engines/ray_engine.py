"""Ray as an engine (the extra `ray`): tasks of Ray, with the cores and the memory that each needs.

Ray decides where a task runs, and gives it to another process when the first one ends, or its machine is
lost.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

from lorafuse.engines.engine import Tally, Task
from lorafuse.engines.ray_worker import Ended, carry_out, versions
from lorafuse.engines.relay import Relay
from lorafuse.errors import StorageError, UsageError, shown, sized
from lorafuse.events import OnEvent

RETRIES = 8  # of a task whose process ended
AHEAD = 2  # tasks that wait for each that runs
PROCESS_NBYTES = 400_000_000  # Ray's worker with torch in it, beside what --memory-limit bounds
STORE_NBYTES = 80_000_000  # nothing large goes through Ray
WAIT_S, ANSWER_S = 0.2, 10.0


def open_engine(address: str | None, on_event: OnEvent) -> "RayEngine":
    """See `engine_named`."""
    return RayEngine(address, on_event)


class RayEngine:
    """A cluster at an address, that of a Ray job or, without any, processes of this machine."""

    def __init__(self, address: str | None, on_event: OnEvent) -> None:
        self.tally = Tally()
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._relay = Relay(on_event)
        self._pending: dict[Any, Task] = {}
        self._done: list[tuple[Task, Any]] = []

    def __enter__(self) -> Self:
        self._ray = _imported()
        if self._address.startswith("ray://"):
            raise UsageError(
                f"{shown(self._address)}: Ray's client is not supported; call lorafuse on a machine of the "
                "cluster, or by `ray job submit`."
            )
        self._is_own = not self._ray.is_initialized()
        if self._is_own:  # else the caller's, which stays as it is
            _connect(self._ray, self._address)
        try:
            from ray.util.queue import Queue

            head = self._ray.get_runtime_context().get_node_id()
            self._queue = Queue(
                actor_options={"num_cpus": 0, "scheduling_strategy": _on_node(head), "max_restarts": 0}
            )
            self._remote = self._ray.remote(_run)
            self._versions = versions()
            alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._nodes = [node for node in alive if node.get("CPU")]
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for ref in self._pending:
            with suppress(Exception):
                self._ray.cancel(ref, force=True)
        if self._is_own:
            self._ray.shutdown()

    def cores(self, wanted: int) -> int:
        return max(min(wanted, int(max((node["CPU"] for node in self._nodes), default=1))), 1)

    def slots(self, n_cpus: int) -> int:
        return max(sum(int(node["CPU"]) // n_cpus for node in self._nodes), 1)

    def submit(self, task: Task) -> None:
        needed = task.memory_nbytes + PROCESS_NBYTES
        largest = max((node.get("memory", 0) for node in self._nodes), default=0)
        if needed > largest:
            raise UsageError(
                f"{shown(task.name)} needs {sized(needed)} of memory, and the largest machine offers Ray "
                f"{sized(largest)}; lower --memory-limit."
            )
        options = {"num_cpus": task.n_cpus, "memory": needed, "num_gpus": int(task.on_gpu)}
        ref = self._remote.options(name=task.name, max_retries=RETRIES, **options).remote(
            task, self._versions, self._queue
        )
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
        ready, _ = self._ray.wait([*self._pending], num_returns=1, timeout=WAIT_S)
        self._listen()
        for ref in ready:
            ended = self._ended(ref, self._pending.pop(ref))
            if ended.error:
                raise ended.error

    def _ended(self, ref: Any, task: Task) -> Ended:
        errors = self._ray.exceptions
        try:
            ended: Ended = self._ray.get(ref)
        except errors.RayTaskError as e:
            if "ModuleNotFoundError" in str(e) or "failed to import" in str(e):
                raise UsageError(
                    f"{shown(task.name)}: a worker cannot import what it needs; install lorafuse in the "
                    f"environment of Ray's workers, too. {shown(str(e).strip().splitlines()[-1])}"
                ) from e
            raise
        except errors.RayError as e:
            raise StorageError(
                f"{shown(task.name)}: its worker ended {RETRIES + 1} times, the last time so: "
                f"{shown(str(e).strip().splitlines()[0])} The same command goes on from what is finished."
            ) from e
        if not ended.error:
            self.tally.add(ended.host, self._relay.nbytes_of(task.name), ended.busy_s)
            self.tally.n_again = self._relay.n_again
            self._done.append((task, ended.result))
        return ended

    def _listen(self) -> None:
        n = self._queue.qsize()
        self._relay.pass_on(told for some in self._queue.get_nowait_batch(n) for told in some)


def _run(task: Task, expected: dict[str, str], queue: Any) -> Ended:
    return carry_out(task, expected, queue.put)


def _imported() -> Any:
    # Ray asks nobody outside, and says nothing on stdout.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'lorafuse[ray]'.") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """Start Ray on this machine, or reach a cluster. Raises UsageError, StorageError."""
    heeded = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _refuse_silent(address)
    # A thread of Ray prints on stdout, which holds the result, what became of its processes.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    local = {"include_dashboard": False, "object_store_memory": STORE_NBYTES} if address == "local" else {}
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as e:
        text = shown(str(e).strip().replace("\n", " "), 400)
        if "ersion mismatch" in text:
            raise UsageError(
                f"{shown(address)}: Ray here and on the cluster differ: {text} Install the same versions."
            ) from e
        raise StorageError(f"{shown(address)}: Ray cannot be reached: {text}") from e
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def _refuse_silent(address: str) -> None:
    """Raises StorageError where nobody answers: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as e:
        raise StorageError(f"{shown(address)}: Ray cannot be reached there: {e}.") from None


def _on_node(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)
