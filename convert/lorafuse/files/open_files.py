"""The files of this machine that are open for reading: few of a checkpoint's many, so that `ulimit -n` does
not matter. A file that is opened again must be the same one."""

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

MOST = 128


class _Open(NamedTuple):
    fd: int
    n_readers: int


class OpenFiles:
    """Descriptors by owner, the one that was used last at the end. Any thread may use any."""

    def __init__(self, most: int) -> None:
        self._lock, self._most = Lock(), most
        self._open: OrderedDict[object, _Open] = OrderedDict()

    @contextmanager
    def using(self, owner: object, open_again: Callable[[], int]) -> Iterator[int]:
        """The owner's descriptor, which stays open meanwhile; `open_again` makes it where it was closed."""
        with self._lock:
            found = self._open.get(owner) or _Open(open_again(), 0)
            self._open[owner] = found._replace(n_readers=found.n_readers + 1)
            self._open.move_to_end(owner)
            self._close_unused()
        try:
            yield found.fd
        finally:
            with self._lock:
                now = self._open.get(owner)
                if now:
                    self._open[owner] = now._replace(n_readers=now.n_readers - 1)

    def add(self, owner: object, fd: int) -> None:
        with self._lock:
            self._open[owner] = _Open(fd, 0)
            self._close_unused()

    def close(self, owner: object) -> None:
        with self._lock:
            found = self._open.pop(owner, None)
            if found:
                os.close(found.fd)

    def _close_unused(self) -> None:
        if len(self._open) <= self._most:
            return
        unused = [owner for owner, found in self._open.items() if found.n_readers == 0]
        for owner in unused[: len(self._open) - self._most]:
            os.close(self._open.pop(owner).fd)


def changed(path: str) -> OSError:
    return OSError(errno.ESTALE, "was replaced or changed while it was read", path)


OPEN_FILES = OpenFiles(min(MOST, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 4)))
