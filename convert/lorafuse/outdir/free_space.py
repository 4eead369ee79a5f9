"""Whether the file system has room for a result, asked before the first byte; and what is missing when it
fills up all the same."""

import errno
import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorafuse.errors import StorageError, shown
from lorafuse.files.folder import Folder
from lorafuse.files.safetensors_file import header_of
from lorafuse.outdir.output import Output
from lorafuse.planning.plan import PlannedShard

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The index and the receipt have some 500 bytes for each weight; config.json and the journal are small.
NBYTES_PER_WEIGHT = 1000
FIXED_NBYTES = 200_000
N_FIXED_FILES = 8


@contextmanager
def room_for(output: Output, copied: Iterable[tuple[Folder, str]]) -> Iterator[Output]:
    """Raises StorageError unless there is room for what `output` lacks and for the files that are `copied`
    (pairs of a folder and a name in it); then `told_when_full`."""
    side_files = list(copied)
    _check_room(output, side_files)
    with told_when_full([output], side_files):
        yield output


@contextmanager
def told_when_full(outputs: Sequence[Output], side_files: Iterable[tuple[Folder, str]]) -> Iterator[None]:
    """Raises StorageError, with what is missing, in place of an OSError that says that there is no room, or
    that says not where."""
    try:
        yield
    except OSError as e:
        where, way_on = shown(os.path.commonpath([output.staging for output in outputs])), _way_on(outputs)
        if e.errno not in FULL:
            if e.errno is None or e.filename is not None:
                raise
            raise StorageError(f"{where}: writing failed: {e.strerror}. {way_on}") from e
        for output in outputs:
            output.close()
        needed = _needed(outputs, side_files)
        missing = needed - _free(outputs[0].staging) - _unfinished(outputs)
        if e.errno == errno.ENOSPC and missing > 0:
            what = f"the file system is full; {missing} bytes more than it has are needed"
        else:
            what = f"{e.strerror}; {needed} bytes are still to be written"
        raise StorageError(f"{where}: {what}. {way_on}") from e


def _check_room(output: Output, side_files: Sequence[tuple[Folder, str]]) -> None:
    found = os.statvfs(output.staging)
    needed, free = _needed([output], side_files), found.f_bavail * found.f_frsize
    if found.f_blocks and needed > free:  # some file systems say nothing
        raise StorageError(
            f"{shown(output.staging)}: {needed} bytes are needed and {free} are free; {needed - free} are "
            f"missing. {_way_on([output])}"
        )
    n_files = len(output.lacking) + len(side_files) + N_FIXED_FILES
    if found.f_files and n_files > found.f_favail:
        raise StorageError(
            f"{shown(output.staging)}: {n_files} files are to be made, and the file system has room for "
            f"{found.f_favail}."
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(map(_file_nbytes, output.lacking), default=0)
    if limit != resource.RLIM_INFINITY and largest > limit:
        raise StorageError(
            f"{shown(output.staging)}: a file of {largest} bytes is to be made, and this process may make "
            f"them of {limit} (ulimit -f); raise that, or lower --max-shard-size."
        )


def _file_nbytes(shard: PlannedShard) -> int:
    return len(header_of(list(shard.tensors))) + shard.nbytes


def _needed(outputs: Sequence[Output], side_files: Iterable[tuple[Folder, str]]) -> int:
    """Bytes, each file rounded up to whole blocks."""
    block = os.statvfs(outputs[0].staging).f_frsize or 1
    fixed = [FIXED_NBYTES + NBYTES_PER_WEIGHT * sum(1 for _ in output.plan.steps) for output in outputs]
    shards = [_file_nbytes(shard) for output in outputs for shard in output.lacking]
    return sum(
        -(-nbytes // block) * block
        for nbytes in (*fixed, *shards, *(folder.facts(name).nbytes for folder, name in side_files))
    )


def _free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _unfinished(outputs: Sequence[Output]) -> int:
    """Bytes that files take which are going to be removed."""
    return sum(
        path.stat().st_blocks * 512
        for staging in {output.staging for output in outputs}
        for path in staging.glob("*.part")
    )


def _way_on(outputs: Sequence[Output]) -> str:
    n_finished = len({(output.staging, one.file) for output in outputs for one in output.outcome.written})
    kept = f"; it goes on after the {n_finished} files that are finished" if n_finished else ""
    return f"Give the same command again when that is mended{kept}."
