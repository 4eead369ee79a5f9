"""What a dry run says beside its plan: what is read, what changes, how long it may take, and whether it fits
the disk."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from lorafuse.adapters.reading.directory import is_mlx
from lorafuse.errors import StorageError, shown, sized
from lorafuse.events import Disk, Estimate, PlanEvent, PlannedInput
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.names import place_of
from lorafuse.merge.probe import tile_rates
from lorafuse.outdir.free_space import planned_nbytes
from lorafuse.outdir.kinds import kind_of
from lorafuse.outdir.probe import write_rate
from lorafuse.outdir.sidecars import copied_files
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.plan import Plan, PlannedShard
from lorafuse.settings import Settings


class Speeds(NamedTuple):
    """Bytes of a result a second: made, of weights that change and of the others, and written. None where
    nobody can tell."""

    changed: float | None
    others: float | None
    written: float | None

    def estimate(self, shards: Iterable[PlannedShard]) -> Estimate | None:
        """How long these files may take: they are written while the next tiles are made."""
        changed = others = 0
        for step in (step for shard in shards for step in shard.steps):
            changed += step.nbytes * step.changes
            others += step.nbytes * (not step.changes)
        pairs = ((changed, self.changed), (others, self.others), (changed + others, self.written))
        if any(nbytes and not rate for nbytes, rate in pairs):
            return None
        of_changed, of_others, write_s = (nbytes / rate if rate else 0.0 for nbytes, rate in pairs)
        compute_s = of_changed + of_others
        return {"wall_s": max(compute_s, write_s), "compute_s": compute_s, "write_s": write_s}


def speeds_of(plan: Plan, base: Checkpoint, out_dir: str, device: torch.device) -> Speeds:
    """By a probe of half a second, which reads a few weights; none are read where they are not on this
    machine."""
    rates = tile_rates(plan, device) if isinstance(base.folder, LocalFolder) else {}
    return Speeds(rates.get(True), rates.get(False), write_rate(out_dir))


def add_answers(
    planned: PlanEvent,
    plan: Plan,
    base: Checkpoint,
    adapters: Sequence[WeightedAdapter],
    settings: Settings,
    out_dir: str,
) -> None:
    """Everything but the time, which takes the speeds of this machine."""
    changed = [step.name for step in plan.steps if step.changes]
    space = kind_of(out_dir).space_of(out_dir)
    planned["inputs"] = list(_inputs(plan, base, adapters))
    planned["changed"] = changed
    planned["changes"] = dict(Counter(place_of(name).kind for name in changed))
    planned["memory_nbytes"] = settings.memory_nbytes
    planned["disk"] = {
        "needed_nbytes": planned_nbytes(plan, copied_files(plan), space),
        "free_nbytes": space.free_nbytes if space else None,
    }


def _inputs(plan: Plan, base: Checkpoint, adapters: Sequence[WeightedAdapter]) -> Iterator[PlannedInput]:
    stored = (step.sources.scheme for step in plan.steps if isinstance(step.sources.store, Checkpoint))
    schemes = "; ".join(f"{n:,} weights in {scheme}" for scheme, n in Counter(map(str, stored)).most_common())
    kind = f"{base.config.get('model_type', 'no model_type')}: {schemes}"
    yield {"role": "checkpoint", "path": str(base.folder), "kind": kind}
    for adapter, weight in ((each.adapter, each.weight) for each in adapters):
        config = adapter.config
        word = "MLX-LM" if is_mlx(config) else "PEFT"
        named = config.get("fine_tune_type", "lora") if is_mlx(config) else config.get("peft_type")
        times = "" if weight == 1 else f", times {weight:g}"
        kind = f"{named} of {word}, {len(adapter.store.tensors):,} tensors{times}"
        yield {"role": "adapter", "path": adapter.name, "kind": kind}


def refuse_full(out_dir: str, disk: Disk) -> None:
    """Raises StorageError where what is needed is not free, and what an earlier run left would not do."""
    needed, free = disk["needed_nbytes"], disk["free_nbytes"]
    if free is None or needed <= free:
        return
    free += kind_of(out_dir).left_nbytes([out_dir])
    if needed > free:
        raise StorageError(
            f"{shown(out_dir)}: {sized(needed)} are needed and {sized(free)} are free; "
            f"it lacks {sized(needed - free)}."
        )
