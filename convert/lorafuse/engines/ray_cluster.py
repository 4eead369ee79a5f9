"""Ray, as a library: imported, started on this machine, or reached where it runs."""

import os
import signal
import socket
from typing import Any

from lorafuse.engines.signals import signals_wait
from lorafuse.errors import StorageError, UsageError, shown

STORE_NBYTES = 80_000_000  # nothing large goes through Ray
ANSWER_S = 10.0
# What a client of HTTP/2, as gRPC is, says first, with no settings; and the kind of frame that a server
# answers with (RFC 9113, 3.4 and 6.5).
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = 4


def imported() -> Any:
    """The library. Raises UsageError where it is not installed."""
    # Ray asks nobody outside, and says nothing on stdout.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError("--engine ray needs Ray: pip install 'lorafuse[ray]'.") from None
    return ray


def connect(ray: Any, address: str) -> None:
    """Start Ray on this machine, or reach a cluster. Raises UsageError, StorageError."""
    _refuse_silent(address)
    # A thread of Ray prints on stdout, which holds the result, what became of its processes.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    local = {"include_dashboard": False, "object_store_memory": STORE_NBYTES} if address == "local" else {}
    terminated = False
    try:
        with signals_wait():
            try:
                ray.init(address, logging_level="ERROR", log_to_driver=False, **local)
            except Exception:
                raise
            except BaseException:  # by which Ray's handler of SIGTERM ends a process
                terminated = True
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        text = shown(str(e).strip().replace("\n", " "), 400)
        if "ersion mismatch" in text:
            raise UsageError(
                f"{shown(address)}: Ray here and on the cluster differ: {text} Install the same versions."
            ) from e
        raise StorageError(f"{shown(address)}: Ray cannot be reached: {text}") from e
    if terminated:
        os.kill(os.getpid(), signal.SIGTERM)


def _refuse_silent(address: str) -> None:
    """Raises StorageError where nobody answers, or who is there is not Ray: Ray itself would try for
    minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_S) as there:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            there.sendall(HTTP2)
            answer = there.recv(9)
    except (OSError, OverflowError) as e:
        raise StorageError(f"{shown(address)}: Ray cannot be reached there: {e}.") from None
    if answer[3:4] != bytes([SETTINGS]):
        raise StorageError(
            f"{shown(address)}: whoever answers there is not Ray. `ray status` on a machine of the cluster "
            "says its address; the port is 6379 as a rule, not that of the dashboard."
        )
