"""stdout and stderr that cannot end a run: closed, full, without a reader, or in an encoding that lacks a
character.

What is said on stderr may be lost. So may what is printed on stdout when its reader is gone; any other error
of stdout is raised where the result is what is printed, and a warning where the result is files or an exit
code.
"""

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, TypeVar

T = TypeVar("T")
_READER_GONE = {errno.EPIPE, errno.EBADF, errno.ECONNRESET}


class LossyStream:
    """A stream whose errors go to `on_error`, which may raise them; after the first, all is dropped."""

    def __init__(self, stream: Any, on_error: Callable[[OSError], None]) -> None:
        self._stream, self._on_error = stream, on_error

    def write(self, data: Any) -> int:
        if len(data) == 0:  # click asks so whether a stream takes text or bytes; that loses nothing
            with suppress(OSError):
                self._stream.write(data)
            return 0
        return self._try(lambda: self._stream.write(data), len(data))

    def flush(self) -> None:
        self._try(self._stream.flush, None)

    @property
    def buffer(self) -> "LossyStream":
        return LossyStream(self._stream.buffer, self._on_error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except OSError as e:
            # What is buffered goes nowhere, or Python would end with 120.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._on_error(e)
            return otherwise


class _Stdout:
    """What an error of stdout means."""

    def __init__(self) -> None:
        self.is_result, self._is_lost = True, False

    def lost(self, error: OSError) -> None:
        if error.errno in _READER_GONE:
            return
        if self.is_result:
            raise OSError(error.errno, error.strerror, "stdout")
        if self._is_lost:
            return
        self._is_lost = True
        sys.stderr.write(f"Warning: stdout: {error.strerror}; the rest of what is printed there is lost.\n")


_STDOUT = _Stdout()


def stdout_is_not_the_result() -> None:
    """From here on the result is files: what is printed may be lost."""
    _STDOUT.is_result = False


def prepare_streams() -> None:
    """For a process whose streams are ours. A closed one becomes /dev/null: the next file that is opened
    would get its number, and what a library says on stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, on_error in (("stdout", _STDOUT.lost), ("stderr", lambda error: None)):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        if isinstance(stream, TextIOWrapper):  # neither prepared before nor a program's own
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, LossyStream(stream, on_error))
