"""Where a result is made, and how it appears: the twin of Folder.

Nothing is visible under its final name before it is complete. An equal run takes over the files that a run
finished before it was cut off.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from lorafuse.arithmetic.measure import Measures
from lorafuse.events import OnEvent
from lorafuse.files.folder import FileHash, Folder
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_writer import OutFile
from lorafuse.merge.destination import Written
from lorafuse.outdir.journal import Attempt, FinishedShard


@dataclass(frozen=True)
class Space:
    """What there is room for. `unfinished_nbytes` are taken by files that a failed run removes. None: nobody
    can tell, or nothing limits it."""

    free_nbytes: int | None
    block_nbytes: int = 1
    n_files: int | None = None
    file_nbytes: int | None = None
    unfinished_nbytes: int = 0


@dataclass(frozen=True, order=True)
class Part:
    """Which worker makes some of a result's files, counted from 0, and how many workers make all of them. In
    names of files: 2of4."""

    index: int
    of: int

    @classmethod
    def named(cls, name: str) -> "Part":
        index, _, of = name.partition("of")
        return cls(int(index), int(of))

    def __str__(self) -> str:
        return f"{self.index}of{self.of}"

    @property
    def in_words(self) -> str:
        return f"part {self.index} of {self.of}"


@dataclass(frozen=True)
class Left:
    """A piece of what a run that was cut off left. `what` it is: a "finished" file of weights, which the same
    command uses; an "unfinished" file; the "journal", which says which are finished; the "lock"; a file of
    the "base" that was streamed. `name`: below where the result is made. `age_s`: seconds since it was
    written, by this machine's clock. `holder`: who has the lock."""

    what: str
    name: str
    nbytes: int
    age_s: float
    holder: str = ""


class FinishedFile(Protocol):
    """A complete file of a result, which other results may take. Errors of the file system pass through."""

    local_path: Path | None  # where it can be linked to

    def hash(self) -> FileHash: ...

    def chunks(self) -> Iterator[bytes]: ...


class OutDir(Protocol):
    """A context in which this run alone makes a result. What was made can be resumed when it is left with an
    I/O error or an interruption; otherwise nothing is left but what was committed.

    `name` is the result's, for messages, `place` that of where it is made. `finished`: the shards that a run
    which was cut off has left, by file.
    """

    name: str
    place: str

    @property
    def finished(self) -> Mapping[str, FinishedShard]: ...

    def __enter__(self) -> Self:
        """Raises HeldError when another run holds the result, OutDirError when it may not be written."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...

    def create(self, file: str, nbytes: int) -> OutFile:
        """A file that is to have `nbytes`, to be written in pieces."""

    def put(self, file: str, chunks: Iterable[bytes]) -> None:
        """A small file, which may lie in a sub-folder, durable at once."""

    def scratch(self) -> LocalFolder:
        """A folder of this machine for what is needed while the result is made. What lies in it is there for
        a run that goes on, and is removed with the result's place."""

    def files(self) -> list[str]:
        """The names of all files that are complete, sorted."""

    def hash(self, file: str) -> FileHash: ...

    def shapes(self, file: str) -> tuple[int, dict[str, tuple[int, ...]]]:
        """Size in bytes of a safetensors file, and the shapes that the format's reference implementation
        reads from it. Raises ResultError for a file that it cannot read."""

    def record(self, written: Written, measures: dict[str, Measures]) -> None:
        """A shard is complete, and need not be made again. Called by a thread beside the others, one at a
        time."""

    def give_away(self, file: str) -> None:
        """A shard that is recorded lies elsewhere now: remove it, and remember that it is complete."""

    def finished_file(self, file: str) -> FinishedFile:
        """A complete file, for other results; under its final name once it is committed."""

    def take(self, file: str, other: FinishedFile, how: str) -> None:
        """Get a file from another result, shared as `how` says (sharing.SHARE_CHOICES). Raises
        FileNotFoundError when it is gone."""

    def space(self) -> Space | None:
        """None where nobody can tell."""

    def commit(self) -> None:
        """Give the result its name, in place of what is there if that is to be overwritten. Raises
        OutDirError when another run was first."""


class OutDirKind(Protocol):
    """A kind of place for results: a module with these functions. Names are as users give them."""

    def check_out_dir(self, out_dir: str, inputs: Iterable[Folder], *, overwrite: bool) -> None:
        """Raises OutDirError unless the result may be written: absent or empty, or overwritten, and apart
        from the inputs."""

    def open_out_dir(
        self,
        out_dir: str,
        plan_id: str,
        attempt: Attempt | None = None,
        *,
        overwrite: bool = False,
        restart: bool = False,
        on_event: OnEvent = ...,
    ) -> OutDir:
        """The place for a result. With an `attempt` it goes on from what an equal one has finished, unless
        `restart`."""

    def held_nbytes(self, sizes: Sequence[int], ckpt: Folder) -> int:
        """Host bytes that writing results takes, beside what reading from `ckpt` does. `sizes`: of the
        largest file of each."""

    def clean_up(self, out_dir: str) -> None:
        """Remove what a run left that was killed when its result had its name already."""

    def left_nbytes(self, out_dirs: Iterable[str]) -> int:
        """What runs for these that were cut off left, and the next runs use or remove."""

    def left(self, out_dir: str) -> list[Left]:
        """The same of one result, piece by piece, and the lock of a run that may be at work."""

    def space_of(self, out_root: str) -> Space | None:
        """What there is room for below a directory that may not be there yet."""


@runtime_checkable
class SharedKind(Protocol):
    """What a kind of place has besides where several workers may make one result, each some of its files."""

    def open_part(
        self,
        out_dir: str,
        plan_id: str,
        attempt: Attempt,
        part: Part,
        *,
        overwrite: bool = False,
        restart: bool = False,
        on_event: OnEvent = ...,
    ) -> OutDir:
        """Where a worker makes the files of a part. Its `commit` leaves them for whoever opens the whole; so
        do I/O errors and interruptions. Entering it raises HeldError while another run makes the part or the
        whole, OutDirError when other parts are of another attempt or division, unless `restart`."""

    def open_whole(
        self,
        out_dir: str,
        plan_id: str,
        attempt: Attempt,
        files: Collection[str],
        *,
        overwrite: bool = False,
        on_event: OnEvent = ...,
    ) -> OutDir:
        """`open_out_dir` of a result whose `files` the parts have made. Entering it raises StorageError when
        a file is not there or is not what its worker wrote; then the parts keep theirs. Raises HeldError
        while a part is made."""

    def has_parts(self, out_dir: str) -> bool:
        """Whether workers have made parts of the result, or are at it, as far as this machine sees."""

    def files_of_whole(self, out_dir: str, attempt: Attempt) -> set[str]:
        """The files that an equal run of the whole has taken from the parts already."""
