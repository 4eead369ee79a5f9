"""Exceptions as exit codes and one line on stderr."""

import errno
import os
import signal
import sys
from typing import NoReturn

import click

from lorafuse.errors import LorafuseError, shown
from lorafuse.outdir.interrupts import UNINTERRUPTED

# What torch (on the CPU, on a GPU) and Python say in a RuntimeError when the system gives no more.
_NO_MEMORY = ("can't allocate memory", "out of memory", "can't start new thread")


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what cannot be resumed is removed."""


class exit_codes:  # noqa: N801 (reads as a statement)
    """Turns exceptions into the contract's exit codes and one line on stderr. Anything unforeseen keeps its
    traceback."""

    def __init__(self, interrupted: str = "nothing was changed") -> None:
        self._interrupted = interrupted

    def __enter__(self) -> None:
        for number in _not_ignored():
            signal.signal(number, _interrupt)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, LorafuseError):
            _fail(str(error), error.exit_code)
        if isinstance(error, KeyboardInterrupt | Terminated):
            _fail(f"interrupted; {self._interrupted}.", 130 if isinstance(error, KeyboardInterrupt) else 143)
        no_memory = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
        if no_memory or isinstance(error, MemoryError):
            _fail("out of memory: the system gave less than --memory-limit; lower that, or free some.", 5)
        if isinstance(error, OSError) and error.errno is not None:
            too_many = error.errno in (errno.EMFILE, errno.ENFILE)
            remedy = "; raise `ulimit -n`" if too_many else ""
            _fail(f"{shown(error.filename or 'the output')}: {error.strerror}{remedy}.", 5)


def _not_ignored() -> list[int]:
    """The signals that end a run, less those that the caller ignores: nohup, a script's background job."""
    ending = (signal.SIGINT, signal.SIGTERM)
    return [number for number in ending if signal.getsignal(number) is not signal.SIG_IGN]


def _interrupt(number: int, _: object) -> None:
    """The first signal stops the run within a tile, or when what must not be interrupted is done; a second
    one at once."""
    for any_number in _not_ignored():
        signal.signal(any_number, lambda number, _: os._exit(128 + number))
    UNINTERRUPTED.interrupt(KeyboardInterrupt() if number == signal.SIGINT else Terminated())


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
