"""Exceptions as exit codes and one line on stderr."""

import json
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from lorafuse.cli.streams import finish, say, styled, tell
from lorafuse.errors import LorafuseError, out_of_memory, shown
from lorafuse.events import ErrorEvent
from lorafuse.outdir.interrupts import UNINTERRUPTED


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what cannot be resumed is removed."""


INTERRUPTED = (130, 143)


def leave(code: int) -> NoReturn:
    """End an interrupted process at once: a thread that was just being started when the signal came may
    wait for work for ever, and Python for the thread."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class exit_codes:  # noqa: N801 (reads as a statement)
    """Turns exceptions into the contract's exit codes and one line on stderr; with `as_json` an event on
    stdout, too. Anything unforeseen keeps its traceback."""

    def __init__(self, interrupted: str = "nothing was changed", *, as_json: bool = False) -> None:
        self._interrupted, self._as_json = interrupted, as_json

    def __enter__(self) -> None:
        for number in _heeded():
            signal.signal(number, _interrupt)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, LorafuseError):
            self._fail(str(error), error.exit_code)
        if isinstance(error, KeyboardInterrupt | Terminated):
            code = 130 if isinstance(error, KeyboardInterrupt) else 143
            self._fail(f"interrupted; {self._interrupted}.", code)
        if no_memory := out_of_memory(error):
            self._fail(str(no_memory), no_memory.exit_code)
        if isinstance(error, OSError) and error.errno is not None:
            self._fail(f"{shown(error.filename or 'the output')}: {error.strerror}.", 5)

    def _fail(self, message: str, code: int) -> NoReturn:
        if self._as_json:
            event: ErrorEvent = {"event": "error", "message": message, "exit_code": code}
            tell(json.dumps(event))
        say(f"{styled('Error:', 'red')} {message}")
        finish()
        sys.exit(code)


def _heeded() -> list[signal.Signals]:
    """The signals that end a run, but for those that the caller ignores, as `nohup` and scripts do for what
    runs in the background."""
    ending = (signal.SIGINT, signal.SIGTERM)
    return [number for number in ending if signal.getsignal(number) is not signal.SIG_IGN]


def _interrupt(number: int, _: object) -> None:
    """The first signal stops the run within a tile, or when what must not be interrupted is done; a second
    one at once."""
    for any_number in _heeded():
        signal.signal(any_number, lambda number, _: os._exit(128 + number))
    UNINTERRUPTED.interrupt(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
