"""Tables of many tensors are made without Python's search for cyclic garbage.

Such tables are a million objects that stay, and hold no cycles. While they are made the search would go
through them again and again: a third of the time that a plan of 250,000 tensors takes
(bench/speed/planning.py).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class _Process:
    """How many are at work, and whether the search was on before the first."""

    def __init__(self) -> None:
        self._lock, self._inside, self._was_on = Lock(), set[object](), False

    def enter(self, who: object) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
            self._inside.add(who)
            gc.disable()

    def leave(self, who: object) -> None:
        """Also for `who` was interrupted on the way in."""
        with self._lock:
            self._inside.discard(who)
            if not self._inside and self._was_on:
                self._was_on = False
                gc.enable()


_PROCESS = _Process()


@contextmanager
def uncollected() -> Iterator[None]:
    """The search rests, in the whole process; afterwards it is as it was. May be nested, and entered by
    several threads at once; also a decorator."""
    who = object()
    try:
        _PROCESS.enter(who)
        yield
    finally:
        _PROCESS.leave(who)
