"""One exception per exit code.

A message is one or two sentences: which file and tensor, what was expected, what was found, what to do.
Anything that came out of an input goes through `shown` first, since a tensor name may hold terminal escapes.
"""

import difflib
from collections.abc import Iterable

# What torch (on the CPU, on a GPU) and Python say in a RuntimeError when the system gives no more.
_NO_MEMORY = ("can't allocate memory", "out of memory", "can't start new thread")


class LorafuseError(Exception):
    """Base of every error that lorafuse raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(LorafuseError):
    """The settings are impossible, whatever the inputs (a memory limit that nothing fits into), or,
    `unquantized`, a file that should say how training quantized the base says that it did not."""

    exit_code = 2

    def __init__(self, message: str, *, unquantized: bool = False) -> None:
        super().__init__(message)
        self.unquantized = unquantized


class CheckpointError(LorafuseError):
    """The checkpoint is bad, incomplete or of an unsupported kind."""

    exit_code = 3


class AdapterError(LorafuseError):
    """The adapter is bad, unsupported, or, `misfit`, does not fit the checkpoint: the plan adds which base
    its config names."""

    exit_code = 4

    def __init__(self, message: str, *, misfit: bool = False) -> None:
        super().__init__(message)
        self.misfit = misfit


class StorageError(LorafuseError):
    """Reading or writing failed: an I/O error, no space, an unreachable hub or object store."""

    exit_code = 5


class HeldError(LorafuseError):
    """Another run holds this OUT_DIR."""

    exit_code = 6


class OutDirError(LorafuseError):
    """OUT_DIR exists, is not empty, is unsafe, or an interrupted run with other settings waits to be resumed
    into it."""

    exit_code = 7


class ResultError(LorafuseError):
    """The result is not valid: a non-finite value, an overflow, or verification failed."""

    exit_code = 8


class BatchError(LorafuseError):
    """Some jobs of a batch failed; the others are complete."""

    exit_code = 9


def out_of_memory(error: BaseException | None) -> StorageError | None:
    """What to say of an error that means that the system gives no more memory; None for any other."""
    no_memory = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    if not no_memory and not isinstance(error, MemoryError):
        return None
    return StorageError("out of memory: the system gave less than --memory-limit; lower that, or free some.")


def as_own(error: Exception) -> LorafuseError:
    """Any error as that of the job that it ended: the others go on. Its traceback is that of `__cause__`."""
    if isinstance(error, LorafuseError):
        return error
    own = out_of_memory(error) or LorafuseError(
        f"{type(error).__name__}: {shown(error) or 'without a message'}. Nobody foresaw this error: please "
        "report it."
    )
    own.__cause__ = error
    return own


def shown(text: object, limit: int = 200) -> str:
    """`text` as it may be printed: control characters and lone surrogates escaped, at most `limit`
    characters."""
    escaped = str(text)
    if not escaped.isprintable():
        escaped = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in escaped
        )
    return escaped if len(escaped) <= limit else f"{escaped[: limit - 1]}…"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first `most` names, comma-separated, and how many more there are."""
    everything = list(names)
    rest = len(everything) - most
    return ", ".join(map(shown, everything[:most])) + (f" and {rest} more" if rest > 0 else "")


def sized(nbytes: float) -> str:
    """A number of bytes for people: three digits and a decimal unit."""
    if nbytes < 1000:
        return f"{nbytes:.0f} byte" + ("s" if nbytes != 1 else "")
    units = ["KB", "MB", "GB", "TB", "PB"]
    value, unit = nbytes / 1000, units.pop(0)
    while value >= 999.5 and units:
        value, unit = value / 1000, units.pop(0)
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def nearest(name: str, candidates: Iterable[str], most: int = 3) -> str:
    """The candidates closest to `name`, for "did you mean" in a refusal; empty when none is close."""
    # A difflib ratio costs far more than a suffix test, and names of the same module are what people look
    # for.
    leaf = ".".join(name.split(".")[-2:])
    pool = list(candidates)
    close = difflib.get_close_matches(name, [c for c in pool if leaf in c][:500] or pool[:500], most, 0.5)
    return f" (nearest: {listed(close)})" if close else ""
