"""How large a pass may be: the jobs that go into it, within memory, open files and disk."""

import os
import resource
from collections.abc import Sequence

from lorafuse.batching.existing_results import ExistingResults
from lorafuse.batching.one_pass import PlannedJob
from lorafuse.errors import StorageError, listed, shown, sized
from lorafuse.files.folder import Folder
from lorafuse.outdir.kinds import kind_of
from lorafuse.outdir.output import N_FINISHING
from lorafuse.planning.plan import Memory

# A pass of 32 spends 3% of its time on what its jobs share: a larger one would gain little, and no result is
# complete before its end.
MAX_MEMBERS = 32
JOB_NBYTES = 1500  # a job, its state and its error
# A weight's step, patch, adapter tensors and measures; 1,650 were measured with LoRA on 560 of 723.
STEP_NBYTES = 3000
# Stacks of the threads that finish an output's files, and what one of them reads back.
OUTPUT_NBYTES = 1_000_000
# Open at once beside its adapter: two shards, those that are finished, a lock, a journal, and one that is
# copied.
MEMBER_FILES = 5 + N_FINISHING
SPARE_FILES = 16  # for hashing, sidecars, directories that are synced


def speed(memory: Memory, n_members: int) -> float:
    """Of a pass, in jobs: decoding costs about as much as what is done to a tile for one result."""
    return memory.n_workers * n_members / (n_members + 1)


def files_left() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (limit if limit != resource.RLIM_INFINITY else 1 << 30) - len(os.listdir("/proc/self/fd"))


def wanted_nbytes(jobs: Sequence[PlannedJob], finished: ExistingResults, *, shared: bool = True) -> int:
    """Bytes of weights that are to be written for these; `shared`: files that several of them need once, and
    not at all where a result has them."""
    wanted: dict[str, int] = {}
    for job in jobs:
        for shard in job.plan.shards:
            key = job.common.get(shard.file)
            content = key if key and shared else f"{job.name}/{shard.file}"
            wanted[content] = 0 if key == content and finished.find(content) else shard.nbytes
    return sum(wanted.values())


def disk_error(
    jobs: Sequence[PlannedJob], root: Folder, share: str, finished: ExistingResults, nbytes_beside: int
) -> StorageError | None:
    """What is wrong when there is no room below `root` for what these write, and for what lies there for a
    while."""
    kind = kind_of(str(root))
    needed = wanted_nbytes(jobs, finished, shared=share != "copy") + nbytes_beside
    space = kind.space_of(str(root))
    free = space.free_nbytes if space else None
    if free is not None and needed > free:  # not before: it lists OUT_ROOT for each member
        free += kind.left_nbytes(job.out_dir for job in jobs)
    if free is None or needed <= free:
        return None
    names = listed(job.name for job in jobs)
    return StorageError(f"{shown(root)}: {sized(needed)} are needed for {names}, {sized(free)} are free.")
