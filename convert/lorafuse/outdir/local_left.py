"""What runs that were cut off have left on this machine's file system, piece by piece."""

import time
from collections.abc import Iterator
from pathlib import Path

from lorafuse.outdir.commit import OUT, StagingPlace
from lorafuse.outdir.journal import JOURNAL, read_journal
from lorafuse.outdir.out_dir import Left


def left_at(place: StagingPlace) -> Iterator[Left]:
    """Of all runs for an OUT_DIR, and for parts of it."""
    for one in (place, *place.parts().values()):
        for folder in one.own_folders():
            finished = read_journal(folder).finished
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    yield _piece(path, folder, {*finished})


def _piece(path: Path, folder: Path, finished: set[str]) -> Left:
    inside = path.relative_to(folder)
    what = "unfinished" if inside.parts[0] == OUT else "base"
    if inside.parts[0] == OUT and str(inside.relative_to(OUT)) in finished:
        what = "finished"
    elif inside.name.startswith(JOURNAL):
        what = "journal"
    status = path.lstat()
    name = path.relative_to(folder.parent).as_posix()
    return Left(what, name, status.st_blocks * 512, time.time() - status.st_mtime)
