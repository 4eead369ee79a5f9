"""How far a run is: a bar on a terminal, elsewhere a line from time to time."""

import sys
import time
from collections.abc import Callable
from typing import Any

from lorafuse.cli.streams import say, tell
from lorafuse.errors import shown, sized

HEARTBEAT_S = 30.0
BAR = "{desc}  {percentage:3.0f}% |{bar}| {n_fmt}B of {total_fmt}B, {rate_fmt}, {remaining} left"


class Progress:
    """One task after the other, each with a label and a number of bytes. What is said meanwhile stands in
    lines of its own, and nothing is left of a bar."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._label, self._total, self._done, self._skipped = "", 0, 0, 0
        self._waits = False
        self._began = self._said = 0.0

    @property
    def is_bar(self) -> bool:
        return self._bar is not None

    def begin(self, label: str, nbytes: int) -> None:
        """A task of so many bytes begins."""
        self.end()
        self._label, self._total, self._done, self._skipped = label, nbytes, 0, 0
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty() and not self._quiet:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # a thread, which would wait for a lock that an interruption left taken
            self._bar = tqdm(
                total=nbytes, unit="B", unit_scale=True, dynamic_ncols=True, desc=label, leave=False,
                bar_format=BAR, delay=1e-9,  # shown below, when `end` can remove it
            )  # fmt: skip
            self._bar.refresh()

    def grow(self, label: str, nbytes: int) -> None:
        """So many bytes more belong to the task, which begins with the first."""
        if not self._total:
            self.begin(label, nbytes)
            return
        self._total += nbytes
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def skip(self, nbytes: int) -> None:
        """Bytes that are there already: they say nothing of the rate."""
        nbytes = min(nbytes, self._total - self._done)
        self._done, self._skipped = self._done + nbytes, self._skipped + nbytes
        if self._bar is not None:
            self._bar.initial += nbytes
            self._bar.n += nbytes
            self._bar.refresh()

    def wait(self, file: str, nbytes: int, of_nbytes: int) -> None:
        """So much of a file is here that the task waits for."""
        here = f"{sized(nbytes)} of {sized(of_nbytes)}"
        if self._bar is not None:
            self._waits = True
            self._bar.set_description_str(f"{self._label}, fetching {here}")
        elif not self._quiet and time.monotonic() - self._said >= HEARTBEAT_S:
            self._said = time.monotonic()
            say(f"Fetching {shown(file)}: {here}")

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None and self._waits:
            self._waits = False
            self._bar.set_description_str(self._label)
        if self._bar is not None:
            self._bar.update(nbytes)
            if self._done >= self._total:
                self._bar.set_description_str(f"{self._label}, finishing")
        elif self._total and not self._quiet and time.monotonic() - self._said >= HEARTBEAT_S:
            self._said = time.monotonic()
            say(self._heartbeat())

    def _heartbeat(self) -> str:
        seconds = max(self._said - self._began, 1e-9)
        rate = (self._done - self._skipped) / seconds
        left = max(self._total - self._done, 0) / rate if rate else 0.0
        return (
            f"{self._label}: {sized(self._done)} of {sized(self._total)} ({self._done / self._total:.0%}), "
            f"{sized(rate)}/s, about {lasting(left)} left"
        )

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        self._above_the_bar(say, text)

    def tell(self, text: str | bytes) -> None:
        """A line on stdout, which may be the same terminal."""
        self._above_the_bar(tell, text)

    def _above_the_bar(self, print_line: Callable[[Any], None], text: str | bytes) -> None:
        if self._bar is not None:
            self._bar.clear()
        print_line(text)
        if self._bar is not None:
            self._bar.refresh()

    def end(self) -> None:
        """The task is over, or was broken off: the line that the bar was in is free."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def lasting(seconds: float) -> str:
    """A time for people."""
    if seconds < 1:
        return "less than a second"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = int(seconds + 30) // 60
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
