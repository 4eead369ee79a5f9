"""The directory that a result is made in until it becomes OUT_DIR, what is left of it when a run is cut off,
and the checks of OUT_DIR itself.

`<hidden>/out` is what becomes OUT_DIR (`place.py` says where it lies), `<hidden>/journal.jsonl` says which of
its shards are finished. The next run of the same command takes the directory over, under a name of its own,
and goes on.
"""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lorafuse.arithmetic.measure import Measures
from lorafuse.errors import HeldError, OutDirError, StorageError, listed, shown
from lorafuse.events import OnEvent
from lorafuse.files.folder import Folder
from lorafuse.files.hashing import hash_file
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_file import FormatError
from lorafuse.merge.destination import Written
from lorafuse.outdir.commit import OUT, StagingPlace
from lorafuse.outdir.interrupts import UNINTERRUPTED
from lorafuse.outdir.journal import Attempt, FinishedShard, Journal, Record, fsync_dir, read_journal
from lorafuse.outdir.lock import Lock
from lorafuse.outdir.output import Output
from lorafuse.planning.plan import Plan, PlannedShard


def check_out_dir(out_dir: Path, inputs: Sequence[Folder], *, overwrite: bool) -> None:
    """Raises OutDirError unless OUT_DIR may be written: absent or empty, or overwritten, and apart from the
    inputs."""
    real_out = Path(os.path.realpath(out_dir))
    for path in (folder.local_path for folder in inputs):
        if path is None:
            continue
        real_in = Path(os.path.realpath(path))
        if real_out == real_in or real_in in real_out.parents or real_out in real_in.parents:
            raise OutDirError(
                f"{shown(out_dir)}: is, contains or lies inside the input {shown(path)}; choose another "
                "directory."
            )
    if not os.path.lexists(out_dir):
        return
    if not out_dir.is_dir():
        raise OutDirError(f"{shown(out_dir)}: exists and is not a directory.")
    if overwrite:
        return
    place = StagingPlace.of(out_dir)
    if (
        not place.lock.exists() and not place.folders()
    ):  # else it is seen later what a run that was cut off got done
        _refuse_filled(place, out_dir, overwrite)


def _refuse_filled(place: StagingPlace, out_dir: Path, overwrite: bool) -> None:
    if not overwrite and place.filled:
        raise OutDirError(
            f"{shown(out_dir)}: exists and is not empty; --overwrite replaces it once the new one is "
            "complete."
        )


def clean_up(out_dir: Path) -> None:
    """Remove what a run left that was killed when its result had its name already."""
    place = StagingPlace.of(out_dir)
    if place.lock.exists() or place.folders():
        with suppress(HeldError):
            Staging(out_dir, plan_id="").clean_up()


def left_nbytes(out_dirs: Iterable[Path]) -> int:
    """What runs for these that were cut off left on disk, and the next ones use or remove. A file that has a
    name elsewhere too stays, and does not count."""
    folders = [folder for out_dir in out_dirs for folder in StagingPlace.of(out_dir).folders()]
    found = [path.lstat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    n_names = Counter((one.st_dev, one.st_ino) for one in found)
    sizes = {
        (one.st_dev, one.st_ino): one.st_blocks * 512
        for one in found
        if n_names[one.st_dev, one.st_ino] == one.st_nlink
    }
    return sum(sizes.values())


class Staging:
    """A context in which this run alone writes OUT_DIR: `path` is the directory to fill, `commit` gives it
    its name.

    With an `attempt` it goes on from what an equal one has finished, `finished`, and keeps what the next can
    go on from if it ends with an I/O error or an interruption. Without, and after any other error, nothing is
    left.

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
    ) -> None:
        self._out_dir, self._attempt, self._overwrite, self._restart = out_dir, attempt, overwrite, restart
        self._on_event = on_event
        self._place = StagingPlace.of(out_dir)
        self._lock = Lock(self._place.lock, out_dir)
        self._folder = self._place.new_folder(plan_id)
        self._journal: Journal | None = None
        self._committed = False
        self._moving: list[str] = []
        self.path = self._folder / OUT
        self.finished: dict[str, FinishedShard] = {}

    def __enter__(self) -> "Staging":
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
        left = self._leftovers()
        _refuse_filled(self._place, self._out_dir, self._overwrite)
        found = next((folder for folder, record in left.items() if self._resumes(record)), None)
        for folder in left:
            if folder != found:
                self._discard(folder)
        if found is None:
            self._folder.mkdir()
            self.path.mkdir()
        else:
            os.rename(found, self._folder)  # of two runs that no lock keeps apart, one has it
            self.finished = left[found].finished
            self.finished = {file: one for file, one in self.finished.items() if self._is_whole(one.written)}
            self._clear()
        if self._attempt:
            self._journal = Journal(self._folder, self._attempt, self.finished)
            fsync_dir(self._place.home)

    def clean_up(self) -> None:
        """Remove what is only to be cleaned up, and change nothing else. Raises HeldError."""
        self._lock.acquire()
        try:
            self._leftovers()
        finally:
            self._lock.release()

    def _leftovers(self) -> dict[Path, Record]:
        """What runs that were cut off left, without what is only to be cleaned up."""
        left = {}
        for folder in self._place.folders():
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
        garbage = self._place.new_folder(folder.name[-17:])
        with suppress(FileNotFoundError):
            os.rename(folder, garbage)
        shutil.rmtree(garbage, ignore_errors=True)

    def _resumes(self, record: Record) -> bool:
        """Whether this run goes on from there; if not, it may be removed."""
        was, now = record.attempt, self._attempt
        if was is None or now is None or self._restart or not record.finished:
            return False
        if was == now:
            return True
        changed = [name for name in was.inputs if name in now.inputs and was.inputs[name] != now.inputs[name]]
        other = [name for name in now.command | was.command if was.command.get(name) != now.command.get(name)]
        if other and not changed:
            them = "; ".join(
                f"{name} was {shown(was.command.get(name))}, is {shown(now.command.get(name))}"
                for name in other
            )
            raise OutDirError(
                f"{shown(self._out_dir)}: a run that was cut off has finished {len(record.finished)} files "
                f"with other settings: {them}. Give its command again to finish it, or --restart to discard "
                "that work."
            )
        why = f"{listed(changed)} changed" if changed else "another version of lorafuse or torch began it"
        self._warn(
            f"{shown(self._out_dir)}: a run that was cut off is not resumed, since {why}; starting over."
        )
        return False

    def _is_whole(self, written: Written) -> bool:
        """Whether a finished shard still is what the journal says. Reads it."""
        try:
            whole = hash_file(LocalFolder(self.path), written.file) == (written.nbytes, written.sha256)
        except (FileNotFoundError, FormatError):
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
        for path in self.path.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def output(self, plan: Plan, elsewhere: Collection[str] = ()) -> Output:
        """Where the plan's tiles go: all but those of finished shards, of which each is put down when it is
        one, and of files that come from `elsewhere`."""

        def record(shard: PlannedShard, written: Written) -> None:
            measures = output.outcome.measures
            self.record(
                written, {step.name: measures[step.name] for step in shard.steps if step.name in measures}
            )

        output = Output(plan, self.path, self._on_event, skip={*self.finished, *elsewhere}, on_shard=record)
        for one in self.finished.values():
            output.outcome.written.append(one.written)
            output.outcome.measures |= one.measures
        if self.finished:
            nbytes = sum(shard.nbytes for shard in plan.shards if shard.file in self.finished)
            self._on_event({"event": "resumed", "n_shards": len(self.finished), "nbytes": nbytes})
        return output

    def record(self, written: Written, measures: dict[str, Measures]) -> None:
        """A shard is finished: it is synced and has its name."""
        if self._journal:
            fsync_dir(self.path)
            one = FinishedShard(written, measures)
            self._journal.finished(one)
            self.finished[written.file] = one

    def commit(self) -> None:
        """Sync the directory and give it its name, in place of what is there if that is to be overwritten."""
        with UNINTERRUPTED:
            for folder, _, _ in os.walk(self.path):
                fsync_dir(Path(folder))
            if self._place.inside:
                _refuse_filled(self._place, self._out_dir, self._overwrite)
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

    def _leave(self, error: BaseException | None) -> None:
        """Keep what can be resumed, remove the rest."""
        resumable = isinstance(error, OSError | StorageError) or not (
            error is None or isinstance(error, Exception)
        )
        try:
            if self._journal:
                self._journal.close()
            if self._folder.exists() and not self._committed:
                self._place.restore(self._folder, self._moving)
            if self._folder.exists() and self.finished and resumable and not self._committed:
                self._clear()
            else:
                shutil.rmtree(self._folder, ignore_errors=True)
        except OSError:
            pass  # the error that led here is the one to tell of; the next run removes what is left
        finally:
            self._lock.release()
