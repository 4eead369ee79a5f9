"""batch(): many adapters, each into a result of its own, with few passes over the base."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from lorafuse.arguments import checked
from lorafuse.arithmetic.devices import check_device, choose_device
from lorafuse.arithmetic.torch_state import own_torch_state
from lorafuse.batching.base_of_all import base_of_all
from lorafuse.batching.common_files import CommonFiles
from lorafuse.batching.destinations import Destinations
from lorafuse.batching.existing_results import ExistingResults
from lorafuse.batching.jobs import Job, JobState, checked_share, refuse_overlap, share_of
from lorafuse.batching.jobs_afar import listed_jobs
from lorafuse.batching.one_pass import Pass
from lorafuse.batching.passes import Batch
from lorafuse.batching.publication import refuse_push_of_store
from lorafuse.batching.pushes import pushes_of
from lorafuse.batching.rehearsal import Rehearsal
from lorafuse.batching.spread import ChosenEngine, checked_engine
from lorafuse.batching.spread_jobs import spread_jobs
from lorafuse.errors import LorafuseError, UsageError, shown
from lorafuse.events import OnEvent, ignore
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.folders import open_folder
from lorafuse.files.hub import as_named
from lorafuse.files.local_folder import as_typed, directory_as_typed
from lorafuse.files.seen import there_around
from lorafuse.files.sharing import SHARE_CHOICES
from lorafuse.inputs.hashes import InputHashes
from lorafuse.inputs.located import Name, asks_for_base, checkpoint_folder, located_adapter
from lorafuse.outdir.kinds import kind_of
from lorafuse.planning.work import work_of_batch
from lorafuse.settings import AUTO, Push, Settings, parse_nbytes
from lorafuse.trained_base.beside_adapter import settled
from lorafuse.trained_base.options import chosen_quants


@checked
@own_torch_state()
def batch(
    ckpt: Name, jobs: Name, out_root: Name, *,
    dtype: str = "auto", format: str = "dense", keep_dense: Sequence[str] = (), rounding: str | None = None,
    max_shard_size: str | int = "5GB", device: str = "auto", memory_limit: str | int = "100MB",
    adapter_scale: float = 1.0,
    base_quant: str = "none", double_quant: bool = True, quant_blocksize: int = 64,
    quant_skip: Sequence[str] = (), quant_experts: bool = False, base_quant_from: Name | None = None,
    share: str = "auto", index: int | None = None, of: int | None = None,
    engine: str = "local", address: str | None = None,
    allow_nonfinite: bool = False, overwrite: bool = False, restart: bool = False, dry_run: bool = False,
    stream: bool = False, push_to_hub: str | Push | None = None,
    on_event: OnEvent = ignore,
) -> list[JobState]:  # fmt: skip
    """Merge many adapters into one checkpoint, each into `out_root`/NAME, to the byte what `convert` makes.

    `ckpt` may be "auto", the base that all adapters' configs name. `jobs` is a directory whose
    sub-directories are adapters, or a JSONL file of {"adapter", "name"?, "scale"?, "dtype"?, "format"?,
    "repo"?}; `index` and `of` choose a share of them (default: that of a Slurm array task or a Kubernetes
    Indexed Job, else all). A result that is there already and was made from the same inputs with the same
    settings is skipped. `share` says how files that no adapter changes are shared between results: "reflink",
    "hardlink", "copy", or "auto", the first that works. `push_to_hub`: a pattern of repositories, such as
    "me/{name}"; results stay here, too. `engine`: "ray" has the jobs done by workers of Ray. The other
    options are those of `convert`. Returns a state for each job; a failed job does not cost the others.
    `on_event` gets the events of `convert` with a "job" more, "pass" and "job". Raises a LorafuseError or an
    OSError when no job can go on; the same call goes on with the rest.
    """
    settings = Settings(
        dtype=dtype, format=format, keep_dense=tuple(keep_dense), rounding=rounding, device=device,
        allow_nonfinite=allow_nonfinite, adapter_scale=adapter_scale,
        max_shard_nbytes=parse_nbytes(max_shard_size), memory_nbytes=parse_nbytes(memory_limit),
        **chosen_quants(format, base_quant=base_quant, double_quant=double_quant, quant_skip=quant_skip,
            quant_blocksize=quant_blocksize, quant_experts=quant_experts, base_quant_from=base_quant_from),
    )  # fmt: skip
    push = Push(push_to_hub) if isinstance(push_to_hub, str) else push_to_hub
    chosen = Chosen(share, overwrite, restart, dry_run, stream, push)
    beside = {"index": index is not None, "of": of is not None, "stream": stream, "push-to-hub": bool(push)}
    spread_by = checked_engine(engine, address, beside)
    number = (0, 1) if spread_by else checked_share(index, of, os.environ)
    wanted = WantedBatch(directory_as_typed(ckpt), as_typed(jobs), as_typed(out_root), settings, chosen)
    return _shared_out(wanted, number, spread_by if not dry_run else None, on_event)


@dataclass(frozen=True)
class Chosen:
    """What the caller chose beside the settings of a merge. Raises UsageError."""

    share: str
    overwrite: bool
    restart: bool
    dry_run: bool
    stream: bool
    push: Push | None

    def __post_init__(self) -> None:
        if self.share not in SHARE_CHOICES:
            raise UsageError(f"--share is {shown(self.share)}; expected one of {', '.join(SHARE_CHOICES)}.")


class WantedBatch(NamedTuple):
    """A call with checked options."""

    ckpt: str
    jobs: str
    out_root: str
    settings: Settings
    chosen: Chosen


def _shared_out(
    wanted: WantedBatch, number: tuple[int, int], spread_by: ChosenEngine | None, on_event: OnEvent
) -> list[JobState]:
    """Do the jobs of a share, or have them done."""
    kind_of(wanted.out_root)  # before it is looked at as a folder: the scheme must be known
    everything, others = listed_jobs(wanted.jobs)
    for name in others:
        on_event({"event": "warning", "message": f"{shown(name)}: holds no adapter, and is left out."})
    todo = share_of(everything, *number)
    if spread_by:  # what concerns all jobs is looked at here, not by each worker
        wanted = wanted._replace(ckpt=_named_ckpt(wanted.ckpt, everything))
        refuse_overlap(everything, open_folder(wanted.out_root), checkpoint_folder(wanted.ckpt))
        quant = wanted.settings.base_quant
        by_worker = partial(_by_worker, wanted, everything if quant and quant.kind == AUTO else None)
        sees = [wanted.ckpt, there_around(wanted.out_root)]
        return spread_jobs(todo, wanted.settings, spread_by, sees, by_worker, on_event)
    return _batch(wanted, everything, todo, on_event)


def _named_ckpt(ckpt: str, jobs: Sequence[Job]) -> str:
    """The checkpoint, be it that which all adapters name."""
    return base_of_all(jobs) if asks_for_base(ckpt) else ckpt


def _by_worker(
    wanted: WantedBatch, everything: Sequence[Job] | None, todo: Sequence[Job], settings: Settings
) -> Callable[[OnEvent], list[JobState]]:
    """The call that does some of the jobs in another process. `everything`: where that needs them all."""
    return partial(_batch, wanted._replace(settings=settings), everything or todo, todo)


def _batch(
    wanted: WantedBatch, everything: Sequence[Job], todo: Sequence[Job], on_event: OnEvent
) -> list[JobState]:
    """Do some of all jobs."""
    ckpt, _, out_root, settings, chosen = wanted
    root = open_folder(out_root)
    pushes = pushes_of(everything, chosen.push)
    if pushes:
        refuse_push_of_store(out_root)
    check_device(settings.device)
    ckpt = _named_ckpt(ckpt, everything)
    ckpt_folder = checkpoint_folder(ckpt)
    refuse_overlap(everything, root, ckpt_folder)
    with closing(Checkpoint(ckpt_folder)) as base, InputHashes(base, as_named(ckpt), []) as hashes:
        settings = settled(settings, base, _folders(everything))
        # By all jobs, so that a call that goes on with some of them has the same device.
        work = partial(work_of_batch, base, len(everything), settings.n_workers)
        choice = choose_device(settings.device, work)
        settings, device = replace(settings, device=choice.name), choice.device
        finished = ExistingResults(root, settings, hashes.result)
        common_files = CommonFiles(finished, chosen.share)
        under_way = Batch(
            base, root, settings, finished, common_files, deque(todo), on_event,
            Rehearsal(base, str(root), chosen.share, device) if chosen.dry_run else None, chosen.overwrite,
            chosen.stream, Destinations(as_named(ckpt), pushes),
        )  # fmt: skip
        one_pass = Pass(
            base, hashes.result, device, chosen.overwrite, chosen.restart, under_way.done, under_way.failed,
            common_files.divide, asks_for_room=False,  # a batch asks while it puts the pass together
            stream=chosen.stream,
        )  # fmt: skip
        under_way.run(one_pass)
    return [under_way.states[job.name] for job in todo]


def _folders(jobs: Sequence[Job]) -> Iterator[Folder]:
    """The folders of all adapters. What is wrong with an adapter is its own job's error."""
    for job in jobs:
        try:
            yield from located_adapter(job.adapter, 1.0, None, ignore).folders
        except (LorafuseError, OSError):
            continue
