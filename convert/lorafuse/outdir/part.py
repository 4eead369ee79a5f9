"""One result on this machine's file system, made by several workers: each makes some of its files, in a
hidden directory with a journal of its own, and the run that commits moves them into its own.

Workers share the lock of the result, so that no other run makes it meanwhile; each part has a lock beside it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Self

from lorafuse.errors import OutDirError, shown
from lorafuse.events import OnEvent
from lorafuse.outdir.commit import StagingPlace
from lorafuse.outdir.journal import Attempt, read_journal
from lorafuse.outdir.lock import Lock
from lorafuse.outdir.out_dir import Part
from lorafuse.outdir.resume import difference, leaves_work
from lorafuse.outdir.staging import LocalOutDir


class LocalPart(LocalOutDir):
    """A context in which this run alone makes the files of a part. What it finished stays when it ends well,
    with an I/O error or an interruption. See SharedKind."""

    def __init__(
        self,
        out_dir: Path,
        plan_id: str,
        attempt: Attempt,
        part: Part,
        *,
        overwrite: bool,
        restart: bool,
        on_event: OnEvent,
    ) -> None:
        super().__init__(out_dir, plan_id, attempt, overwrite=overwrite, restart=restart, on_event=on_event)
        self._whole_lock = Lock(self._place.lock, out_dir, shared=True)
        self._place = replace(self._place, part=f"{part.index}of{part.of}")
        self._lock = Lock(self._place.lock, out_dir, what=f"{part} of it")
        self._lies_in(self._place.new_folder(plan_id))
        self._part, self._of, self._is_done = part, attempt, False

    def __enter__(self) -> Self:
        self._place.make_home()
        self._whole_lock.acquire()
        try:
            return super().__enter__()
        except BaseException:
            self._whole_lock.release()
            raise

    def _open(self) -> None:
        if not self._restart:
            for place in self._place.parts():
                self._refuse_other(place)
        super()._open()

    def _refuse_other(self, place: StagingPlace) -> None:
        """Raises OutDirError when a part was begun for another result, or is one of another number."""
        index, of = map(int, place.part.split("of"))
        if of != self._part.of:
            raise OutDirError(
                f"{shown(self.name)}: is being made in {of} parts, not in {self._part.of}; give --of {of}, "
                "or --restart to every worker, to discard what is finished."
            )
        for record in map(read_journal, place.own_folders() if index != self._part.index else ()):
            if record.attempt and record.attempt != self._of:
                raise OutDirError(
                    f"{shown(self.name)}: {Part(index, of)} is made of something else: "
                    f"{difference(record.attempt, self._of)}. Give the same command to every worker, or "
                    "--restart to every worker, to discard what is finished."
                )

    def commit(self) -> None:
        """The part is finished, for the run that commits the whole."""
        self._is_done = True

    def _keeps(self, error: BaseException | None) -> bool:
        return bool(self.finished) and (self._is_done or leaves_work(error))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._whole_lock.release()
