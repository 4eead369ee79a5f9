"""Merge LoRA and QLoRA adapters into safetensors checkpoints, a tile at a time, without loading the model.

    >>> import lorafuse
    >>> receipt = lorafuse.convert("base-nf4", "my-adapter", "merged")

The command line (`lorafuse-convert`) is a thin layer over `convert`. What is not in `__all__` is private.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorafuse._version import __version__
from lorafuse.errors import (
    AdapterError,
    BatchError,
    CheckpointError,
    HeldError,
    LorafuseError,
    OutDirError,
    ResultError,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    from lorafuse.batching.batch import batch
    from lorafuse.batching.jobs import JobState
    from lorafuse.inspection import inspect
    from lorafuse.pipeline import convert
    from lorafuse.progress_bar import ProgressBar
    from lorafuse.reporting import report
    from lorafuse.settings import Push
    from lorafuse.verification.verify import verify

__all__ = [
    "AdapterError",
    "BatchError",
    "CheckpointError",
    "HeldError",
    "JobState",
    "LorafuseError",
    "OutDirError",
    "ProgressBar",
    "Push",
    "ResultError",
    "StorageError",
    "UsageError",
    "__version__",
    "batch",
    "convert",
    "inspect",
    "report",
    "verify",
]

# Where a name is that `import lorafuse` does not bring: torch comes with most of them, and the command line
# shows its help without it.
_LATER = {
    "JobState": "lorafuse.batching.jobs",
    "ProgressBar": "lorafuse.progress_bar",
    "Push": "lorafuse.settings",
    "batch": "lorafuse.batching.batch",
    "convert": "lorafuse.pipeline",
    "inspect": "lorafuse.inspection",
    "report": "lorafuse.reporting",
    "verify": "lorafuse.verification.verify",
}
_FUNCTIONS = ("batch", "convert", "inspect", "report", "verify")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        found = getattr(import_module(_LATER[name]), name)
        spoken = import_module("lorafuse.in_python").spoken_in_python
        return spoken(found) if name in _FUNCTIONS else found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
