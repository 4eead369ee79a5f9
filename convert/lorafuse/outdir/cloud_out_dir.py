"""Results in an object store. A result is made below `.NAME.lorafuse/RUN/out/`, beside its place, and a
commit lets the store copy its files to their place: config.json, and then the receipt, last.

What another run that was cut off has finished is used where it lies, if its ETag is that of the file whose
hash was taken. A run that lost its lock has a place of its own: it cannot write into the files of the next.
"""

import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

from lorafuse.arithmetic.measure import Measures
from lorafuse.errors import OutDirError, StorageError, shown
from lorafuse.events import OnEvent
from lorafuse.files.cloud_folder import CloudFolder
from lorafuse.files.cloud_store import CloudPlace, Meta
from lorafuse.files.folder import FileHash
from lorafuse.files.hashing import hash_file
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.names import RECEIPT
from lorafuse.merge.destination import Written
from lorafuse.outdir.cloud_file import CloudOutFile
from lorafuse.outdir.cloud_lock import CloudLock, clocks_in
from lorafuse.outdir.cloud_parts import SMALLEST_PART_NBYTES
from lorafuse.outdir.cloud_runs import MOVING, OUT, Run, put_attempt, put_done, put_moving, read_run, runs_in
from lorafuse.outdir.commit import LAST
from lorafuse.outdir.folder_file import FolderFile
from lorafuse.outdir.interrupts import UNINTERRUPTED
from lorafuse.outdir.journal import Attempt, FinishedShard
from lorafuse.outdir.out_dir import FinishedFile
from lorafuse.outdir.read_back import read_shapes
from lorafuse.outdir.resume import goes_on, leaves_work

N_COPIES = 8  # at once


def hidden_of(out: CloudPlace) -> CloudPlace:
    """Where a result is made: beside its place, or in it where that is a whole bucket."""
    home, _, name = out.prefix.rstrip("/").rpartition("/")
    above = CloudPlace(out.store, out.root, f"{home}/" if home else "")
    return above.below(f".{name}.lorafuse" if name else ".lorafuse")


def files_at(out: CloudPlace) -> list[Meta]:
    """What lies where a result is to be."""
    hidden = hidden_of(out).prefix.removeprefix(out.prefix)
    return [meta for meta in out.everything() if not meta.name.startswith(hidden)]


def refuse_filled(out: CloudPlace, overwrite: bool) -> None:
    if not overwrite and files_at(out):
        raise OutDirError(
            f"{shown(out)}: exists and is not empty; --overwrite replaces it once the new one is complete."
        )


class CloudOutDir:
    """A result in the making. See OutDir."""

    def __init__(
        self,
        out: CloudPlace,
        attempt: Attempt | None = None,
        *,
        overwrite: bool = False,
        restart: bool = False,
        on_event: OnEvent = lambda event: None,
    ) -> None:
        self.name, self._out, self._hidden = str(out), out, hidden_of(out)
        self._attempt, self._overwrite, self._restart = attempt, overwrite, restart
        self._on_event = on_event
        run = secrets.token_hex(4)
        self._own = self._hidden.below(run)
        self._staged = self._own.below(OUT)
        self.place = str(self._staged)
        self._lock = CloudLock(self._hidden, self.name, run)
        self._before: list[Run] = []  # whose files are used
        self._at: dict[str, CloudPlace] = {}  # where those lie
        self._scratch: Path | None = None
        self._committed = False
        self.finished: Mapping[str, FinishedShard] = {}

    def __enter__(self) -> Self:
        self._lock.acquire()
        try:
            if not self._lock.is_known:
                self._warn(f"{shown(self.name)}: the store has no locks; let one run at a time write it.")
            self._open()
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        return self

    def _open(self) -> None:
        left = leftovers(self._out, self._hidden)
        refuse_filled(self._out, self._overwrite)
        for run in left:
            if goes_on(self.name, run.record, self._attempt, restart=self._restart, warn=self._warn):
                self._before.append(run)
            else:
                run.discard()
        finished: dict[str, FinishedShard] = {}
        for run in self._before:
            for shard in run.finished():
                finished[shard.written.file] = shard
                self._at[shard.written.file] = run.out
        for file in {file for run in self._before for file in run.record.finished} - finished.keys():
            self._warn(
                f"{shown(file)}: is not what was written before the run was cut off; it is made again."
            )
        self.finished = finished
        if self._attempt:
            put_attempt(self._own, self._attempt)

    def _warn(self, message: str) -> None:
        self._on_event({"event": "warning", "message": message})

    def create(self, file: str, nbytes: int) -> CloudOutFile:
        self._lock.check()
        return CloudOutFile(self._staged, file, nbytes)

    def put(self, file: str, chunks: Iterable[bytes]) -> None:
        self._lock.check()
        with self._staged.writer(file, SMALLEST_PART_NBYTES) as writer:
            for chunk in chunks:
                writer.write(chunk)

    def scratch(self) -> LocalFolder:
        """It is removed at the end, as nothing in a store can tell where it lies."""
        self._scratch = self._scratch or Path(tempfile.mkdtemp(prefix="lorafuse-"))
        return LocalFolder(self._scratch)

    def files(self) -> list[str]:
        return sorted(self._files())

    def _files(self) -> dict[str, Meta]:
        """All complete files. What an earlier run finished and this one does not need is none."""
        before = {run.out: {meta.name: meta for meta in run.out.everything()} for run in self._before}
        used = {file: before[place][file] for file, place in self._at.items()}
        return used | {meta.name: meta for meta in self._staged.everything()}

    def _where(self, file: str) -> CloudPlace:
        return self._at.get(file, self._staged)

    def hash(self, file: str) -> FileHash:
        return hash_file(CloudFolder(self._where(file)), file)

    def shapes(self, file: str) -> tuple[int, dict[str, tuple[int, ...]]]:
        """Of the header alone, before a hole of the size of the rest: the reference implementation reads no
        more of it."""
        place = self._where(file)
        nbytes = place.head(file).nbytes
        with tempfile.NamedTemporaryFile(prefix="lorafuse-", suffix=".safetensors") as local:
            start = bytes(place.get_range(file, 0, min(8, nbytes)))
            n_header = min(int.from_bytes(start, "little"), nbytes - len(start))
            local.write(start)
            if n_header > 0:
                local.write(place.get_range(file, len(start), len(start) + n_header))
            local.truncate(nbytes)
            local.flush()
            return read_shapes(Path(local.name), file)

    def record(self, written: Written, measures: dict[str, Measures]) -> None:
        self._lock.check()
        if self._attempt:
            meta = self._staged.head(written.file)
            if meta.nbytes != written.nbytes:
                raise StorageError(
                    f"{shown(self._staged / written.file)}: has {meta.nbytes} bytes, {written.nbytes} were "
                    "sent."
                )
            shard = FinishedShard(written, measures)
            put_done(self._own, shard, meta.e_tag)
            self.finished = {**self.finished, written.file: shard}

    def give_away(self, file: str) -> None:
        raise AssertionError("a result in a store goes nowhere else")

    def finished_file(self, file: str) -> FolderFile:
        return FolderFile(CloudFolder(self._out if self._committed else self._where(file)), file)

    def take(self, file: str, other: FinishedFile, how: str) -> None:
        if how not in ("auto", "copy"):
            raise StorageError(
                f"{shown(self._staged / file)}: cannot be a {how}: object stores have copies; --share auto "
                "takes what there is."
            )
        source = other.folder if isinstance(other, FolderFile) else None
        if isinstance(source, CloudFolder) and source.place.root == self._out.root:
            assert isinstance(other, FolderFile)
            nbytes = source.place.head(other.file).nbytes
            source.place.copy(other.file, self._staged, file, nbytes)
        else:
            self.put(file, other.chunks())

    def space(self) -> None:
        """Nobody can tell."""

    def commit(self) -> None:
        with UNINTERRUPTED:
            self._lock.renew()
            refuse_filled(self._out, self._overwrite)
            files = self._files()
            put_moving(self._own, files)
            old = [meta.name for meta in files_at(self._out)]
            self._out.delete(sorted(old, key=lambda name: name not in LAST))
            with ThreadPoolExecutor(N_COPIES, "commit") as pool:
                list(pool.map(self._copy, [meta for name, meta in files.items() if name not in LAST]))
            for name in LAST:
                self._copy(files[name])
            self._committed = True
            UNINTERRUPTED.forget()

    def _copy(self, meta: Meta) -> None:
        self._lock.check()
        self._where(meta.name).copy(meta.name, self._out, meta.name, meta.nbytes)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raises OutDirError in place of an error that comes from what another run did."""
        try:
            if isinstance(error, FileNotFoundError):
                self._refuse_taken_over(error)
            if self._lock.is_held or not self._lock.is_known:
                self._leave(error)
        except (StorageError, OSError):
            pass  # the error that led here is the one to tell of; the next run removes what is left
        finally:
            if self._scratch:
                shutil.rmtree(self._scratch, ignore_errors=True)
            self._lock.release()

    def _refuse_taken_over(self, error: FileNotFoundError) -> None:
        try:
            self._lock.renew()
        except OutDirError as e:
            raise e from error

    def _leave(self, error: BaseException | None) -> None:
        """Keep what can be resumed, remove the rest."""
        own = read_run(self._own)
        if not self._committed:
            take_back(self._out, own)
        if self.finished and leaves_work(error) and not self._committed:
            unfinished = [meta.name for meta in own.objects if _is_unfinished(meta.name, own)]
            own.place.delete(unfinished)
        else:
            for run in (*self._before, own):  # what says that it is committed goes last
                run.discard()


def _is_unfinished(name: str, run: Run) -> bool:
    folder, _, file = name.partition("/")
    return folder == OUT and file not in run.record.finished


def leftovers(out: CloudPlace, hidden: CloudPlace) -> list[Run]:
    """What runs that were cut off left, without what is only to be cleaned up. Raises StorageError."""
    hidden.delete(clocks_in(hidden))
    left = runs_in(hidden)
    committed = next((run for run in left if _is_complete(out, run)), None)
    if committed:
        for run in (*(run for run in left if run is not committed), committed):
            run.discard()
        return []
    for run in left:
        take_back(out, run)
    return left


def _is_complete(out: CloudPlace, run: Run) -> bool:
    """Whether a commit got as far as its last file, and only has to be cleaned up after."""
    if run.moved is None:
        return False
    with suppress(FileNotFoundError):
        return out.head(RECEIPT).modified >= run.moved
    return False


def take_back(out: CloudPlace, run: Run) -> None:
    """Undo what a commit that was cut off began: its files lie where they were made too. What was there
    before is older than the commit, by the store's clock."""
    if run.moved:
        names = {*run.moving}
        copied = [meta.name for meta in files_at(out) if meta.name in names and meta.modified >= run.moved]
        out.delete(sorted(copied, key=lambda name: name not in LAST))
        run.place.delete([MOVING])
