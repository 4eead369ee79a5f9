"""Results in directories of this machine. A result is made in a hidden directory until it becomes OUT_DIR.

`<hidden>/out` becomes OUT_DIR (`commit.py` says where it lies); `<hidden>/journal.jsonl` lists its finished
shards; `<hidden>/base` has files of a base that is streamed. When a run is cut off, the next run of the same
command takes the hidden directory over, under a name of its own, and goes on. The checks of OUT_DIR itself
are here too.
"""

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from lorafuse.arithmetic.measure import Measures
from lorafuse.errors import OutDirError, listed, shown
from lorafuse.events import OnEvent
from lorafuse.files.folder import FileHash
from lorafuse.files.hashing import hash_file
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.sharing import share_file
from lorafuse.merge.destination import Written
from lorafuse.outdir.commit import OUT, StagingPlace, other_name
from lorafuse.outdir.folder_file import FolderFile
from lorafuse.outdir.interrupts import UNINTERRUPTED
from lorafuse.outdir.journal import Attempt, FinishedShard, Journal, Record, fsync_dir, read_journal
from lorafuse.outdir.local_file import LocalOutFile
from lorafuse.outdir.local_space import space_below
from lorafuse.outdir.out_dir import FinishedFile, Part, Space
from lorafuse.outdir.parts import PartsLeft, is_whole, refuse_missing, refuse_other_parts
from lorafuse.outdir.read_back import read_shapes
from lorafuse.outdir.resume import goes_on, leaves_work

SCRATCH = "base"


class LocalOutDir:
    """A context in which this run alone writes OUT_DIR: `path` is the directory to fill, `commit` gives it
    its name.

    With an `attempt` it goes on from what an equal one has finished, `finished`, and from what workers made
    in parts; it keeps what the next can go on from if it ends with an I/O error or an interruption. Without,
    and after any other error, nothing is left. `wanted`: the files that have to be finished already. `part`:
    what this run makes of OUT_DIR, if not all.

    Raises HeldError when another run holds OUT_DIR; OutDirError when an attempt with other settings could be
    resumed and `restart` does not say to discard it, or when OUT_DIR was filled meanwhile.
    """

    def __init__(
        self,
        out_dir: Path,
        plan_id: str,
        attempt: Attempt | None = None,
        *,
        overwrite: bool = False,
        restart: bool = False,
        on_event: OnEvent = lambda event: None,
        wanted: Collection[str] = (),
        part: Part | None = None,
    ) -> None:
        self.name = os.fspath(out_dir)
        self._out_dir, self._attempt, self._overwrite, self._restart = out_dir, attempt, overwrite, restart
        self._on_event, self._wanted = on_event, wanted
        self._place = replace(StagingPlace.of(out_dir), part=part)
        self._lock = self._place.run_lock(out_dir)
        self._journal: Journal | None = None
        self._committed = self._is_part_done = False
        self._moving: list[str] = []
        self.finished: dict[str, FinishedShard] = {}
        self._folder = self._place.new_folder(plan_id)
        self.path = self._folder / OUT
        self.place = str(self.path)

    def __enter__(self) -> Self:
        self._place.make_home()
        self._lock.acquire()
        try:
            self._open()
        except BaseException as e:
            if isinstance(e, OSError) and e.filename is None:
                e.filename = os.fspath(self._out_dir)
            self.__exit__(type(e), e, None)
            raise
        return self

    def _open(self) -> None:
        if self._place.part and self._attempt and not self._restart:
            begun = self._place.parts().items()
            others = {part: map(read_journal, place.own_folders()) for part, place in begun}
            refuse_other_parts(self.name, self._place.part, others, self._attempt)
        left = self._leftovers()
        self._place.refuse_filled(self.name, overwrite=self._overwrite)
        taken = next((folder for folder, record in left.items() if self._goes_on(record)), None)
        for folder in left:
            if folder != taken:
                self._discard(folder)
        parts = self._parts_left()
        if taken is None:
            self._folder.mkdir(0o700)
            self.path.mkdir()  # by the umask, as OUT_DIR is to be
        else:
            os.rename(taken, self._folder)  # of two runs that no lock keeps apart, one has it
            self._folder.chmod(0o700)
            self._keep_whole(left[taken], parts)
            self._clear()
        self.finished |= self._whole_of(parts)
        if self._attempt:
            self._journal = Journal(self._folder, self._attempt, self.finished)
            fsync_dir(self._place.home)
        parts.move_to(self.path)
        for folder in parts.folders:
            self._discard(folder)

    def _parts_left(self) -> PartsLeft:
        """What workers have made of this result, each some of its files."""
        folders = [folder for place in self._place.parts().values() for folder in place.own_folders()]
        left = {folder: read_journal(folder) for folder in (() if self._place.part else folders)}
        return PartsLeft.of(left, [folder for folder, record in left.items() if self._goes_on(record)])

    def _keep_whole(self, record: Record, parts: PartsLeft) -> None:
        """Keep of what is finished the files that still are what the journal says."""
        for file, shard in record.finished.items():
            if file in parts.found and not (self.path / file).exists():
                continue  # on its way here when the run was cut off
            if shard.elsewhere or self._is_whole(shard.written):
                self.finished[file] = shard
                parts.leave(file)

    def _whole_of(self, parts: PartsLeft) -> Mapping[str, FinishedShard]:
        """The files of parts that are what their workers wrote. Raises StorageError where one that is wanted
        is missing."""
        for file in parts.broken():
            self._warn(f"{shown(file)}: is not what its worker wrote.")
        refuse_missing(self.name, self._wanted, {*self.finished, *parts.found})
        return parts.finished

    def clean_up(self) -> None:
        """Remove what is only to be cleaned up, and change nothing else. Raises HeldError."""
        self._lock.acquire()
        try:
            self._leftovers()
        finally:
            self._lock.release()

    def _leftovers(self) -> dict[Path, Record]:
        """What runs that were cut off left, without what is only to be cleaned up."""
        left, own = {}, self._place.own_folders()
        others = [folder for folder in self._place.folders() if folder not in own]
        if others:
            self._warn(
                f"{listed(others)}: is left alone, since others than this user could have written to it; "
                "remove it if nobody needs it."
            )
        for folder in own:
            record = read_journal(folder)
            self._place.restore(folder, record.moving)
            if self._place.is_complete(folder):
                self._discard(folder)
            else:
                left[folder] = record
        return left

    def _discard(self, folder: Path) -> None:
        """Remove a hidden directory. Where no lock keeps runs apart another one may be at work in it, which
        the new name stops."""
        garbage = other_name(folder)
        with suppress(FileNotFoundError):
            os.rename(folder, garbage)
        shutil.rmtree(garbage, ignore_errors=True)

    def _goes_on(self, record: Record) -> bool:
        return goes_on(self.name, record, self._attempt, restart=self._restart, warn=self._warn)

    def _is_whole(self, written: Written) -> bool:
        """Whether a finished shard still is what the journal says. Reads it."""
        whole = is_whole(self.path, written)
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
        for path in self.path.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def create(self, file: str, nbytes: int) -> LocalOutFile:
        return LocalOutFile(self.path / file)

    def put(self, file: str, chunks: Iterable[bytes]) -> None:
        path = self.path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())

    def scratch(self) -> LocalFolder:
        folder = self._folder / SCRATCH
        folder.mkdir(exist_ok=True)
        return LocalFolder(folder)

    def files(self) -> list[str]:
        files = (path for path in self.path.rglob("*") if path.is_file() and path.suffix != ".part")
        return sorted(path.relative_to(self.path).as_posix() for path in files)

    def hash(self, file: str) -> FileHash:
        return hash_file(LocalFolder(self.path), file)

    def shapes(self, file: str) -> tuple[int, dict[str, tuple[int, ...]]]:
        return read_shapes(self.path / file, file)

    def finished_file(self, file: str) -> FolderFile:
        return FolderFile(LocalFolder(self._out_dir if self._committed else self.path), file)

    def take(self, file: str, other: FinishedFile, how: str) -> None:
        if other.local_path:
            share_file(other.local_path, self.path / file, how)
        else:
            self.put(file, other.chunks())

    def space(self) -> Space:
        unfinished = sum(path.stat().st_blocks * 512 for path in self.path.glob("*.part"))
        return replace(space_below(self.path), unfinished_nbytes=unfinished)

    def record(self, written: Written, measures: dict[str, Measures]) -> None:
        """A shard is finished: it is synced and has its name."""
        if self._journal:
            fsync_dir(self.path)
            shard = FinishedShard(written, measures)
            self._journal.finished(shard)
            self.finished[written.file] = shard

    def give_away(self, file: str) -> None:
        if self._journal:
            shard = replace(self.finished[file], elsewhere=True)
            self._journal.finished(shard)
            self.finished[file] = shard
        (self.path / file).unlink()

    def commit(self) -> None:
        """Sync the directory and give it its name, in place of what is there if that is to be overwritten; a
        part stays for whoever commits the whole."""
        if self._place.part:
            self._is_part_done = True
            return
        with UNINTERRUPTED:
            for folder, _, _ in os.walk(self.path):
                fsync_dir(Path(folder))
            if self._place.inside:
                self._place.refuse_filled(self.name, overwrite=self._overwrite)
                self._moving = os.listdir(self.path)
                if self._journal:
                    self._journal.moving(self._moving)
                self._place.move_in(self._folder)
            else:
                self._place.commit(self._folder, overwrite=self._overwrite)
            self._committed = True
            UNINTERRUPTED.forget()
            fsync_dir(self._place.home)
            fsync_dir(self._folder)  # after it: where it came from may forget it once where it went knows it

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        taken = isinstance(error, OSError) and error.errno == errno.ENOENT and not self._folder.exists()
        self._leave(error)
        if taken:
            raise OutDirError(
                f"{shown(self._out_dir)}: another run took over what this one had begun."
            ) from error

    def _keeps(self, error: BaseException | None) -> bool:
        """Whether what is finished stays for a further run."""
        return bool(self.finished) and not self._committed and (self._is_part_done or leaves_work(error))

    def _leave(self, error: BaseException | None) -> None:
        """Keep what can be resumed, remove the rest."""
        try:
            if self._journal:
                self._journal.close()
            if self._folder.exists() and not self._committed:
                self._place.restore(self._folder, self._moving)
            if self._folder.exists() and self._keeps(error):
                self._clear()
            else:
                shutil.rmtree(self._folder, ignore_errors=True)
        except OSError:
            pass  # the error that led here is the one to tell of; the next run removes what is left
        finally:
            self._lock.release()
