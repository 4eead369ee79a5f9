"""`lorafuse verify`: is a merged directory what its receipt says, and what its inputs make?"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lorafuse.arithmetic.arena import pick_device
from lorafuse.codecs.plain import values_of
from lorafuse.errors import ResultError, UsageError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.names import RECEIPT
from lorafuse.inputs.hashes import InputHashes
from lorafuse.inputs.located import Name, checkpoint_dir, local_adapter, opened
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.receipt.read import read_receipt
from lorafuse.settings import Settings, parse_nbytes
from lorafuse.verification.against_inputs import check_merge
from lorafuse.verification.against_receipt import verify_directory
from lorafuse.verification.other_tools import relate


def verify(
    out_dir: str | PathLike[str],
    *,
    ckpt: Name | None = None,
    adapters: Sequence[Name] = (),
    sample: int = 0,
    device: str = "auto",
    memory_limit: str | int = "100MB",
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Check a merged directory against its receipt, and with `ckpt` and `adapters` against what they make,
    byte by byte: all weights, or a `sample` of so many. Writes nothing. Returns what was checked: "files",
    "nbytes" and "weights" (0 without inputs). Raises ResultError at the first difference, UsageError, and for
    inputs CheckpointError or AdapterError.

    A directory without a receipt, which another tool made, is compared with its inputs: the result has
    "relations" and, as "related", what each weight is (`relate.relate`), whatever that is.
    """
    if (ckpt is None) != (not adapters):
        raise UsageError(
            "A checkpoint without an adapter, or the other way round, says nothing of a merge; give both or "
            "neither."
        )
    path = Path(out_dir)
    if not path.is_dir():
        raise ResultError(f"{shown(path)}: is no directory.")
    receipt = read_receipt(path)
    if not receipt and ckpt is None:
        raise ResultError(
            f"{shown(path)}: has no {RECEIPT}; with the checkpoint and the adapter its weights can be "
            "compared."
        )
    own: dict[str, Any] = {"device": device, "memory_nbytes": parse_nbytes(memory_limit)}
    settings = (
        Settings.of_receipt(receipt["settings"], **own) if receipt else Settings(dtype="float32", **own)
    )
    checked: dict[str, Any] = {"files": 0, "nbytes": 0, "weights": 0}
    if receipt:
        verify_directory(path, receipt, lambda n: on_event({"event": "progress", "nbytes": n}))
        outputs = receipt["outputs"]
        checked |= {"files": len(outputs), "nbytes": sum(entry["size"] for entry in outputs)}
    if ckpt is None:
        return checked
    base_dir = checkpoint_dir(fspath(ckpt))
    located = [local_adapter(fspath(one), 1.0, None, on_event) for one in adapters]
    with closing(Checkpoint(path)) as found, closing(Checkpoint(base_dir)) as base, opened(located) as given:
        if not receipt:
            plan = make_plan(base, given[0].adapter, settings, given[1:], encoder_of=values_of)
            return checked | relate(plan, found, on_event)
        with InputHashes(base, str(base_dir), given) as inputs:
            weights = _weights(path, receipt, inputs.result(), given, settings)
        first, *others = (
            WeightedAdapter(one.adapter, weight) for one, weight in zip(given, weights, strict=True)
        )
        plan = make_plan(base, first.adapter, replace(settings, adapter_scale=first.weight), others)
        return checked | {"weights": check_merge(found, plan, sample, pick_device(device), on_event)}


def _weights(
    path: Path,
    receipt: dict[str, Any],
    inputs: list[dict[str, Any]],
    adapters: Sequence[WeightedAdapter],
    settings: Settings,
) -> list[float]:
    """The weight of each adapter, as the receipt says. Raises ResultError unless these are the files that
    were merged."""

    def identity(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(name) for name in ("role", "size", "sha256"))

    merged = Counter(map(identity, receipt["inputs"]))
    if merged != Counter(map(identity, inputs)):
        names = [shown(entry["path"]) for entry in inputs if identity(entry) not in merged]
        raise ResultError(
            f"{shown(path)}: was merged from other files than these: "
            + (
                f"{listed(names)} differ from what the receipt says."
                if names
                else "the receipt lists more of them."
            )
        )
    if len(adapters) == 1:
        return [settings.adapter_scale]
    by_hash = {entry["sha256"]: entry["weight"] for entry in receipt["inputs"] if "weight" in entry}
    own = {entry["path"]: entry["sha256"] for entry in inputs}
    return [
        by_hash[own[f"{one.adapter.name.rstrip('/')}/{one.adapter.file.relative_to(one.adapter.root)}"]]
        for one in adapters
    ]
