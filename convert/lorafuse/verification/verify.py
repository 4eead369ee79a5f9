"""`lorafuse verify`: is a merged directory what its receipt says, and what its inputs make?"""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import torch

from lorafuse.arguments import checked
from lorafuse.arithmetic.devices import choose_device
from lorafuse.arithmetic.torch_state import own_torch_state
from lorafuse.codecs import open_weights
from lorafuse.errors import ResultError, UsageError, shown
from lorafuse.events import OnEvent, ignore
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.hub import folder_of
from lorafuse.files.local_folder import directory_as_typed
from lorafuse.files.names import RECEIPT
from lorafuse.formats.dense import Values
from lorafuse.inputs.fetching import fetch_shards
from lorafuse.inputs.located import (
    Name,
    asks_for_base,
    checkpoint_folder,
    located_adapter,
    named_base,
    opened,
)
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.plan import Plan
from lorafuse.planning.work import work_of
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import read_receipt
from lorafuse.settings import Settings, parse_nbytes
from lorafuse.verification.against_inputs import check_merge
from lorafuse.verification.against_receipt import verify_directory
from lorafuse.verification.made_again import check_files, check_receipt
from lorafuse.verification.merged_adapters import in_merged_order
from lorafuse.verification.other_tools import relate


@checked
@own_torch_state()
def verify(
    out_dir: str | PathLike[str],
    *,
    ckpt: Name | None = None,
    adapters: Sequence[Name] = (),
    sample: int = 0,
    device: str = "auto",
    memory_limit: str | int = "100MB",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Check a merged directory, or a result on the hub, against its receipt, and with `ckpt` and `adapters`
    against what they make, byte by byte: all weights, or a `sample` of so many. Changes nothing. Returns what
    was checked: "files", "nbytes" and "weights" (0 without inputs). Raises ResultError at the first
    difference, UsageError, StorageError, and for inputs CheckpointError or AdapterError.

    A directory without a receipt, which another tool made, is compared with its inputs: the result has
    "relations" and, as "related", what each weight is (`other_tools.relate`), whatever that is.
    """
    if (ckpt is None) != (not adapters):
        raise UsageError(
            "A checkpoint without an adapter, or the other way round, says nothing of a merge; give both or "
            "neither."
        )
    if sample and ckpt is None:
        raise UsageError("--sample N compares weights with what the inputs make; give --ckpt and --adapter.")
    # Files on the hub are read once without inputs, and more often beside these: then from the cache.
    folder = folder_of(directory_as_typed(out_dir), ResultError, whole=ckpt is not None)
    receipt = read_receipt(folder)
    if not receipt and ckpt is None:
        raise ResultError(
            f"{shown(folder)}: has no {RECEIPT}; with the checkpoint and the adapter its weights can be "
            "compared."
        )
    settings = _settings_of(receipt, device, parse_nbytes(memory_limit))
    checked = {"files": 0, "nbytes": 0, "weights": 0} | _against_receipt(folder, receipt, on_event)
    if ckpt is None:
        return checked
    located = [located_adapter(directory_as_typed(adapter), 1.0, None, on_event) for adapter in adapters]
    with opened(located) as given, closing(_checkpoint(directory_as_typed(ckpt), given)) as base:
        fetch_shards(base)
        inputs = MergeInputs(base, given)
        if receipt:
            return checked | _against_inputs(folder, receipt, inputs, settings, sample, on_event)
        return checked | _another_tools(folder, inputs, settings, on_event)


def _checkpoint(name: str, adapters: Sequence[WeightedAdapter]) -> Checkpoint:
    """The checkpoint of that name; of "auto", that which the config of the first adapter names."""
    first = adapters[0].adapter
    return Checkpoint(
        checkpoint_folder(named_base(first.folder, first.config) if asks_for_base(name) else name)
    )


class MergeInputs(NamedTuple):
    """What was merged, as it was given."""

    base: Checkpoint
    adapters: Sequence[WeightedAdapter]


def _another_tools(
    folder: Folder, inputs: MergeInputs, settings: Settings, on_event: OnEvent
) -> dict[str, Any]:
    weights = open_weights(inputs.base)
    plan = make_plan(inputs.base, inputs.adapters, settings, weights, make_format=Values)
    with closing(Checkpoint(folder)) as merged:
        return relate(plan, weights, merged, _device(settings, plan), on_event)


def _against_inputs(
    folder: Folder,
    receipt: Receipt,
    inputs: MergeInputs,
    settings: Settings,
    sample: int,
    on_event: OnEvent,
) -> dict[str, Any]:
    """How many weights the inputs make. All else that they make is compared as well."""
    base, given = inputs
    plan = make_plan(base, in_merged_order(folder, receipt, base, given, settings.adapter_scale), settings)
    with closing(Checkpoint(folder)) as merged:
        n_weights, outcome = check_merge(merged, plan, sample, _device(settings, plan), on_event)
    check_files(folder, receipt, plan, base)
    check_receipt(folder, receipt, plan, outcome, settings, several=len(given) > 1)
    return {"weights": n_weights}


def _device(settings: Settings, plan: Plan) -> torch.device:
    return choose_device(settings.device, partial(work_of, plan)).device


def _settings_of(receipt: Receipt | None, device: str, memory_nbytes: int) -> Settings:
    """Those that the result was made with; without a receipt, those that compare it in fp32."""
    if not receipt:
        return Settings(dtype="float32", device=device, memory_nbytes=memory_nbytes)
    return Settings.of_receipt(receipt["settings"], device=device, memory_nbytes=memory_nbytes)


def _against_receipt(folder: Folder, receipt: Receipt | None, on_event: OnEvent) -> dict[str, Any]:
    """How many files and bytes are what the receipt says; nothing without a receipt."""
    if not receipt:
        return {}
    verify_directory(folder, receipt, lambda n: on_event({"event": "progress", "nbytes": n}))
    outputs = receipt["outputs"]
    return {"files": len(outputs), "nbytes": sum(entry["size"] for entry in outputs)}
