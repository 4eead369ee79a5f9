"""The whole tool on one screen: read this first."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorafuse.adapters import adapter_folder, open_adapter
from lorafuse.base_options import chosen_base_quant
from lorafuse.checkpoint import RECEIPT, Checkpoint
from lorafuse.directory import verify_staging
from lorafuse.errors import AdapterError, CheckpointError, UsageError, shown
from lorafuse.hub import CHECKPOINT_FILES, adapter_files, local_dir
from lorafuse.inputs import InputFiles
from lorafuse.merge import merge
from lorafuse.outputs import Output
from lorafuse.plan import make_plan
from lorafuse.receipt import InputHashes, make_receipt
from lorafuse.settings import Settings, checked_weight, parse_nbytes
from lorafuse.several import Weighted
from lorafuse.sidecars import copied_files, write_json, write_sidecars
from lorafuse.space import room_for
from lorafuse.staging import Staging, check_out_dir
from lorafuse.steps import Plan
from lorafuse.summary import kept_in_sum

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
    adapter_name: str | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    **training: Any,
) -> dict[str, Any]:
    """Merge a PEFT or MLX-LM adapter into a checkpoint and write the result to `out_dir`.

    `ckpt` and `adapter` are directories or hub ids `org/name[@revision]`; `adapter_name` chooses a sub-folder of `adapter`.
    `adapters`: further ones, or pairs (adapter, weight), to be added in any order; `adapter_scale`: the weight of `adapter`, whose
    tokenizer is taken. `training`: how it quantized this full-precision base: `base_quant`, `double_quant`, `quant_blocksize`,
    `quant_skip`, `quant_experts`, or the file `base_quant_from` (`base_options.chosen_base_quant`). `allow_nonfinite` keeps such
    values of the base. Returns the receipt, or with `dry_run` the plan. `on_event` gets a dict for each "event": "warning", "plan",
    "resumed", "progress", "shard" or "done". Raises a LorafuseError or an OSError; then `out_dir` is as it was, and after an I/O
    error or an interruption the same call goes on, unless `restart`.
    """
    began = time.perf_counter()
    given: dict[str, Any] = {"max_shard_nbytes": parse_nbytes(max_shard_size), "memory_nbytes": parse_nbytes(memory_limit)}
    given |= {"adapter_scale": adapter_scale, "adapter_name": adapter_name, "allow_nonfinite": allow_nonfinite}
    settings = Settings(dtype=dtype, device=device, base_quant=chosen_base_quant(**training), **given)
    target, ckpt_dir = pick_device(device), local_dir(fspath(ckpt), CHECKPOINT_FILES, CheckpointError)
    first = local_adapter(fspath(adapter), settings.adapter_scale, adapter_name, on_event)
    found = [first, *(local_adapter(*named_weight(one), None, on_event) for one in adapters)]
    check_out_dir(Path(out_dir), [ckpt_dir, *(one.root for one in found)], overwrite=overwrite)
    with closing(Checkpoint(ckpt_dir)) as base, opened(found) as (lora, *others):
        plan = make_plan(base, lora.adapter, settings, others)
        announced = announce(plan, on_event, dry_run=dry_run)
        if dry_run:
            return announced
        files = InputFiles(base, fspath(ckpt), [lora, *others])
        files.refuse_nonfinite()
        attempt = files.attempt(plan, settings, target.type)
        staging = Staging(Path(out_dir), plan.plan_id, attempt, overwrite=overwrite, restart=restart, on_event=on_event)
        with InputHashes(base, fspath(ckpt), [lora, *others]) as inputs, staging:
            receipt = carry_out(plan, staging, base, first, settings, files, inputs, began)
    on_event(done_event(fspath(out_dir), receipt))
    return receipt


def announce(plan: Plan, on_event: Callable[[dict[str, Any]], None], *, dry_run: bool = False) -> dict[str, Any]:
    """An event for each warning, and the plan's, which is returned. The adapters' copies of base weights, which planning did not
    read, are compared before a merge."""
    for message in plan.warnings if dry_run else plan.all_warnings():
        on_event({"event": "warning", "message": message})
    on_event(event := plan_event(plan))
    return event


def carry_out(
    plan: Plan,
    staging: Staging,
    base: Checkpoint,
    first: "LocalAdapter",
    settings: Settings,
    files: InputFiles,
    inputs: InputHashes,
    began: float,
) -> dict[str, Any]:
    """Make what the staging directory does not have of a plan yet, complete it and give it its name. Returns the receipt."""
    with room_for(staging.output(plan), copied_files(plan, base.path, first.folders)) as output:
        merge([output], plan.memory, pick_device(settings.device), allow_nonfinite=settings.allow_nonfinite)
        receipt = complete(output, base, first, settings, inputs.result, began)
        files.refuse_changed()
        staging.commit()
    return receipt


def complete(
    output: Output,
    base: Checkpoint,
    first: "LocalAdapter",
    settings: Settings,
    inputs: Callable[[], list[dict[str, Any]]],
    began: float,
) -> dict[str, Any]:
    """Add to a staging directory that has all its shards what else belongs into it, and check it. `first` is the adapter whose
    tokenizer is taken, `inputs` gives those of the receipt, `began` is when the run did. Returns the receipt. Raises ResultError,
    and the output's own error."""
    if output.error:
        raise output.error
    plan, staging = output.plan, output.staging
    write_sidecars(plan, base.path, base.config, first.folders, staging)
    verify_staging(plan, output.outcome, staging)
    receipt = make_receipt(plan, output.outcome, staging, settings, inputs(), time.perf_counter() - began)
    write_json(staging / RECEIPT, receipt)
    return receipt


def named_weight(adapter: Name | tuple[Name, float]) -> tuple[str, float]:
    """(name, weight) of an adapter that may come without a weight. Raises UsageError for a weight that is no finite number."""
    name, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return fspath(name), checked_weight(name, weight)


class LocalAdapter(NamedTuple):
    """An adapter as the user named it, what its update is multiplied by, and where it lies: in the directory that was named, or in
    a sub-folder of that."""

    name: str
    weight: float
    root: Path
    path: Path

    @property
    def folders(self) -> list[Path]:
        """Where files beside its tensors may be, the first first."""
        return [self.path, self.root]


def local_adapter(name: str, weight: float, folder_name: str | None, on_event: Callable[[dict[str, Any]], None]) -> LocalAdapter:
    """Where the adapter lies, of which `folder_name` chooses one: `adapter_folder`. Raises AdapterError."""
    root = local_dir(name, adapter_files(folder_name), AdapterError)
    path = adapter_folder(root, folder_name)
    if folder_name is None and path != root:
        on_event({"event": "warning", "message": f"{shown(name)}: the adapter in it, {shown(path.name)}, is taken."})
        # Of a hub id, only its config is here yet.
        path = local_dir(name, adapter_files(path.name), AdapterError) / path.name
        root = path.parent
    return LocalAdapter(name, weight, root, path)


@contextmanager
def opened(found: Sequence[LocalAdapter]) -> Iterator[list[Weighted]]:
    """The adapters. Raises AdapterError."""
    with ExitStack() as stack:
        adapters = [stack.enter_context(closing(open_adapter(one.path, one.name, one.root))) for one in found]
        yield [Weighted(adapter, one.weight) for adapter, one in zip(adapters, found, strict=True)]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when torch sees it. Raises UsageError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices here.")
    return device


def done_event(out_dir: str, receipt: dict[str, Any]) -> dict[str, Any]:
    """What the receipt says in sum, and what it cost, as one JSON-able dict."""
    said = {"base_semantics": receipt["base_semantics"], "update": kept_in_sum(receipt["tensors"])}
    return {"event": "done", "out_dir": out_dir, **said, **receipt["timing"], "peak_rss": receipt["peak_rss"]}


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
