"""The whole tool on one screen: read this first."""

import time
from collections.abc import Callable
from contextlib import closing
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from lorafuse.adapters import adapter_folder, open_adapter
from lorafuse.checkpoint import Checkpoint
from lorafuse.errors import AdapterError, CheckpointError, UsageError, shown
from lorafuse.hub import CHECKPOINT_FILES, adapter_files, local_dir
from lorafuse.merge import merge
from lorafuse.plan import make_plan
from lorafuse.receipt import RECEIPT, InputHashes, make_receipt
from lorafuse.settings import Settings, parse_nbytes
from lorafuse.sidecars import write_json, write_sidecars
from lorafuse.staging import Staging, check_out_dir
from lorafuse.steps import Plan
from lorafuse.verify import verify_staging


def convert(
    ckpt: str | PathLike[str],
    adapter: str | PathLike[str],
    out_dir: str | PathLike[str],
    *,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    device: str = "auto",
    memory_limit: str | int = "100MB",
    adapter_scale: float = 1.0,
    adapter_name: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Merge a PEFT or MLX-LM adapter into a checkpoint and write the result to `out_dir`.

    `ckpt` and `adapter` are directories or hub ids `org/name[@revision]`; `adapter_name` chooses a sub-folder of `adapter`. Returns
    the receipt (also written to `lorafuse_receipt.json`), or with `dry_run` the plan. `on_event` gets one dict for each thing that
    happens: `event` is "warning", "plan", "progress", "shard" or "done". Raises a LorafuseError, whose class says what kind of
    thing went wrong, or an OSError; then `out_dir` is as it was.
    """
    began = time.perf_counter()
    limits = {"max_shard_nbytes": parse_nbytes(max_shard_size), "memory_nbytes": parse_nbytes(memory_limit)}
    settings = Settings(dtype=dtype, device=device, adapter_scale=adapter_scale, adapter_name=adapter_name, **limits)
    target = pick_device(device)
    ckpt_dir = local_dir(fspath(ckpt), CHECKPOINT_FILES, CheckpointError)
    adapter_root, adapter_dir = local_adapter(fspath(adapter), adapter_name, on_event)
    out = Path(out_dir)
    check_out_dir(out, [ckpt_dir, adapter_root], overwrite=overwrite)

    with (
        closing(Checkpoint(ckpt_dir)) as base,
        closing(open_adapter(adapter_dir, adapter_root, base.config.get("model_type"))) as lora,
    ):
        plan = make_plan(base, lora, settings)
        for message in plan.warnings:
            on_event({"event": "warning", "message": message})
        on_event(plan_event(plan))
        if dry_run:
            return plan_event(plan)
        with InputHashes(base, fspath(ckpt), lora, fspath(adapter)) as inputs, Staging(out, plan.plan_id) as staging:
            outcome = merge(plan, staging.path, target, on_event)
            write_sidecars(plan, ckpt_dir, base.config, (adapter_dir, adapter_root), staging.path)
            verify_staging(plan, outcome, staging.path)
            receipt = make_receipt(plan, outcome, settings, inputs.result(), time.perf_counter() - began)
            write_json(staging.path / RECEIPT, receipt)
            staging.commit()
    on_event({"event": "done", "out_dir": fspath(out_dir), **receipt["timing"], "peak_rss": receipt["peak_rss"]})
    return receipt


def local_adapter(adapter: str, name: str | None, on_event: Callable[[dict[str, Any]], None]) -> tuple[Path, Path]:
    """The directory of an adapter, and in it the adapter that is meant: `adapter_folder`. Raises AdapterError."""
    root = local_dir(adapter, adapter_files(name), AdapterError)
    folder = adapter_folder(root, name)
    if name is None and folder != root:
        on_event({"event": "warning", "message": f"{shown(adapter)}: the adapter in it, {shown(folder.name)}, is taken."})
        # Of a hub id, only its config is here yet.
        folder = local_dir(adapter, adapter_files(folder.name), AdapterError) / folder.name
        root = folder.parent
    return root, folder


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
    }
