"""A second kind of place for results: in this process's memory, `memory://name`, where MemoryFolder reads it.

It behaves as an object store does: an object appears when it is complete, none can be renamed or written to,
there are no directories. So a result is made under `memory://.name.lorafuse/out/`, and a commit copies its
files to `memory://name/` one after the other, config.json and the receipt last, and then removes the first
ones. The lock is an object that is made only if it is not there, under a lease that ends with its run.
"""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Self

from faults import Killed
from memory_folder import MemoryFolder
from safetensors import SafetensorError, deserialize

from lorafuse.arithmetic.measure import Measures
from lorafuse.errors import HeldError, OutDirError, ResultError, StorageError, shown
from lorafuse.events import OnEvent
from lorafuse.files.folder import FileHash, Folder
from lorafuse.files.hashing import hash_file
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.names import RECEIPT
from lorafuse.merge.destination import Written
from lorafuse.outdir.folder_file import FolderFile
from lorafuse.outdir.interrupts import UNINTERRUPTED
from lorafuse.outdir.journal import Attempt, FinishedShard, Record, line_of, record_of
from lorafuse.outdir.out_dir import FinishedFile, Space
from lorafuse.outdir.resume import goes_on, leaves_work

LAST = ("config.json", RECEIPT)


class ObjectStore:
    """Objects by URL. Every call that changes something is counted while it is `watched`, and the Nth one may
    end the process or fail. `capacity` is in bytes; `leases` are those of the runs that are alive."""

    def __init__(self, objects: dict[str, bytes | bytearray]) -> None:
        self.objects = objects
        self.capacity: int | None = None
        self.leases: set[bytes] = set()
        self.n_calls, self.dead = 0, False
        self.lock = RLock()  # files are written and finished by several threads
        self.before: Callable[[int, str], None] = lambda n, name: None
        self._watched = False

    def step(self, name: str) -> None:
        """Something is about to change."""
        with self.lock:
            if self._watched:
                if self.dead:
                    raise Killed
                self.n_calls += 1
                self.before(self.n_calls, name)

    def put(self, url: str, data: bytes | bytearray, call: str = "put") -> None:
        """Make an object, or replace it as a whole."""
        self.step(call)
        self.objects[url] = data

    def put_new(self, url: str, data: bytes) -> bool:
        """Make an object if it is not there. Returns whether it was made."""
        self.step("put new")
        return self.objects.setdefault(url, data) is data

    def delete(self, url: str) -> None:
        self.step("delete")
        self.objects.pop(url, None)

    def below(self, url: str) -> list[str]:
        """The names of the objects below a URL, sorted."""
        prefix = f"{url}/"
        return sorted(key.removeprefix(prefix) for key in self.objects if key.startswith(prefix))

    def nbytes(self, url: str) -> int:
        """What lies below a URL."""
        return sum(len(self.objects[f"{url}/{name}"]) for name in self.below(url))

    def space(self) -> Space | None:
        if self.capacity is None:
            return None
        return Space(free_nbytes=self.capacity - sum(map(len, self.objects.values())))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Afterwards the leases of a killed process have ended."""
        self.n_calls, self._watched, self.dead = 0, True, False
        try:
            yield
        finally:
            self._watched = False
            if self.dead:
                self.leases.clear()

    def kill_at(self, number: int) -> None:
        """End the process before call `number`, from which on nothing it does reaches the store."""

        def before(n: int, name: str) -> None:
            if n == number:
                self.dead = True
                raise Killed

        self.before = before

    def fail_at(self, number: int, code: int) -> None:
        """Call `number` fails, those after it do not."""

        def before(n: int, name: str) -> None:
            if n == number:
                raise OSError(code, os.strerror(code))

        self.before = before


class MemoryOutDirs:
    """The kind, for OUT_DIRS."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def check_out_dir(self, out_dir: str, inputs: Iterable[Folder], *, overwrite: bool) -> None:
        for address in (folder.address for folder in inputs):
            if f"{out_dir}/".startswith(f"{address}/") or f"{address}/".startswith(f"{out_dir}/"):
                raise OutDirError(
                    f"{shown(out_dir)}: is, contains or lies inside the input {shown(address)}; choose "
                    "another directory."
                )
        if not self.store.below(
            hidden(out_dir)
        ):  # else it is seen later what a run that was cut off got done
            refuse_filled(self.store, out_dir, overwrite)

    def open_out_dir(
        self,
        out_dir: str,
        plan_id: str,
        attempt: Attempt | None = None,
        *,
        overwrite: bool = False,
        restart: bool = False,
        on_event: OnEvent = lambda event: None,
    ) -> "MemoryOutDir":
        return MemoryOutDir(
            self.store, out_dir, attempt, overwrite=overwrite, restart=restart, on_event=on_event
        )

    def held_nbytes(self, sizes: list[int], ckpt: Folder) -> int:
        return 0

    def clean_up(self, out_dir: str) -> None:
        if self.store.below(hidden(out_dir)):
            with suppress(HeldError):
                MemoryOutDir(self.store, out_dir).clean_up()

    def left_nbytes(self, out_dirs: Iterable[str]) -> int:
        return sum(self.store.nbytes(f"{hidden(out_dir)}/out") for out_dir in out_dirs)

    def space_of(self, out_root: str) -> Space | None:
        return self.store.space()


def hidden(out_dir: str) -> str:
    """Below which a result is made, in the journal and under the lock that lie there too."""
    home, slash, name = out_dir.rpartition("/")
    return f"{home}{slash}.{name}.lorafuse"


def refuse_filled(store: ObjectStore, out_dir: str, overwrite: bool) -> None:
    if not overwrite and store.below(out_dir):
        raise OutDirError(
            f"{shown(out_dir)}: exists and is not empty; --overwrite replaces it once the new one is "
            "complete."
        )


class MemoryOutDir:
    """A result in the making. It goes on from what a run that was cut off has left, as in a directory."""

    def __init__(
        self,
        store: ObjectStore,
        out_dir: str,
        attempt: Attempt | None = None,
        *,
        overwrite: bool = False,
        restart: bool = False,
        on_event: OnEvent = lambda event: None,
    ) -> None:
        self._store, self.name, self._attempt = store, out_dir, attempt
        self._overwrite, self._restart, self._on_event = overwrite, restart, on_event
        self._hidden, self.place = hidden(out_dir), f"{hidden(out_dir)}/out"
        self._lease = secrets.token_bytes(8)
        self._moving: list[str] = []
        self._owns_what_is_left = False
        self._committed = False
        self.finished: dict[str, FinishedShard] = {}

    def __enter__(self) -> Self:
        self._lock()
        try:
            self._open()
        except BaseException as e:
            if isinstance(e, OSError) and e.filename is None:
                e.filename = self.name
            self.__exit__(type(e), e, None)
            raise
        return self

    def _lock(self) -> None:
        url = f"{self._hidden}/lock"
        if not self._store.put_new(url, self._lease):
            if self._store.objects[url] in self._store.leases:
                raise HeldError(
                    f"{shown(self.name)}: another run is writing it; wait for it, or choose another "
                    "directory."
                )
            self._store.put(url, self._lease)  # that of a run that is no more
        self._store.leases.add(self._lease)

    def _unlock(self) -> None:
        with suppress(OSError):  # a lock whose lease has ended does no harm
            self._store.delete(f"{self._hidden}/lock")
        self._store.leases.discard(self._lease)

    def _open(self) -> None:
        record = self._leftovers()
        refuse_filled(self._store, self.name, self._overwrite)
        if goes_on(self.name, record, self._attempt, restart=self._restart, warn=self._warn):
            self.finished = {
                file: one for file, one in record.finished.items() if self._is_whole(one.written)
            }
        self._owns_what_is_left = True
        if self._attempt:
            # First: as long as the journal tells of a commit, what lies there for it stays.
            self._log(self._attempt)
            self._clear()
        else:
            self._discard()

    def _leftovers(self) -> Record:
        """What a run that was cut off left: nothing where its result was committed."""
        journal = self._store.objects.get(f"{self._hidden}/journal.jsonl", b"")
        record = record_of(bytes(journal).splitlines(keepends=True))
        if record.moving and self._is_complete():
            self._discard()
            return Record()
        self._take_back(record.moving)
        return record

    def _is_complete(self) -> bool:
        """Whether a commit got as far as its last file, and only has to be cleaned up after."""
        staged = self._store.objects.get(f"{self.place}/{RECEIPT}")
        found = self._store.objects.get(f"{self.name}/{RECEIPT}")
        return found is not None and staged in (None, found)

    def _take_back(self, moving: list[str]) -> None:
        """Undo what a commit that was cut off began: its files lie where they were made too."""
        objects = self._store.objects
        names = [name for name in self.files() if name.partition("/")[0] in moving]
        for name in sorted(names, key=lambda name: name not in LAST):
            if objects.get(f"{self.name}/{name}") == objects[f"{self.place}/{name}"]:
                self._store.delete(f"{self.name}/{name}")

    def _log(self, attempt: Attempt, moving: list[str] | None = None) -> None:
        """Write the journal: what is finished, and what a commit is about to copy."""
        facts = [attempt, *self.finished.values(), *([moving] if moving else ())]
        journal = b"".join(line_of(fact) for fact in facts)
        self._store.put(f"{self._hidden}/journal.jsonl", journal, "record")

    def _is_whole(self, written: Written) -> bool:
        try:
            whole = self.hash(written.file) == (written.nbytes, written.sha256)
        except FileNotFoundError:
            whole = False
        if not whole:
            self._warn(
                f"{shown(written.file)}: is not what was written before the run was cut off; it is made "
                "again."
            )
        return whole

    def _warn(self, message: str) -> None:
        self._on_event({"event": "warning", "message": message})

    def _clear(self) -> None:
        """Remove what is not finished."""
        for name in self.files():
            if name not in self.finished:
                self._store.delete(f"{self.place}/{name}")

    def _discard(self) -> None:
        """Remove everything but the lock. The journal goes last: it says what the rest is."""
        for name in self.files():
            self._store.delete(f"{self.place}/{name}")
        self._store.delete(f"{self._hidden}/journal.jsonl")

    def clean_up(self) -> None:
        """Remove what is only to be cleaned up, and change nothing else. Raises HeldError."""
        self._lock()
        try:
            self._leftovers()
        finally:
            self._unlock()

    def create(self, file: str, nbytes: int) -> "Upload":
        return Upload(self._store, f"{self.place}/{file}")

    def put(self, file: str, chunks: Iterable[bytes]) -> None:
        data = bytearray()
        for chunk in chunks:
            data += chunk
        self._store.put(f"{self.place}/{file}", data)

    def files(self) -> list[str]:
        return self._store.below(self.place)

    def hash(self, file: str) -> FileHash:
        return hash_file(MemoryFolder(self._store.objects, self.place), file)

    def shapes(self, file: str) -> tuple[int, dict[str, tuple[int, ...]]]:
        data = bytes(self._store.objects[f"{self.place}/{file}"])
        try:
            return len(data), {name: tuple(tensor["shape"]) for name, tensor in deserialize(data)}
        except SafetensorError as e:
            raise ResultError(f"{file}: cannot be read back: {shown(e)}.") from None

    def record(self, written: Written, measures: dict[str, Measures]) -> None:
        if self._attempt:
            self.finished[written.file] = FinishedShard(written, measures)
            self._log(self._attempt)

    def give_away(self, file: str) -> None:
        raise AssertionError("what is made in memory goes nowhere else")

    def finished_file(self, file: str) -> FolderFile:
        url = self.name if self._committed else self.place
        return FolderFile(MemoryFolder(self._store.objects, url), file)

    def take(self, file: str, other: FinishedFile, how: str) -> None:
        self.put(file, other.chunks())

    def space(self) -> Space | None:
        return self._store.space()

    def scratch(self) -> LocalFolder:
        return LocalFolder(
            Path(tempfile.mkdtemp())
        )  # of this machine; for the object store this is what it has not

    def commit(self) -> None:
        with UNINTERRUPTED:
            refuse_filled(self._store, self.name, self._overwrite)
            names = self.files()
            self._moving = sorted({name.partition("/")[0] for name in names})
            if self._attempt:
                self._log(self._attempt, self._moving)
            for name in sorted(self._store.below(self.name), key=lambda name: name not in LAST):
                self._store.delete(f"{self.name}/{name}")
            for name in (*(name for name in names if name not in LAST), *LAST):
                self._store.put(f"{self.name}/{name}", self._store.objects[f"{self.place}/{name}"], "commit")
            self._committed = True
            UNINTERRUPTED.forget()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self._owns_what_is_left:
                self._leave(error)
        except OSError:
            pass  # the error that led here is the one to tell of; the next run removes what is left
        finally:
            self._unlock()

    def _leave(self, error: BaseException | None) -> None:
        """Keep what can be resumed, remove the rest."""
        if not self._committed:
            self._take_back(self._moving)
        if self._attempt and self.finished and leaves_work(error) and not self._committed:
            self._log(self._attempt)
            self._clear()
        else:
            self._discard()


class Upload:
    """A file in the making, of which nothing is to be seen before it is finished."""

    def __init__(self, store: ObjectStore, url: str) -> None:
        store.step("create")
        self.name, self._store = url, store
        self._data = bytearray()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        with self._store.lock:
            self._store.step("write")
            self._data.extend(bytes(max(offset - len(self._data), 0)))
            self._data[offset : offset + len(data)] = data

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._data[offset : offset + nbytes])

    def passed(self, end: int) -> None:
        """All is kept."""

    def finish(self, nbytes: int) -> None:
        if len(self._data) != nbytes:
            raise StorageError(f"{self.name}: {len(self._data)} bytes were written, the plan has {nbytes}.")
        self._store.put(self.name, self._data, "finish")

    def close(self) -> None:
        """Nothing is open."""
