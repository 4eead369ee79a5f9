"""One run for one result at a time, in an object store: an object that is made only if it is not there, and
that its run replaces every few seconds. Who holds it is told by its tag; when it was replaced, by the clock
of the store alone.

A lock whose run is gone ends by itself: at once on the machine of that run, elsewhere after LEASE_S seconds.

Runs that make parts of a result have a lock each, beside that of the whole. Each takes its own lock first and
then looks at those that may not be held at the same time: of two that do so, at least one sees the other.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from threading import Event, Lock, Thread
from typing import Any

from lorafuse.errors import HeldError, OutDirError, StorageError, shown
from lorafuse.files.cloud_errors import NoConditionsError
from lorafuse.files.cloud_store import CloudPlace, Meta, Tag

LEASE_S, RENEW_S, LOOK_S = 90, 20, 5
LOCK, CLOCK = "lock", "clock-"
NOBODY = b"{}"  # has the lock
HELD = "another run is writing it; wait for it, or choose another place."


def clocks_in(hidden: CloudPlace) -> list[str]:
    """What runs that were killed while they asked for the time left."""
    return [meta.name for meta in hidden.list_here()[0] if meta.name.startswith(CLOCK)]


class CloudLock:
    """Held from `acquire` to `release`, by the run of that name. `out`: the result, for messages, `held`:
    what they say of another run. `beside`: the locks that nobody may hold meanwhile. `waits`: for a lock of
    another machine to be renewed, or to end, since an engine starts lost workers again."""

    def __init__(
        self,
        hidden: CloudPlace,
        out: str,
        run: str,
        *,
        held: str = HELD,
        beside: Callable[[], Iterable["CloudLock"]] = tuple,
        waits: bool = False,
    ) -> None:
        self._hidden, self._out, self._run, self._held = hidden, out, run, held
        self._beside, self._waits = beside, waits
        self._content = json.dumps({"run": run, **_process(os.getpid())}).encode()
        self._tag: Tag | None = None
        self._taken_over = False
        self._ended, self._renewing = Event(), Lock()
        self._thread: Thread | None = None
        self.is_known = True  # whether the store has such objects

    @property
    def is_held(self) -> bool:
        return self._tag is not None and not self._taken_over

    def acquire(self) -> None:
        """Raises HeldError when another run has it, or a lock beside it, and StorageError; then it is free
        again."""
        try:
            tag = self._own(self._hidden.put_new(LOCK, self._content)) or self._after_another()
        except NoConditionsError:
            self.is_known = False
            return
        if not tag:
            raise self._held_error()
        self._tag = tag
        self._thread = Thread(target=self._renew_often, name="lock", daemon=True)
        self._thread.start()
        try:
            for other in self._beside():
                other.refuse_held()
        except BaseException:
            self.release()
            raise

    def refuse_held(self) -> None:
        """Raises HeldError where another run has it. That of a run that is no more goes to nobody: a run that
        was only stopped makes nothing more."""
        with suppress(FileNotFoundError):
            data, meta = self._hidden.get(LOCK)
            if data != NOBODY and not (self._is_over(data, meta) and self._given_up(meta.tag)):
                raise self._held_error()

    def _given_up(self, tag: Tag) -> bool:
        return bool(self._hidden.replace(LOCK, NOBODY, tag)) or self._hidden.get(LOCK)[0] == NOBODY

    def _held_error(self) -> HeldError:
        return HeldError(
            f"{shown(self._out)}: {self._held} (The lock of a run that was killed on another machine ends "
            f"after {LEASE_S} seconds.)"
        )

    def _own(self, tag: Tag | None) -> Tag | None:
        """The same, or that of the lock where this run made it: of an answer that was lost the condition does
        not hold when the call is made again."""
        if tag:
            return tag
        with suppress(FileNotFoundError):
            data, meta = self._hidden.get(LOCK)
            return meta.tag if data == self._content else None
        return None

    def _after_another(self) -> Tag | None:
        """The tag, where the lock was that of a run that is no more: of two that see it, one replaces it."""
        try:
            data, meta = self._hidden.get(LOCK)
        except FileNotFoundError:  # released in between
            return self._own(self._hidden.put_new(LOCK, self._content))
        if not self._is_over(data, meta):
            return None
        return self._own(self._hidden.replace(LOCK, self._content, meta.tag))

    def _is_over(self, data: bytes, meta: Meta) -> bool:
        """Whether the run of a lock is no more."""
        if data == NOBODY or _is_gone(data):
            return True
        while (now := self._now()) and (now - meta.modified).total_seconds() < LEASE_S:
            if not self._waits or _is_here(data):
                return False
            time.sleep(LOOK_S)
            with suppress(FileNotFoundError):
                if self._hidden.head(LOCK).tag == meta.tag:
                    continue
            return False
        return now is not None

    def _now(self) -> datetime | None:
        """By the store's clock; None where another run has just cleaned up."""
        clock = CLOCK + self._run
        self._hidden.put(clock, b"")
        try:
            return self._hidden.head(clock).modified
        except FileNotFoundError:
            return None
        finally:
            self._hidden.delete([clock])

    def _renew_often(self) -> None:
        while not self._ended.wait(RENEW_S):
            with suppress(StorageError, OutDirError):  # what lasts shows where it is needed
                self.renew()

    def renew(self) -> None:
        """Raises OutDirError where another run has the lock by now, StorageError."""
        if not self.is_known:
            return
        with self._renewing:
            if self._tag and not self._taken_over:
                # Other content each time, since an ETag is a hash of it, as a rule.
                holder = {**json.loads(self._content), "renewed": os.urandom(4).hex()}
                self._content = json.dumps(holder).encode()
                self._tag = self._own(self._hidden.replace(LOCK, self._content, self._tag))
                self._taken_over = self._tag is None
        self.check()

    def check(self) -> None:
        """The same by what is known here."""
        if self._taken_over:
            raise OutDirError(f"{shown(self._out)}: another run took over what this one had begun.")

    def release(self) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
        if self.is_held:
            with suppress(StorageError, OSError, OutDirError):  # a lock whose run is gone does no harm
                self.renew()
                self._hidden.delete([LOCK])
        self._tag = None


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from all others, of this machine and of others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            boot = f.read().strip()
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            started = f.read().rpartition(")")[2].split()[19]
        return {"machine": f"{boot} {os.readlink('/proc/self/ns/pid')}", "pid": pid, "started": started}
    except (OSError, IndexError):
        return {}


def holder_of(lock: bytes) -> str:
    """Who has a lock, in words."""
    if not _is_here(lock):
        return "a run on another machine"
    pid = json.loads(lock)["pid"]
    return f"process {pid} of this machine" + (", which has ended" if _is_gone(lock) else "")


def _is_here(lock: bytes) -> bool:
    """Whether a lock is that of a process of this machine, or was."""
    try:
        holder, here = json.loads(lock), _process(os.getpid())
        return bool(here) and holder["machine"] == here["machine"]
    except (ValueError, TypeError, KeyError):
        return False


def _is_gone(lock: bytes) -> bool:
    """Whether it has ended."""
    with suppress(ValueError, TypeError, KeyError):
        holder = json.loads(lock)
        return _is_here(lock) and _process(int(holder["pid"])).get("started") != holder["started"]
    return False
