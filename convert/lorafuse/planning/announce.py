"""A plan, told to whoever listens."""

from collections import Counter

from lorafuse.events import PlanEvent, WarningEvent
from lorafuse.planning.plan import Plan, Step


def announced(plan: Plan, *, dry_run: bool = False) -> tuple[list[WarningEvent], PlanEvent]:
    """An event for each warning, and the plan's. The adapters' copies of base weights, which planning did not
    read, are compared before a merge."""
    messages = plan.warnings if dry_run else plan.all_warnings()
    planned = plan_event(plan)
    if dry_run:
        planned["formats"] = plan.sizes
    return [{"event": "warning", "message": message} for message in messages], planned


def plan_event(plan: Plan) -> PlanEvent:
    """The plan as a dictionary that JSON can hold."""
    steps = list(plan.steps)
    return {
        "event": "plan",
        "plan_id": plan.plan_id,
        "nbytes": plan.nbytes,
        "n_workers": plan.memory.n_workers,
        "weights": dict(Counter(step.action for step in steps)),
        "shards": [
            {"file": shard.file, "nbytes": shard.nbytes, "n_weights": len(shard.steps)}
            for shard in plan.shards
        ],
        "decoded": dict(_decoded(steps)),
        "adapter_tensors": {"used": len(plan.used), "ignored": plan.ignored},
        "config_changes": plan.config_changes,
        "side_files": {
            "copied": [name for _, name in plan.side_files.copied],
            "made": [name for name, _ in plan.side_files.made],
            "tokenizer": plan.side_files.tokenizer,
            "chat_template": plan.side_files.chat_template,
        },
        "notes": plan.notes,
        "held_whole": [
            step.name for step in steps if any(patch.needs.holds_weight for patch in step.patches)
        ],
    }


def _decoded(steps: list[Step]) -> Counter[str]:
    """Scheme → elements that are decoded from it."""
    totals: Counter[str] = Counter()
    for step in steps:
        if step.encoder.needs_values and not step.sources.as_stored:
            totals[str(step.sources.scheme)] += step.spec.numel
    return totals
