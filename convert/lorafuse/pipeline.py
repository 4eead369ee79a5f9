"""The whole tool on one screen: read this first."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from os import fspath
from typing import Any, NamedTuple

from lorafuse.arithmetic.arena import pick_device
from lorafuse.events import OnEvent, ignore
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.names import RECEIPT
from lorafuse.inputs.hashes import InputHashes
from lorafuse.inputs.located import (
    LocatedAdapter,
    Name,
    checkpoint_folder,
    located_adapter,
    named_weight,
    opened,
)
from lorafuse.inputs.unchanged import UnchangedInputs
from lorafuse.merge.loop import merge
from lorafuse.outdir.free_space import room_for
from lorafuse.outdir.kinds import kind_of
from lorafuse.outdir.output import Output, output_of
from lorafuse.outdir.read_back import verify_shards
from lorafuse.outdir.sidecars import copied_files, write_json, write_sidecars
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.plan import Plan
from lorafuse.receipt.read import kept_in_sum
from lorafuse.receipt.write import make_receipt
from lorafuse.settings import Settings, parse_nbytes
from lorafuse.trained_base.options import chosen_base_quant


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
    base_quant: str = "none",
    double_quant: bool = True,
    quant_blocksize: int = 64,
    quant_skip: Sequence[str] = (),
    quant_experts: bool = False,
    base_quant_from: Name | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Merge a PEFT or MLX-LM adapter into a checkpoint and write the result to `out_dir`.

    `ckpt` and `adapter` are directories or hub ids `org/name[@revision]`; `adapter_name` chooses a sub-folder
    of `adapter`. `adapters`: further ones, or pairs (adapter, weight), to be added in any order;
    `adapter_scale`: the weight of `adapter`, whose tokenizer is taken. `base_quant` and the five after it:
    how training quantized this full-precision base (`trained_base.options.chosen_base_quant`).
    `allow_nonfinite` keeps such values of the base. Returns the receipt, or with `dry_run` the plan.
    `on_event` gets a dict for each "event": "warning", "plan", "resumed", "progress", "shard" or "done".
    Raises a LorafuseError or an OSError; then `out_dir` is as it was, and after an I/O error or an
    interruption the same call goes on, unless `restart`.
    """
    settings = Settings(
        dtype=dtype, device=device, adapter_scale=adapter_scale, adapter_name=adapter_name,
        max_shard_nbytes=parse_nbytes(max_shard_size), memory_nbytes=parse_nbytes(memory_limit),
        base_quant=chosen_base_quant(base_quant=base_quant, double_quant=double_quant, quant_skip=quant_skip,
            quant_blocksize=quant_blocksize, quant_experts=quant_experts, base_quant_from=base_quant_from),
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    named = [(fspath(adapter), settings.adapter_scale), *map(named_weight, adapters)]
    writing = Writing(fspath(out_dir), overwrite, restart, dry_run)
    return _convert(fspath(ckpt), named, writing, settings, on_event)


class Writing(NamedTuple):
    """What is written, if anything, and what becomes of what is there."""

    out_dir: str
    overwrite: bool
    restart: bool
    dry_run: bool


def _convert(
    ckpt: str,
    named: Sequence[tuple[str, float]],
    writing: Writing,
    settings: Settings,
    on_event: OnEvent,
) -> dict[str, Any]:
    """The same with checked options. `named`: (adapter, weight) of all adapters."""
    began, (out_dir, overwrite, restart, dry_run) = time.perf_counter(), writing
    target, ckpt_folder = pick_device(settings.device), checkpoint_folder(ckpt)
    folder_names = [settings.adapter_name, *[None] * (len(named) - 1)]
    located = [
        located_adapter(name, weight, folder_name, on_event)
        for (name, weight), folder_name in zip(named, folder_names, strict=True)
    ]
    kind = kind_of(out_dir)
    kind.check_out_dir(out_dir, [ckpt_folder, *(adapter.root for adapter in located)], overwrite=overwrite)
    with closing(Checkpoint(ckpt_folder)) as base, opened(located) as adapters:
        first, *others = adapters
        plan = make_plan(base, first.adapter, settings, others)
        announced = announce(plan, on_event, dry_run=dry_run)
        if dry_run:
            return announced
        files = UnchangedInputs(base, adapters)
        files.refuse_nonfinite()
        attempt = files.attempt(plan, settings, target.type)
        result = kind.open_out_dir(
            out_dir, plan.plan_id, attempt, overwrite=overwrite, restart=restart, on_event=on_event
        )
        with InputHashes(base, ckpt, adapters) as inputs, result:
            output = output_of(plan, result, on_event)
            receipt = carry_out(output, base, located[0], settings, files, inputs, began)
    on_event(done_event(out_dir, receipt))
    return receipt


def announce(plan: Plan, on_event: OnEvent, *, dry_run: bool = False) -> dict[str, Any]:
    """An event for each warning, and the plan's, which is returned. The adapters' copies of base weights,
    which planning did not read, are compared before a merge."""
    for message in plan.warnings if dry_run else plan.all_warnings():
        on_event({"event": "warning", "message": message})
    on_event(event := plan_event(plan))
    return event


def carry_out(
    output: Output,
    base: Checkpoint,
    first: LocatedAdapter,
    settings: Settings,
    files: UnchangedInputs,
    inputs: InputHashes,
    began: float,
) -> dict[str, Any]:
    """Make what an output lacks yet, complete it and give it its name. Returns the receipt."""
    plan = output.plan
    with room_for(output, copied_files(plan, base.folder, first.folders)):
        merge([output], plan.memory, pick_device(settings.device), allow_nonfinite=settings.allow_nonfinite)
        receipt = complete(output, base, first, settings, inputs.result, began)
        files.refuse_changed()
        output.out_dir.commit()
    return receipt


def complete(
    output: Output,
    base: Checkpoint,
    first: LocatedAdapter,
    settings: Settings,
    inputs: Callable[[], list[dict[str, Any]]],
    began: float,
) -> dict[str, Any]:
    """Add to an output that has all its shards what else belongs into it, and check it. `first` is
    the adapter whose tokenizer is taken, `inputs` gives those of the receipt, `began` is when the run did.
    Returns the receipt. Raises ResultError, and the output's own error."""
    if output.error:
        raise output.error
    plan, out_dir = output.plan, output.out_dir
    write_sidecars(plan, base.folder, base.config, first.folders, out_dir)
    verify_shards(plan, output.outcome, out_dir)
    receipt = make_receipt(plan, output.outcome, out_dir, settings, inputs(), time.perf_counter() - began)
    write_json(out_dir, RECEIPT, receipt)
    return receipt


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
        "shards": [
            {"file": shard.file, "nbytes": shard.nbytes, "n_weights": len(shard.steps)}
            for shard in plan.shards
        ],
        "adapter_tensors": {"used": len(plan.used), "ignored": plan.ignored},
        "config_changes": plan.config_changes,
        "held_whole": [
            step.name for step in plan.steps if any(patch.needs.holds_weight for patch in step.patches)
        ],
    }
