"""The whole tool on one screen: read this first."""

import time
from collections.abc import Sequence
from contextlib import closing
from os import fspath
from typing import Any, NamedTuple, NoReturn, cast

from lorafuse.arithmetic.arena import pick_device
from lorafuse.arithmetic.torch_state import own_torch_state
from lorafuse.batching.answers import add_answers, refuse_full, speeds_of
from lorafuse.batching.one_pass import Pass, PlannedJob
from lorafuse.events import DoneEvent, OnEvent, PlanEvent, ignore
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.inputs.hashes import InputHashes
from lorafuse.inputs.located import Name, checkpoint_folder, located_adapter, named_weight, opened
from lorafuse.inputs.unchanged import UnchangedInputs
from lorafuse.outdir.kinds import kind_of
from lorafuse.planning.announce import announced
from lorafuse.planning.make_plan import make_plan
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import kept_in_sum
from lorafuse.settings import Settings, parse_nbytes
from lorafuse.trained_base.options import chosen_quants


@own_torch_state()
def convert(
    ckpt: Name,
    adapter: Name,
    out_dir: Name,
    *,
    adapters: Sequence[Name | tuple[Name, float]] = (),
    dtype: str = "auto",
    format: str = "dense",
    keep_dense: Sequence[str] = (),
    rounding: str | None = None,
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
        dtype=dtype, format=format, keep_dense=tuple(keep_dense), rounding=rounding, device=device,
        adapter_scale=adapter_scale, adapter_name=adapter_name,
        max_shard_nbytes=parse_nbytes(max_shard_size), memory_nbytes=parse_nbytes(memory_limit),
        **chosen_quants(format, base_quant=base_quant, double_quant=double_quant, quant_skip=quant_skip,
            quant_blocksize=quant_blocksize, quant_experts=quant_experts, base_quant_from=base_quant_from),
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    named = [(fspath(adapter), settings.adapter_scale), *map(named_weight, adapters)]
    writing = Writing(fspath(out_dir), overwrite, restart, dry_run)
    return cast(dict[str, Any], _convert(fspath(ckpt), named, writing, settings, on_event))


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
) -> Receipt | PlanEvent:
    """The same with checked options. `named`: (adapter, weight) of all adapters."""
    began, (out_dir, overwrite, restart, dry_run) = time.perf_counter(), writing
    device, ckpt_folder = pick_device(settings.device), checkpoint_folder(ckpt)
    folder_names = [settings.adapter_name, *[None] * (len(named) - 1)]
    located = [
        located_adapter(name, weight, folder_name, on_event)
        for (name, weight), folder_name in zip(named, folder_names, strict=True)
    ]
    inputs = [ckpt_folder, *(adapter.root for adapter in located)]
    kind_of(out_dir).check_out_dir(out_dir, inputs, overwrite=overwrite)
    with closing(Checkpoint(ckpt_folder)) as base, opened(located) as adapters:
        plan = make_plan(base, adapters, settings, each_format=dry_run)
        warnings, planned = announced(plan, dry_run=dry_run)
        for warning in warnings:
            on_event(warning)
        if dry_run:
            add_answers(planned, plan, base, adapters, settings, out_dir)
            planned["estimate"] = speeds_of(plan, base, out_dir, device).estimate(plan.shards)
        on_event(planned)
        if dry_run:
            refuse_full(out_dir, planned["disk"])
            return planned
        files = UnchangedInputs(base, adapters)
        files.refuse_nonfinite()
        attempt = files.attempt(plan, settings)
        job = PlannedJob(out_dir, out_dir, settings, plan, files, attempt, on_event)
        receipts: list[Receipt] = []
        with InputHashes(base, ckpt, []) as hashes:
            one_pass = Pass(
                base, hashes.result, device, overwrite, restart,
                on_done=lambda made, receipt: receipts.append(receipt), on_failed=_raise,
            )  # fmt: skip
            one_pass.run([job], plan.memory, began)
    [receipt] = receipts
    on_event(done_event(out_dir, receipt))
    return receipt


def _raise(job: PlannedJob, error: Exception) -> NoReturn:
    raise error


def done_event(out_dir: str, receipt: Receipt) -> DoneEvent:
    """What the receipt says in sum, and what it cost."""
    return {
        "event": "done",
        "out_dir": out_dir,
        "base_semantics": receipt["base_semantics"],
        "update": kept_in_sum(receipt["tensors"]),
        **receipt["timing"],
        "peak_rss": receipt["peak_rss"],
    }
