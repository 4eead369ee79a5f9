"""The whole tool on one screen: read this first."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

import torch

from lorafuse.arguments import checked
from lorafuse.arithmetic.devices import check_device, choose_device
from lorafuse.arithmetic.torch_state import own_torch_state
from lorafuse.batching.answers import add_answers, refuse_full, speeds_of
from lorafuse.batching.division import Division, announce_parts, checked_division, part_of
from lorafuse.batching.one_pass import Pass, PlannedJob
from lorafuse.batching.publication import Publication, publication_of, refuse_push_of_store
from lorafuse.batching.spread import ChosenEngine, checked_engine, spread
from lorafuse.errors import CheckpointError, UsageError, shown
from lorafuse.events import DoneEvent, OnEvent, PartEvent, PlanEvent, ignore, warned_once
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.folders import open_folder
from lorafuse.files.hub import as_named
from lorafuse.files.local_folder import as_typed, directory_as_typed
from lorafuse.inputs.hashes import InputHashes
from lorafuse.inputs.located import (
    Name,
    asks_for_base,
    checkpoint_folder,
    located_adapter,
    named_base,
    named_weight,
    opened,
)
from lorafuse.inputs.unchanged import UnchangedInputs
from lorafuse.outdir.kinds import kind_of
from lorafuse.planning.announce import announced
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.plan import Plan
from lorafuse.planning.work import work_of
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import kept_in_sum
from lorafuse.receipt.write import peak_rss
from lorafuse.settings import JOB_NAME, Push, Settings, parse_nbytes
from lorafuse.trained_base.beside_adapter import settled
from lorafuse.trained_base.options import chosen_quants


@checked
@own_torch_state()
def convert(
    ckpt: Name, adapter: Name, out_dir: Name, *,
    adapters: Sequence[Name | tuple[Name, float]] = (),
    dtype: str = "auto", format: str = "dense", keep_dense: Sequence[str] = (), rounding: str | None = None,
    max_shard_size: str | int = "5GB", device: str = "auto", memory_limit: str | int = "100MB",
    adapter_scale: float = 1.0, adapter_name: str | None = None,
    base_quant: str = "none", double_quant: bool = True, quant_blocksize: int = 64,
    quant_skip: Sequence[str] = (), quant_experts: bool = False, base_quant_from: Name | None = None,
    allow_nonfinite: bool = False, overwrite: bool = False, restart: bool = False, dry_run: bool = False,
    stream: bool = False, push_to_hub: str | Push | None = None, card: bool = False,
    index: int | None = None, of: int | None = None, commit: bool = False,
    engine: str = "local", address: str | None = None,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Merge a PEFT or MLX-LM adapter into a checkpoint and write the result to `out_dir`.

    `ckpt` and `adapter` are directories, hub ids `org/name[/folder][@revision]` or their URLs; `ckpt` may be
    "auto", the base that the adapter's config names. `adapter_name` chooses a sub-folder of `adapter`.
    `adapters`: further ones, or pairs (adapter, weight); `adapter_scale`: the weight of `adapter`, whose
    tokenizer is taken. `base_quant` and the five after it: how training quantized this full-precision base
    (`trained_base.options.chosen_base_quant`). `stream`: a base on the hub is fetched ahead of the merge, and
    removed behind it. `push_to_hub`: a repository, or a Push with more details, that gets the result; with
    `stream` no weights stay here, and `out_dir` is not made. `card`: write README.md. `index` and `of`: make
    only the files that fall to worker `index` (from 0) of `of`; `commit`: give the result that all workers
    have made its name. `engine`: "ray" has the files made by workers of Ray, of the cluster at `address` or,
    without, on this machine. Returns the receipt; with `dry_run` the plan, with `index` what the worker made.
    `on_event` gets a dict for each "event" (`events.py`). Raises a LorafuseError or
    an OSError; then `out_dir` is as it was, and after an I/O error or an interruption the same call goes on,
    unless `restart`.
    """
    settings = Settings(
        dtype=dtype, format=format, keep_dense=tuple(keep_dense), rounding=rounding, device=device,
        adapter_scale=adapter_scale, adapter_name=adapter_name,
        max_shard_nbytes=parse_nbytes(max_shard_size), memory_nbytes=parse_nbytes(memory_limit),
        **chosen_quants(format, base_quant=base_quant, double_quant=double_quant, quant_skip=quant_skip,
            quant_blocksize=quant_blocksize, quant_experts=quant_experts, base_quant_from=base_quant_from),
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    named = [named_weight((adapter, settings.adapter_scale)), *map(named_weight, adapters)]
    push = Push(push_to_hub) if isinstance(push_to_hub, str) else push_to_hub
    if push and JOB_NAME in push.repo:
        raise UsageError(f"--push-to-hub is {push.repo!r}; {JOB_NAME} is for a batch.")
    card = card or bool(push)
    division = checked_division(index, of, commit=commit, restart=restart, dry_run=dry_run, published=card)
    chosen = checked_engine(engine, address, {"of": bool(division), "commit": commit, "stream": stream})
    writing = Writing(
        as_typed(out_dir), overwrite, restart, dry_run, stream, push, card, division, commit, chosen
    )  # fmt: skip
    wanted = Wanted(directory_as_typed(ckpt), named, writing, settings)
    return cast(dict[str, Any], _convert(wanted, warned_once(on_event) if chosen else on_event))


class Writing(NamedTuple):
    """What is written, if anything, and what becomes of what is there. `plan_id`: that of the call that has a
    part made."""

    out_dir: str
    overwrite: bool
    restart: bool
    dry_run: bool
    stream: bool
    push: Push | None
    card: bool
    division: Division | None
    commit: bool
    engine: ChosenEngine | None = None
    plan_id: str | None = None


class Wanted(NamedTuple):
    """A call with checked options. `named`: (adapter, weight) of all adapters."""

    ckpt: str
    named: Sequence[tuple[str, float]]
    writing: Writing
    settings: Settings


def _convert(wanted: Wanted, on_event: OnEvent) -> Receipt | PlanEvent | PartEvent:
    """The same with checked options."""
    began, (ckpt, named, writing, settings) = time.perf_counter(), wanted
    check_device(settings.device)
    check = partial(_check_out_dir, writing)
    check(map(open_folder, [ckpt, *(name for name, _ in named)]))  # before anything is fetched
    folder_names = [settings.adapter_name, *[None] * (len(named) - 1)]
    located = [
        located_adapter(name, weight, folder_name, on_event)
        for (name, weight), folder_name in zip(named, folder_names, strict=True)
    ]
    with opened(located) as adapters:
        if asks_for_base(ckpt):
            ckpt = named_base(adapters[0].adapter.folder, adapters[0].adapter.config)
        ckpt_folder = checkpoint_folder(ckpt)
        check([ckpt_folder, *(adapter.root for adapter in located)])
        with closing(Checkpoint(ckpt_folder)) as base:
            settings = settled(settings, base, [folder for each in located for folder in each.folders])
            held = kind_of(writing.out_dir).held_nbytes
            plan = make_plan(base, adapters, settings, each_format=writing.dry_run, held_by_writing=held)
            chosen = choose_device(settings.device, partial(work_of, plan))
            settings, device = replace(settings, device=chosen.name), chosen.device
            warnings, planned = announced(plan, dry_run=writing.dry_run)
            for warning in warnings:
                on_event(warning)
            if writing.division:
                announce_parts(planned, plan, writing.division)
            if writing.dry_run:
                add_answers(planned, plan, base, adapters, settings, writing.out_dir)
                planned["device"] = chosen.said
                planned["estimate"] = speeds_of(plan, base, writing.out_dir, device).estimate(plan.shards)
            on_event(planned)
            if writing.dry_run:
                if not writing.push:  # then little of the result need be here at once
                    refuse_full(writing.out_dir, planned["disk"])
                return planned
            files = UnchangedInputs(base, adapters)
            files.refuse_nonfinite()
            publication = publication_of(writing.push, as_named(ckpt), base, adapters, stream=writing.stream)
            job = _job(plan, files, publication, writing, settings, on_event)
            if part := part_of(job, writing.division):
                return _part_made(part, base, device, writing, began)
            receipt = _made(job, as_named(ckpt), base, device, wanted, began)
            on_event(done_event(writing.out_dir, receipt, publication))
            return receipt


def _job(
    plan: Plan,
    files: UnchangedInputs,
    publication: Publication,
    writing: Writing,
    settings: Settings,
    on_event: OnEvent,
) -> PlannedJob:
    """What is going to be made. Raises CheckpointError for a worker that was called for another plan."""
    if writing.plan_id not in (None, plan.plan_id):
        raise CheckpointError(
            f"{shown(writing.out_dir)}: a worker sees another checkpoint or adapter than who called it."
        )
    attempt = files.attempt(plan, settings)
    if not publication.keeps:  # what an earlier run finished lies there
        attempt.command["push_to_hub"] = str(writing.push)
    return PlannedJob(
        writing.out_dir, writing.out_dir, settings, plan, files, attempt, on_event,
        publication=publication if writing.card else None, commits=writing.commit or bool(writing.engine),
    )  # fmt: skip


def _check_out_dir(writing: Writing, inputs: Iterable[Folder]) -> None:
    if writing.push:
        refuse_push_of_store(writing.out_dir)
    kind_of(writing.out_dir).check_out_dir(writing.out_dir, inputs, overwrite=writing.overwrite)


def _made(
    job: PlannedJob, ckpt: str, base: Checkpoint, device: torch.device, wanted: Wanted, began: float
) -> Receipt:
    """Carry it out, or have its parts made by the workers of an engine. Returns the receipt."""
    writing, receipts = wanted.writing, list[Receipt]()
    with InputHashes(base, ckpt, []) as hashes:
        if writing.engine:
            inputs = [wanted.ckpt, *(name for name, _ in wanted.named)]
            by_worker = partial(_part_by_worker, wanted)
            job = spread(job, writing.engine, by_worker, inputs=inputs, restart=writing.restart)
        one_pass = Pass(
            base, hashes.result, device, writing.overwrite, writing.restart,
            on_done=lambda made, receipt: receipts.append(receipt), on_failed=_raise, stream=writing.stream,
        )  # fmt: skip
        one_pass.run([job], job.plan.memory, began)
    [receipt] = receipts
    return receipt


def _part_by_worker(
    wanted: Wanted, plan_id: str, division: Division, settings: Settings
) -> Callable[[OnEvent], Any]:
    """The call that makes a part in another process."""
    writing = wanted.writing._replace(
        restart=False, push=None, card=False, division=division, engine=None, plan_id=plan_id
    )
    return partial(_convert, wanted._replace(writing=writing, settings=settings))


def _part_made(
    job: PlannedJob, base: Checkpoint, device: torch.device, writing: Writing, began: float
) -> PartEvent:
    """Carry out what falls to a worker, and say so."""
    assert job.part
    one_pass = Pass(
        base, list, device, writing.overwrite, writing.restart,
        on_done=lambda made, receipt: None, on_failed=_raise, stream=writing.stream,
    )  # fmt: skip
    one_pass.run([job], job.plan.memory, began)
    own = [shard for shard in job.plan.shards if shard.file in job.part.files]
    made: PartEvent = {
        "event": "part", "out_dir": job.out_dir, "index": job.part.which.index, "of": job.part.which.of,
        "n_shards": len(own), "nbytes": sum(shard.nbytes for shard in own),
        "wall_s": time.perf_counter() - began, "peak_rss": peak_rss(),
    }  # fmt: skip
    job.on_event(made)
    return made


def _raise(job: PlannedJob, error: Exception) -> NoReturn:
    raise error


def done_event(out_dir: str, receipt: Receipt, publication: Publication | None = None) -> DoneEvent:
    """What the receipt says in sum, and what it cost."""
    said = {"event": "done", "out_dir": out_dir, "base_semantics": receipt["base_semantics"]}
    update = kept_in_sum(receipt["tensors"], receipt["settings"])
    done = cast(DoneEvent, {**said, "update": update, **receipt["timing"], "peak_rss": receipt["peak_rss"]})
    if publication and publication.upload:
        done["url"], done["kept_here"] = publication.upload.url, publication.keeps
    return done
