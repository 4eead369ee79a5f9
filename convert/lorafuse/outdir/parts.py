"""One result that several workers make: each makes some of its files, with a journal of its own. On this
machine's file system each has a hidden directory, and the run that commits moves the files into its own."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lorafuse.errors import OutDirError, StorageError, listed, shown
from lorafuse.files.hashing import hash_file
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_file import FormatError
from lorafuse.merge.destination import Written
from lorafuse.outdir.commit import OUT
from lorafuse.outdir.journal import Attempt, FinishedShard, Record, fsync_dir
from lorafuse.outdir.out_dir import Part
from lorafuse.outdir.resume import difference


@dataclass
class PartsLeft:
    """The hidden directories that parts have left, and what of them belongs to a run of the whole."""

    folders: list[Path]
    found: dict[str, tuple[Path, FinishedShard]] = field(default_factory=dict)

    @classmethod
    def of(cls, left: Mapping[Path, Record], own: Iterable[Path]) -> "PartsLeft":
        """Of all directories that are `left`, the files of those that are the run's `own`."""
        parts = cls(list(left))
        for folder in own:
            for file, shard in left[folder].finished.items():
                if (folder / OUT / file).exists():
                    parts.found[file] = (folder / OUT, shard)
        return parts

    def leave(self, file: str) -> None:
        """The whole has it already."""
        self.found.pop(file, None)

    def broken(self) -> Iterator[str]:
        """The files that are not what their workers wrote, which is asked of all at once, since they may be
        all of a large model. They are not taken."""
        found = list(self.found.items())
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "check") as executor:
            whole = list(executor.map(lambda item: is_whole(item[1][0], item[1][1].written), found))
        for (file, _), as_written in zip(found, whole, strict=True):
            if not as_written:
                del self.found[file]
                yield file

    @property
    def finished(self) -> dict[str, FinishedShard]:
        return {file: shard for file, (_, shard) in self.found.items()}

    def move_to(self, path: Path) -> None:
        """Into the directory of the whole, whose journal has them. A run that is cut off here finds in its
        journal what to go on with."""
        for file, (folder, _) in self.found.items():
            os.rename(folder / file, path / file)
        for folder in {path, *(folder for folder, _ in self.found.values())}:
            fsync_dir(folder)


def is_whole(folder: Path, written: Written) -> bool:
    """Whether a file in a directory is what was written. Reads it."""
    try:
        return hash_file(LocalFolder(folder), written.file) == (written.nbytes, written.sha256)
    except (FileNotFoundError, FormatError):
        return False


def refuse_missing(out_dir: str, wanted: Collection[str], finished: Collection[str]) -> None:
    """Raises StorageError, so that what is finished stays."""
    missing = [file for file in wanted if file not in finished]
    if missing:
        raise StorageError(
            f"{shown(out_dir)}: {len(missing)} of {len(wanted)} files of weights are not finished: "
            f"{listed(missing)}. Run the workers again that make them, then --commit."
        )


def refuse_other_parts(
    out_dir: str, own: Part, others: Mapping[Part, Iterable[Record]], attempt: Attempt
) -> None:
    """Raises OutDirError when `others`, which were begun, are parts of another result than `own`, or those of
    a division between another number of workers."""
    for part, records in others.items():
        if part.of != own.of:
            raise OutDirError(
                f"{shown(out_dir)}: is being made in {part.of} parts, not in {own.of}. Give the same "
                "--of to every worker, or --restart to every worker, to discard what is finished."
            )
        for record in records if part != own else ():
            if record.attempt and record.attempt != attempt:
                raise OutDirError(
                    f"{shown(out_dir)}: {part.in_words} is made of something else: "
                    f"{difference(record.attempt, attempt)}. Give the same command to every worker, or "
                    "--restart to every worker, to discard what is finished."
                )
