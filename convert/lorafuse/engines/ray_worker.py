"""What runs in a process that Ray starts: one task, whose events the process is told that the user called."""

import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from lorafuse._version import __version__
from lorafuse.engines.engine import Task, this_host
from lorafuse.engines.relay import Teller, Told
from lorafuse.errors import LorafuseError, StorageError, UsageError, shown


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


def carry_out(task: Task, expected: dict[str, str], send: Callable[[list[Told]], None]) -> Ended:
    """Make a task's call. Errors come back as values: Ray tries again only what a process died of."""
    began = time.monotonic()
    teller = Teller(task.name, send)
    try:
        refuse_other_versions(expected)
        go_to(task.folder)
        result = task.call(teller)
    except (LorafuseError, OSError) as e:
        return Ended(this_host(), time.monotonic() - began, error=e)
    teller.flush()
    return Ended(this_host(), time.monotonic() - began, result)


def go_to(folder: str) -> None:
    """Raises StorageError where this machine does not see the folder that the user is in."""
    try:
        os.chdir(folder)
    except OSError as e:
        raise StorageError(
            f"The worker on {shown(this_host())} cannot go to {shown(folder)}: {e.strerror}. All machines "
            "need the same file system, with the inputs and OUT_DIR on it."
        ) from None


def refuse_other_versions(expected: dict[str, str]) -> None:
    """Raises UsageError."""
    here = versions()
    differ = [f"{name} {here[name]}, not {of}" for name, of in expected.items() if here[name] != of]
    if differ:
        raise UsageError(
            f"The worker on {shown(this_host())} has {'; '.join(differ)}: install the same versions on all "
            "machines."
        )
