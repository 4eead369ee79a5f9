"""What is printed goes to whoever still listens: a result is complete, whether its name can be printed or
not."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

import click


def make_usable() -> None:
    """Called first. A file that a run opens must not get the number of a closed stream, to which libraries
    print. What a stream cannot spell is escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tell(text: str | bytes) -> None:
    """A line on stdout, where it is not what the command is there for."""
    _write(text, sys.stdout)


def say(text: str) -> None:
    """A line on stderr."""
    _write(text, sys.stderr)


def _write(text: str | bytes, stream: TextIO) -> None:
    try:
        # Where the stream is no terminal, click takes colours out.
        click.echo(text, file=stream, color=False if os.environ.get("NO_COLOR") else None)
    except OSError:  # a pipe without a reader, a full disk
        _give_up(stream)


def styled(word: str, colour: str) -> str:
    """A word that stands out on a terminal."""
    return click.style(word, fg=colour, bold=True)


def finish() -> None:
    """Called before a run ends with an error: what stdout cannot take goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        _give_up(sys.stdout)


def _give_up(stream: TextIO) -> None:
    """What is still in its buffer goes nowhere, too: else Python ends with an error of its own."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
