"""What runs in a process that Ray starts: one task, whose events the process is told that the user called."""

import os
import pickle
import platform
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lorafuse._version import __version__
from lorafuse.engines.engine import Task, this_host
from lorafuse.engines.relay import Teller, Told
from lorafuse.errors import LorafuseError, StorageError, UsageError, out_of_memory, shown

SHARED = "All machines need the same file system, with the inputs and OUT_DIR on it."


class Ended(NamedTuple):
    """How a task ended: with a result, or with an error that another worker would meet, too."""

    host: str
    busy_s: float
    result: Any = None
    error: Exception | None = None


def versions() -> dict[str, str]:
    """What must be the same everywhere, so that the bytes are."""
    import torch

    return {"lorafuse": __version__, "torch": torch.__version__, "Python": platform.python_version()}


def carry_out(pickled: bytes, expected: dict[str, str], send: Callable[[list[Told]], None]) -> Ended:
    """Make a task's call. Versions come before the task is unpickled, which another version may not be able
    to. Errors come back as values: Ray tries again only what a process died of."""
    began = time.monotonic()
    try:
        refuse_other_versions(expected)
        task: Task = pickle.loads(pickled)
        teller = Teller(task.name, send)
        go_to(task.folder)
        refuse_unseen(task.sees)
        result = task.call(teller)
        teller.flush()
    except (LorafuseError, OSError) as e:
        return Ended(this_host(), time.monotonic() - began, error=e)
    except Exception as e:
        if no_memory := out_of_memory(e):
            return Ended(this_host(), time.monotonic() - began, error=no_memory)
        raise
    return Ended(this_host(), time.monotonic() - began, result)


def go_to(folder: str) -> None:
    """Raises StorageError where this machine does not see the folder that the user is in."""
    try:
        os.chdir(folder)
    except OSError as e:
        raise StorageError(
            f"The worker on {shown(this_host())} cannot go to {shown(folder)}: {e.strerror}. {SHARED}"
        ) from None


def refuse_unseen(paths: Iterable[str]) -> None:
    """Raises StorageError where this machine does not see what the user's does."""
    for path in paths:
        if not os.access(path, os.F_OK):
            raise StorageError(f"The worker on {shown(this_host())} does not see {shown(path)}. {SHARED}")


def refuse_other_versions(expected: dict[str, str]) -> None:
    """Raises UsageError."""
    here = versions()
    differ = [f"{name} {here[name]}, not {of}" for name, of in expected.items() if here[name] != of]
    if differ:
        raise UsageError(
            f"The worker on {shown(this_host())} has {'; '.join(differ)}: install the same versions on all "
            "machines."
        )
