"""A dry run of a batch: what each job takes, and all of them together, in which a common file counts once."""

from dataclasses import dataclass, field

import torch

from lorafuse.batching.answers import Speeds, add_answers, speeds_of
from lorafuse.batching.one_pass import PlannedJob
from lorafuse.events import Disk, Estimate, PlanEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.outdir.kinds import kind_of


@dataclass
class Rehearsal:
    """What the jobs that were planned take. The speeds are those of the first job, since a probe for each
    would take long."""

    base: Checkpoint
    root: str
    share: str
    device: torch.device
    nbytes: int = 0  # of all results' weights
    _needed_nbytes: int = 0
    _compute_s: float = 0.0
    _write_s: float = 0.0
    _has_estimate: bool = True
    _speeds: Speeds | None = None
    _common: set[str] = field(default_factory=set)  # that a job before has

    def add(self, planned: PlanEvent, job: PlannedJob) -> None:
        """Say of a job what it takes alone, and add to the sum what it takes beside those before it."""
        plan = job.plan
        add_answers(planned, plan, self.base, job.files.adapters, job.settings, job.out_dir)
        self._speeds = self._speeds or speeds_of(plan, self.base, self.root, self.device)
        planned["estimate"] = self._speeds.estimate(plan.shards)
        made = [shard for shard in plan.shards if job.common.get(shard.file) not in self._common]
        self._common.update(job.common.values())
        beside = self._speeds.estimate(made)
        if beside:
            self._compute_s += beside["compute_s"]
            self._write_s += beside["write_s"]
        else:
            self._has_estimate = False
        self.nbytes += plan.nbytes
        linked = 0 if self.share == "copy" else plan.nbytes - sum(shard.nbytes for shard in made)
        self._needed_nbytes += planned["disk"]["needed_nbytes"] - linked

    def disk(self) -> Disk:
        """Of all jobs together."""
        space = kind_of(self.root).space_of(self.root)
        return {"needed_nbytes": self._needed_nbytes, "free_nbytes": space.free_nbytes if space else None}

    def estimate(self) -> Estimate | None:
        """Of all jobs together."""
        if not self._has_estimate:
            return None
        wall_s = max(self._compute_s, self._write_s)
        return {"wall_s": wall_s, "compute_s": self._compute_s, "write_s": self._write_s}
