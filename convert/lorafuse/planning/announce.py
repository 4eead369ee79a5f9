"""A plan, told to whoever listens."""

from collections import Counter

from lorafuse.events import OnEvent, PlanEvent, warn_by
from lorafuse.planning.plan import Plan


def announce(plan: Plan, on_event: OnEvent, *, dry_run: bool = False) -> PlanEvent:
    """An event for each warning, and the plan's, which is returned. The adapters' copies of base weights,
    which planning did not read, are compared before a merge."""
    warn = warn_by(on_event)
    for message in plan.warnings if dry_run else plan.all_warnings():
        warn(message)
    event = plan_event(plan)
    on_event(event)
    return event


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
        "adapter_tensors": {"used": len(plan.used), "ignored": plan.ignored},
        "config_changes": plan.config_changes,
        "side_files": {
            "copied": [name for _, name in plan.side_files.copied],
            "made": [name for name, _ in plan.side_files.made],
            "tokenizer": plan.side_files.tokenizer,
            "chat_template": plan.side_files.chat_template,
        },
        "held_whole": [
            step.name for step in steps if any(patch.needs.holds_weight for patch in step.patches)
        ],
    }
