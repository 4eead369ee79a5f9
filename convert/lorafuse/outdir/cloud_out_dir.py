"""Results in an object store, each made below `.NAME.lorafuse/RUN/out/` (`cloud_commit.py` says how it gets
its name).

What another run that was cut off has finished, or a worker for its part, is used where it lies, if its ETag
is that of the file whose hash was taken. A run that lost its lock has a place of its own: it cannot write
into the files of the next.
"""

import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from lorafuse.merge.destination import Written
from lorafuse.outdir.cloud_commit import (
    commit_is_cut_off,
    files_at,
    hidden_of,
    leftovers,
    leftovers_of_part,
    parts_of,
    refuse_filled,
    remove_locks_of_parts,
    take_back,
)
from lorafuse.outdir.cloud_file import CloudOutFile
from lorafuse.outdir.cloud_lock import CloudLock
from lorafuse.outdir.cloud_parts import SMALLEST_PART_NBYTES
from lorafuse.outdir.cloud_runs import OUT, Run, put_attempt, put_done, put_moving, read_run, runs_in
from lorafuse.outdir.commit import LAST
from lorafuse.outdir.folder_file import FolderFile
from lorafuse.outdir.interrupts import UNINTERRUPTED
from lorafuse.outdir.journal import Attempt, FinishedShard, Record
from lorafuse.outdir.out_dir import FinishedFile, Part
from lorafuse.outdir.parts import refuse_missing, refuse_other_parts
from lorafuse.outdir.read_back import read_shapes
from lorafuse.outdir.resume import goes_on, leaves_work

N_COPIES = 8  # at once


class CloudOutDir:
    """A result in the making, or a `part` of it. `wanted`: the files that have to be finished already. See
    OutDir."""

    def __init__(
        self,
        out: CloudPlace,
        attempt: Attempt | None = None,
        *,
        overwrite: bool = False,
        restart: bool = False,
        on_event: OnEvent = lambda event: None,
        wanted: Collection[str] = (),
        part: Part | None = None,
    ) -> None:
        self.name, self._out, self._part, self._wanted = str(out), out, part, wanted
        self._attempt, self._overwrite, self._restart = attempt, overwrite, restart
        self._on_event = on_event
        run = secrets.token_hex(4)
        self._own = hidden_of(out, part).below(run)
        self._staged = self._own.below(OUT)
        self.place = str(self._staged)
        self._lock = run_lock(out, run, part)
        self._before: list[Run] = []  # whose files are used
        self._at: dict[str, CloudPlace] = {}  # where those lie
        self._scratch: Path | None = None
        self._committed = self._is_part_done = False
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
        left = leftovers_of_part(self._out, self._part) if self._part else leftovers(self._out)
        if self._part and self._attempt and not self._restart:
            others = {part: self._records(part) for part in parts_of(self._out)}
            refuse_other_parts(self.name, self._part, others, self._attempt)
        if not (self._part and commit_is_cut_off(self._out)):
            refuse_filled(self._out, self._overwrite)
        before = [run for run in left if self._goes_on(run)]
        for run in left:
            if run not in before:
                run.discard()
        finished: dict[str, FinishedShard] = {}
        for run in before:
            for shard in run.finished():
                finished[shard.written.file] = shard
                self._at[shard.written.file] = run.out
        for file in {file for run in before for file in run.record.finished} - finished.keys():
            again = "its worker wrote" if self._wanted else "was written before; it is made again"
            self._warn(f"{shown(file)}: is not what {again}.")
        self._before, self.finished = before, finished
        refuse_missing(self.name, self._wanted, finished)
        if self._attempt:
            put_attempt(self._own, self._attempt)

    def _records(self, part: Part) -> Iterator[Record]:
        return (run.record for run in runs_in(hidden_of(self._out, part)))

    def _goes_on(self, run: Run) -> bool:
        return goes_on(self.name, run.record, self._attempt, restart=self._restart, warn=self._warn)

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
        if self._part:
            self._lock.renew()
            self._is_part_done = True
            return
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
        if self.finished and not self._committed and (self._is_part_done or leaves_work(error)):
            unfinished = [meta.name for meta in own.objects if _is_unfinished(meta.name, own)]
            own.place.delete(unfinished)
        else:
            for run in (*self._before, own):  # what says that it is committed goes last
                run.discard()
            if not self._part:
                remove_locks_of_parts(self._out)


def _is_unfinished(name: str, run: Run) -> bool:
    folder, _, file = name.partition("/")
    return folder == OUT and file not in run.record.finished


def run_lock(out: CloudPlace, run: str, part: Part | None = None) -> CloudLock:
    """What a run for a result holds, or for a part of it: not beside a run for the whole."""
    name = str(out)

    def whole() -> CloudLock:
        return CloudLock(hidden_of(out), name, run, waits=True)

    def of_part(part: Part) -> CloudLock:
        held = f"another run is making {part.in_words}; wait for it."
        return CloudLock(hidden_of(out, part), name, run, held=held, beside=lambda: [whole()], waits=True)

    if part:
        return of_part(part)
    return CloudLock(hidden_of(out), name, run, beside=lambda: map(of_part, parts_of(out)))
