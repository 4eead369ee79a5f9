"""The plan of a dry run, for people."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lorafuse.cli.progress import lasting
from lorafuse.errors import listed, shown, sized
from lorafuse.receipt.in_words import ACTIONS

MOST_KINDS = 12  # of modules that change

Plan = dict[str, Any]
Lines = Iterator[tuple[str, str]]  # label, text


def plan_text(plan: Plan, *, verbose: bool = False) -> str:
    """What is read, what changes, what is written, and what it takes; with `verbose` each weight that
    changes."""
    lines = [f"{label:9} {text}" for label, text in _lines(plan)]
    lines += [f"  {shown(name)}" for name in (plan["changed"] if verbose else ())]
    used, ignored = plan["adapter_tensors"]["used"], plan["adapter_tensors"]["ignored"]
    lines.append(f"adapter tensors: {used} used, {len(ignored)} ignored")
    lines += [f"  ignored {shown(key)}: {shown(reason)}" for key, reason in ignored.items()]
    if plan["held_whole"]:
        lines.append(
            f"held whole in memory, one after the other, for a decomposition: {listed(plan['held_whole'])}"
        )
    lines += [f"config.json: {name} = {json.dumps(value)}" for name, value in plan["config_changes"].items()]
    return "\n".join(lines)


def _lines(plan: Plan) -> Lines:
    yield from inputs_text(plan)
    for scheme, n in plan["decoded"].items():
        yield "decoded", f"{n:,} parameters from {shown(scheme)}"
    yield (
        "weights",
        ", ".join(f"{n:,} {action} ({ACTIONS[action]})" for action, n in sorted(plan["weights"].items())),
    )
    yield "changes", changes_text(plan)
    n_shards = len(plan["shards"])
    yield "writes", f"{sized(plan['nbytes'])} in {n_shards} file{'s' if n_shards != 1 else ''} of weights"
    for shard in plan["shards"]:
        yield "", f"{shard['file']}  {sized(shard['nbytes'])}  {shard['n_weights']} weights"
    for index, part in enumerate(plan.get("parts", [])):
        n_files = len(part["files"])
        yield f"part {index}", f"{sized(part['nbytes'])} in {n_files} file{'' if n_files == 1 else 's'}"
    if len(plan["formats"]) > 1:
        yield "--format", ", ".join(f"{word} {sized(nbytes)}" for word, nbytes in plan["formats"].items())
    yield "disk", disk_text(plan["disk"])
    workers = f"{plan['n_workers']} worker" + ("s" if plan["n_workers"] != 1 else "")
    yield "memory", f"at most {sized(plan['memory_nbytes'])} beyond `import torch`; {workers}"
    if plan["device"] != "cpu":
        yield "device", plan["device"]
    yield "time", time_text(plan["estimate"])


def inputs_text(plan: Plan) -> Lines:
    """The base, then the adapters: where they lie, and what they are."""
    for entry in plan["inputs"]:
        role = "base" if entry["role"] == "checkpoint" else "adapter"
        yield role, f"{shown(entry['path'])}: {shown(entry['kind'], 1000)}"


def changes_text(plan: Plan) -> str:
    """How many weights change, by the kind of their module."""
    kinds = [f"{n:,} {shown(kind.partition('*.')[2] or kind)}" for kind, n in plan["changes"].items()]
    rest = f" and {len(kinds) - MOST_KINDS} more kinds" if len(kinds) > MOST_KINDS else ""
    return n_changed_text(plan) + (f": {', '.join(kinds[:MOST_KINDS])}{rest}" if kinds else "")


def n_changed_text(plan: Plan) -> str:
    return f"{sum(plan['changes'].values()):,} of {sum(plan['weights'].values()):,} weights"


def disk_text(disk: dict[str, Any]) -> str:
    free = "" if disk["free_nbytes"] is None else f", {sized(disk['free_nbytes'])} free"
    return f"{sized(disk['needed_nbytes'])} needed{free}"


def time_text(estimate: Mapping[str, Any] | None, *, brief: bool = False) -> str:
    """How long it may take, and that this is an estimate."""
    if estimate is None and brief:
        return "time not known"
    if estimate is None:
        return "not known: the base is not on this machine, or its disk does not tell"
    wall = f"{'about ' if estimate['wall_s'] >= 1 else ''}{lasting(estimate['wall_s'])}"
    if brief:
        return wall
    parts = f"{lasting(estimate['compute_s'])} to compute beside {lasting(estimate['write_s'])} to write"
    return f"{wall} ({parts}), estimated by a probe of half a second"
