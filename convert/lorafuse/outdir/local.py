"""Directories of this machine, as a kind of place for results: opened, checked, cleaned up after."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lorafuse.errors import HeldError, OutDirError, shown
from lorafuse.events import OnEvent
from lorafuse.files.folder import Folder
from lorafuse.outdir.apart import contents_of, is_around_here, place_of, places_of
from lorafuse.outdir.commit import OUT, StagingPlace
from lorafuse.outdir.journal import Attempt, read_journal
from lorafuse.outdir.local_left import left_at
from lorafuse.outdir.local_space import space_below
from lorafuse.outdir.out_dir import Left, Part, Space
from lorafuse.outdir.staging import LocalOutDir


def open_out_dir(
    out_dir: str,
    plan_id: str,
    attempt: Attempt | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    on_event: OnEvent = lambda event: None,
) -> "LocalOutDir":
    """A directory of this machine. See OutDirKind."""
    return LocalOutDir(
        Path(out_dir), plan_id, attempt, overwrite=overwrite, restart=restart, on_event=on_event
    )


def open_part(
    out_dir: str,
    plan_id: str,
    attempt: Attempt,
    part: Part,
    *,
    overwrite: bool = False,
    restart: bool = False,
    on_event: OnEvent = lambda event: None,
) -> LocalOutDir:
    """Where a worker makes the files of a part. See SharedKind."""
    return LocalOutDir(
        Path(out_dir), plan_id, attempt, part=part, overwrite=overwrite, restart=restart, on_event=on_event
    )


def open_whole(
    out_dir: str,
    plan_id: str,
    attempt: Attempt,
    files: Collection[str],
    *,
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> LocalOutDir:
    """A directory whose `files` workers have made. See SharedKind."""
    return LocalOutDir(Path(out_dir), plan_id, attempt, overwrite=overwrite, on_event=on_event, wanted=files)


def has_parts(out_dir: str) -> bool:
    """Whether workers have made parts of the result. See SharedKind."""
    return bool(StagingPlace.of(Path(out_dir)).parts())


def files_of_whole(out_dir: str, attempt: Attempt) -> set[str]:
    """The files that an equal run of the whole has. See SharedKind."""
    folders = StagingPlace.of(Path(out_dir)).own_folders()
    records = [(folder, read_journal(folder)) for folder in folders]
    return {
        file
        for folder, record in records
        for file in record.finished
        if record.attempt == attempt and (folder / OUT / file).exists()
    }


def check_out_dir(out_dir: str, inputs: Iterable[Folder], *, overwrite: bool) -> None:
    """Raises OutDirError unless OUT_DIR may be written: absent or empty, or overwritten, apart from the
    inputs, and not around the current directory."""
    path_out = Path(out_dir)
    around = place_of(out_dir)
    within = set(around[:1] if path_out.exists() else [])
    if overwrite:  # what is in it goes too
        within.update(contents_of(out_dir))
    for path in (folder.local_path for folder in inputs):
        if path is None or not path.exists():
            continue
        if place_of(path)[0] in around or not within.isdisjoint(places_of(path)):
            raise OutDirError(
                f"{shown(out_dir)}: is, contains or lies inside the input {shown(path)}; choose another "
                "directory."
            )
    if is_around_here(out_dir):
        raise OutDirError(
            f"{shown(out_dir)}: is the current directory, or contains it; choose another directory."
        )
    if not os.path.lexists(out_dir):
        return
    if not path_out.is_dir():
        raise OutDirError(f"{shown(out_dir)}: exists and is not a directory.")
    if overwrite:
        return
    place = StagingPlace.of(path_out)
    # Else it is seen later what a run that was cut off got done.
    if not place.lock.exists() and not place.own_folders():
        place.refuse_filled(out_dir, overwrite=overwrite)


def held_nbytes(sizes: Sequence[int], ckpt: Folder) -> int:
    """The kernel takes what is written."""
    return 0


def clean_up(out_dir: str) -> None:
    """Remove what a run left that was killed when its result had its name already."""
    path = Path(out_dir)
    place = StagingPlace.of(path)
    if place.lock.exists() or place.own_folders():
        with suppress(HeldError, OutDirError):
            LocalOutDir(path, plan_id="").clean_up()


def left_nbytes(out_dirs: Iterable[str]) -> int:
    """What runs for these that were cut off left on disk, and the next ones use or remove. A file that has a
    name elsewhere too stays, and does not count."""
    wholes = [StagingPlace.of(Path(out_dir)) for out_dir in out_dirs]
    places = [place for whole in wholes for place in (whole, *whole.parts().values())]
    folders = [folder for place in places for folder in place.own_folders()]
    files = [path.lstat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    n_names = Counter((file.st_dev, file.st_ino) for file in files)
    sizes = {
        (file.st_dev, file.st_ino): file.st_blocks * 512
        for file in files
        if n_names[file.st_dev, file.st_ino] == file.st_nlink
    }
    return sum(sizes.values())


def left(out_dir: str) -> list[Left]:
    """The same, piece by piece."""
    return list(left_at(StagingPlace.of(Path(out_dir))))


def space_of(out_root: str) -> Space:
    """What there is room for below a directory that may not be there yet."""
    root = Path(out_root)
    return space_below(next(path for path in (root, *root.absolute().parents) if path.exists()))
