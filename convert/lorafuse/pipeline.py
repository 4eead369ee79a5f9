"""The whole tool on one screen: read this first."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from lorafuse.adapters import open_adapter
from lorafuse.checkpoint import Checkpoint
from lorafuse.errors import AdapterError, CheckpointError, UsageError
from lorafuse.hub import ADAPTER_FILES, CHECKPOINT_FILES, local_dir
from lorafuse.merge import merge
from lorafuse.plan import make_plan
from lorafuse.receipt import RECEIPT, InputHashes, make_receipt
from lorafuse.settings import Settings, checked_weight, parse_nbytes
from lorafuse.several import Weighted
from lorafuse.sidecars import write_json, write_sidecars
from lorafuse.staging import Staging, check_out_dir
from lorafuse.steps import Plan
from lorafuse.verify import verify_staging

Name = str | PathLike[str]


def convert(
    ckpt: Name,
    adapter: Name,
    out_dir: Name,
    *,
    adapters: Sequence[Name | tuple[Name, float]] = (),
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    memory_limit: str | int = "100MB",
    adapter_scale: float = 1.0,
    overwrite: bool = False,
    dry_run: bool = False,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Merge a PEFT adapter into a checkpoint and write the result to `out_dir`.

    `ckpt` and `adapter` are directories or hub ids `org/name[@revision]`. `adapters` are further ones, or pairs (adapter, weight),
    whose updates are added; their order does not matter, nor which one is `adapter`, except that its tokenizer is taken.
    `adapter_scale` is the weight of `adapter`. Returns the receipt (also written to `lorafuse_receipt.json`), or with `dry_run`
    the plan. `on_event` gets one dict for each thing that happens: `event` is "warning", "plan", "progress", "shard" or "done".
    Raises a LorafuseError, whose class says what kind of thing went wrong, or an OSError; then `out_dir` is as it was.
    """
    began = time.perf_counter()
    limits = {"max_shard_nbytes": parse_nbytes(max_shard_size), "memory_nbytes": parse_nbytes(memory_limit)}
    settings = Settings(dtype=dtype, device=device, adapter_scale=adapter_scale, **limits)
    named = [(fspath(adapter), settings.adapter_scale), *(named_weight(one) for one in adapters)]
    target = pick_device(device)
    ckpt_dir = local_dir(fspath(ckpt), CHECKPOINT_FILES, CheckpointError)
    adapter_dirs = [local_dir(name, ADAPTER_FILES, AdapterError) for name, _ in named]
    out = Path(out_dir)
    check_out_dir(out, [ckpt_dir, *adapter_dirs], overwrite=overwrite)

    with closing(Checkpoint(ckpt_dir)) as base, opened(named, adapter_dirs) as (lora, *others):
        plan = make_plan(base, lora.adapter, settings, others)
        for message in plan.warnings:
            on_event({"event": "warning", "message": message})
        on_event(plan_event(plan))
        if dry_run:
            return plan_event(plan)
        with InputHashes(base, fspath(ckpt), [lora, *others]) as inputs, Staging(out, plan.plan_id) as staging:
            outcome = merge(plan, staging.path, target, on_event)
            write_sidecars(plan, ckpt_dir, base.config, adapter_dirs[0], staging.path)
            verify_staging(plan, outcome, staging.path)
            receipt = make_receipt(plan, outcome, settings, inputs.result(), time.perf_counter() - began)
            write_json(staging.path / RECEIPT, receipt)
            staging.commit()
    on_event({"event": "done", "out_dir": fspath(out_dir), **receipt["timing"], "peak_rss": receipt["peak_rss"]})
    return receipt


def named_weight(adapter: Name | tuple[Name, float]) -> tuple[str, float]:
    """(name, weight) of an adapter that may come without a weight. Raises UsageError for a weight that is no finite number."""
    name, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return fspath(name), checked_weight(name, weight)


@contextmanager
def opened(named: list[tuple[str, float]], dirs: list[Path]) -> Iterator[list[Weighted]]:
    """The adapters of those names and weights, which lie in those directories. Raises AdapterError."""
    with ExitStack() as stack:
        pairs = zip(named, dirs, strict=True)
        yield [Weighted(stack.enter_context(closing(open_adapter(path, name))), weight) for (name, weight), path in pairs]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when torch sees it. Raises UsageError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices here.")
    return device


def plan_event(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON-able dict."""
    actions: dict[str, int] = {}
    for step in plan.steps:
        actions[step.action] = actions.get(step.action, 0) + 1
    return {
        "event": "plan",
        "plan_id": plan.plan_id,
        "nbytes": plan.nbytes,
        "n_workers": plan.memory.n_workers,
        "weights": actions,
        "shards": [{"file": shard.file, "nbytes": shard.nbytes, "n_weights": len(shard.steps)} for shard in plan.shards],
        "adapter_tensors": {"used": len(plan.used), "ignored": plan.ignored},
        "config_changes": plan.config_changes,
        "held_whole": [step.name for step in plan.steps if any(patch.holds_weight for patch in step.patches)],
    }
