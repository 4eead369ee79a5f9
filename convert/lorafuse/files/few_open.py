"""The files of a folder, of which few are open at once: a checkpoint may have more shards than a process may
have open files (`ulimit -n`)."""

import errno
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from lorafuse.errors import CheckpointError, shown
from lorafuse.files.folder import FileFacts, Folder, OpenFile

MAX_OPEN = 64
MAX_SHARE = 4  # a part of what the process may open: other folders and the output need some, too


class FewOpen:
    """The files that were used last stay open, at most MAX_OPEN of them unless more are in use at once. Any
    number of threads may read."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._lock = folder, Lock()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MAX_OPEN if allowed == resource.RLIM_INFINITY else min(MAX_OPEN, allowed // MAX_SHARE)
        self._idle: OrderedDict[str, OpenFile] = OrderedDict()
        self._used: dict[str, tuple[OpenFile, int]] = {}  # and by how many
        self._facts: dict[str, FileFacts] = {}

    @contextmanager
    def opened(self, name: str) -> Iterator[OpenFile]:
        """The file, for as long as it is read. Raises what `Folder.open` raises, and CheckpointError when it
        is not the file that it was when it was opened first."""
        file = self.take(name)
        try:
            yield file
        finally:
            self.give_back(name)

    def take(self, name: str) -> OpenFile:
        """The same, until it is given back, for many short reads: a context costs more than such a read."""
        with self._lock:
            file, n_users = self._used.get(name) or (self._reopened(name), 0)
            self._used[name] = file, n_users + 1
            return file

    def give_back(self, name: str) -> None:
        """After `take`, always."""
        with self._lock:
            file, n_users = self._used.pop(name)
            if n_users > 1:
                self._used[name] = file, n_users - 1
            else:
                self._idle[name] = file

    def _reopened(self, name: str) -> OpenFile:
        return self._idle.pop(name) if name in self._idle else self._open(name)

    def _open(self, name: str) -> OpenFile:
        while len(self._idle) + len(self._used) >= self._most and self._close_idle():
            pass
        file = self._opened(name)
        if self._facts.setdefault(name, file.facts) != file.facts:
            file.close()
            raise CheckpointError(
                f"{shown(self._folder / name)}: changed during the run, which may have read some of both; "
                "run it again."
            )
        return file

    def _opened(self, name: str) -> OpenFile:
        while True:
            try:
                return self._folder.open(name)
            except OSError as e:
                if e.errno != errno.EMFILE or not self._close_idle():
                    raise

    def _close_idle(self) -> bool:
        """Close the file that was used longest ago. False when all are in use."""
        if not self._idle:
            return False
        self._idle.popitem(last=False)[1].close()
        return True

    def close(self, name: str) -> None:
        """Nobody reads the file any more."""
        with self._lock:
            if file := self._idle.pop(name, None):
                file.close()
