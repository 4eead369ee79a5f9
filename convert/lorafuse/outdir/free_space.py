"""Whether the file system has room for a result, asked before the first byte; and what is missing when it
fills up all the same."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lorafuse.errors import StorageError, shown
from lorafuse.files.folder import Folder
from lorafuse.files.names import scheme_of
from lorafuse.outdir.out_dir import Space
from lorafuse.outdir.output import Output
from lorafuse.planning.plan import Plan, PlannedShard

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The index and the receipt have some 500 bytes for each weight; config.json and the journal are small.
NBYTES_PER_WEIGHT = 1000
FIXED_NBYTES = 200_000
N_FIXED_FILES = 8


def check_room(
    outputs: Sequence[Output], side_files: Sequence[tuple[Folder, str]], nbytes_beside: int = 0
) -> None:
    """Raises StorageError unless there is room for what the outputs lack and for the files that are copied:
    pairs of a folder and a name in it. `nbytes_beside`: what lies there for a while."""
    space, place = outputs[0].out_dir.space(), shown(common_place(outputs))
    if space is None:
        return
    needed, free = _needed(outputs, side_files) + nbytes_beside, space.free_nbytes
    if free is not None and needed > free:
        raise StorageError(
            f"{place}: {needed} bytes are needed and {free} are free; {needed - free} are missing. "
            f"{_way_on(outputs)}"
        )
    lacking = [shard for output in outputs for shard in output.lacking]
    n_files = len(lacking) + len(side_files) + N_FIXED_FILES * len(outputs)
    if space.n_files is not None and n_files > space.n_files:
        raise StorageError(
            f"{place}: {n_files} files are to be made, and the file system has room for {space.n_files}."
        )
    largest = max((shard.file_nbytes for shard in lacking), default=0)
    if space.file_nbytes is not None and largest > space.file_nbytes:
        raise StorageError(
            f"{place}: a file of {largest} bytes is to be made, and this process may make them of "
            f"{space.file_nbytes} (ulimit -f); raise that, or lower --max-shard-size."
        )


@contextmanager
def told_when_full(outputs: Sequence[Output], side_files: Sequence[tuple[Folder, str]]) -> Iterator[None]:
    """Raises StorageError, with what is missing, in place of an OSError that says that there is no room, or
    that says not where."""
    try:
        yield
    except OSError as e:
        where, way_on = shown(common_place(outputs)), _way_on(outputs)
        if e.errno not in FULL:
            if e.errno is None or e.filename is not None:
                raise
            raise StorageError(f"{where}: writing failed: {e.strerror}. {way_on}") from e
        for output in outputs:
            output.close()
        needed, missing = _needed(outputs, side_files), _missing(outputs, side_files)
        if e.errno == errno.ENOSPC and missing > 0:
            what = f"the file system is full; {missing} bytes more than it has are needed"
        else:
            what = f"{e.strerror}; {needed} bytes are still to be written"
        raise StorageError(f"{where}: {what}. {way_on}") from e


def planned_nbytes(plan: Plan, side_files: Sequence[tuple[Folder, str]], space: Space | None) -> int:
    """Bytes that a result takes on disk, with everything beside its weights."""
    return _on_disk([plan], plan.shards, side_files, space)


def _needed(outputs: Sequence[Output], side_files: Sequence[tuple[Folder, str]]) -> int:
    """Bytes, each file rounded up to whole blocks."""
    lacking = [shard for output in outputs for shard in output.lacking]
    return _on_disk([output.plan for output in outputs], lacking, side_files, outputs[0].out_dir.space())


def _on_disk(
    plans: Sequence[Plan],
    shards: Sequence[PlannedShard],
    side_files: Sequence[tuple[Folder, str]],
    space: Space | None,
) -> int:
    block = space.block_nbytes if space else 1
    fixed = [FIXED_NBYTES + NBYTES_PER_WEIGHT * sum(1 for _ in plan.steps) for plan in plans]
    side = [folder.facts(name).nbytes for folder, name in side_files]
    sizes = (*fixed, *(shard.file_nbytes for shard in shards), *side)
    return sum(-(-nbytes // block) * block for nbytes in sizes)


def _missing(outputs: Sequence[Output], side_files: Sequence[tuple[Folder, str]]) -> int:
    """Bytes that are needed beyond what is free, and what unfinished files will leave; 0 where nobody can
    tell."""
    spaces = {output.out_dir.place: output.out_dir.space() for output in outputs}
    known = [space for space in spaces.values() if space and space.free_nbytes is not None]
    if not known or known[0].free_nbytes is None:
        return 0
    return (
        _needed(outputs, side_files) - known[0].free_nbytes - sum(space.unfinished_nbytes for space in known)
    )


def _way_on(outputs: Sequence[Output]) -> str:
    n_finished = len(
        {(output.out_dir.place, file.file) for output in outputs for file in output.outcome.written}
    )
    kept = f"; it goes on after the {n_finished} files that are finished" if n_finished else ""
    return f"Give the same command again when that is mended{kept}."


def common_place(outputs: Sequence[Output]) -> str:
    """Where all of them are made."""
    places = [output.out_dir.place for output in outputs]
    scheme = scheme_of(places[0])  # a batch's results are all of one kind
    prefix = f"{scheme}://" if scheme else ""
    return prefix + os.path.commonpath([place.removeprefix(prefix) for place in places])
