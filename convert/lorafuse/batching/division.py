"""One result that several workers make: which share of its files a call makes."""

from dataclasses import dataclass, replace

from lorafuse.batching.one_pass import PartOfJob, PlannedJob
from lorafuse.errors import UsageError
from lorafuse.events import PlanEvent
from lorafuse.outdir.kinds import shared_kind_of
from lorafuse.outdir.out_dir import Part
from lorafuse.planning.parts import divided
from lorafuse.planning.plan import Plan


@dataclass(frozen=True)
class Division:
    """Between how many workers a result is divided, and which of them this is; None asks for all, in a dry
    run."""

    index: int | None
    of: int


def checked_division(
    index: int | None, of: int | None, *, commit: bool, restart: bool, dry_run: bool, published: bool
) -> Division | None:
    """The division that is asked for, if any. Raises UsageError for options that contradict each other."""
    if commit and (index is not None or of is not None):
        raise UsageError("--commit goes without --index and --of: it takes what all workers have made.")
    if commit and restart:
        raise UsageError(
            "--commit takes what the workers have made, which --restart discards; give one of them."
        )
    if of is None and index is None:
        return None
    if of is None or (index is None and not dry_run):
        raise UsageError("--index and --of go together: --index I --of N makes part I (from 0) of N.")
    if of < 1:
        raise UsageError(f"--of is {of}; expected at least 1.")
    if index is not None and not 0 <= index < of:
        raise UsageError(f"--index is {index} of {of}; expected 0 to {of - 1}.")
    if published:
        raise UsageError("--card and --push-to-hub are of the whole result: give them with --commit.")
    return Division(index, of)


def announce_parts(planned: PlanEvent, plan: Plan, division: Division) -> None:
    """Say in a plan's event which worker makes which files; and for a worker, what it makes."""
    parts = divided(plan.shards, division.of)
    planned["parts"] = [
        {"files": [shard.file for shard in part], "nbytes": sum(shard.nbytes for shard in part)}
        for part in parts
    ]
    if division.index is not None:
        own = set(planned["parts"][division.index]["files"])
        planned["part"] = {"index": division.index, "of": division.of}
        planned["shards"] = [shard for shard in planned["shards"] if shard["file"] in own]
        planned["nbytes"] = planned["parts"][division.index]["nbytes"]


def part_of(job: PlannedJob, division: Division | None) -> PlannedJob | None:
    """The job of a worker: the files that fall to it, but those that a run which was cut off while it
    committed has taken. None where nothing is divided."""
    if division is None or division.index is None:
        return None
    own = {shard.file for shard in divided(job.plan.shards, division.of)[division.index]}
    taken = shared_kind_of(job.out_dir).files_of_whole(job.out_dir, job.attempt)
    return replace(job, part=PartOfJob(Part(division.index, division.of), frozenset(own - taken)))
