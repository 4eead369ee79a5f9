"""obstore's store in memory, whose every call that changes something may fail or end the process."""

from collections.abc import Callable
from typing import Any

import obstore
from faults import Killed
from obstore.store import MemoryStore

CHANGES = ("put", "delete", "copy")


class DisturbedStore:
    """Calls that change something are counted by `calls`. The Nth one is the last of a process that is killed
    before it, or fails."""

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self.calls: list[str] = []
        self.kill_at = self.fail_at = 0
        self.dead = False

    def reset(self) -> None:
        """Empty, and undisturbed."""
        self.inner = MemoryStore()
        self.alive()

    def alive(self) -> None:
        """A new process, and nothing happens to it."""
        self.calls, self.kill_at, self.fail_at, self.dead = [], 0, 0, False

    def step(self, what: str) -> None:
        self.calls.append(what)
        self.dead = self.dead or len(self.calls) == self.kill_at
        if self.dead:
            raise Killed
        if len(self.calls) == self.fail_at:
            raise OSError(5, "Input/output error")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.inner, name)
        if name not in CHANGES:
            return method

        def call(*args: Any, **options: Any) -> Any:
            self.step(f"{name} {args[-1] if name == 'copy' else args[0]}")
            return method(*args, **options)

        return call

    def files(self, prefix: str) -> dict[str, bytes]:
        """What lies below a prefix."""
        names = [entry["path"] for page in self.inner.list(prefix) for entry in page]
        return {
            name.removeprefix(f"{prefix}/"): bytes(self.inner.get(name).bytes()) for name in sorted(names)
        }


class DisturbedWriter:
    """What `obstore.open_writer` gives."""

    def __init__(self, store: DisturbedStore, name: str, **options: Any) -> None:
        self._store, self._name = store, name
        self._inner = REAL_WRITER(store.inner, name, **options)

    def write(self, data: Any) -> None:
        self._store.step(f"write {self._name}")
        self._inner.write(data)

    def close(self) -> None:
        self._store.step(f"close {self._name}")
        self._inner.close()

    def __exit__(self, *args: object) -> None:
        self._inner.__exit__(*args)


REAL_WRITER = obstore.open_writer
