"""`lorafuse verify`: is a merged directory what its receipt says, and what its inputs make?"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lorafuse.checkpoint import Checkpoint
from lorafuse.directory import read_receipt, verify_directory
from lorafuse.errors import CheckpointError, ResultError, UsageError, listed, shown
from lorafuse.hub import CHECKPOINT_FILES, local_dir
from lorafuse.pipeline import LocalAdapter, Name, local_adapter, opened, pick_device
from lorafuse.plan import make_plan
from lorafuse.receipt import RECEIPT, InputHashes
from lorafuse.recompute import check_merge
from lorafuse.settings import Settings, parse_nbytes
from lorafuse.several import Weighted


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
    """Check a merged directory against its receipt, and with `ckpt` and `adapters` against what they make, byte by byte: all
    weights, or a `sample` of so many. Writes nothing. Returns what was checked: "files", "nbytes" and "weights" (0 without inputs).
    Raises ResultError at the first difference, UsageError, and for inputs CheckpointError or AdapterError."""
    if (ckpt is None) != (not adapters):
        raise UsageError("A checkpoint without an adapter, or the other way round, says nothing of a merge; give both or neither.")
    path = Path(out_dir)
    if not path.is_dir():
        raise ResultError(f"{shown(path)}: is no directory.")
    receipt = read_receipt(path)
    if not receipt:
        raise ResultError(f"{shown(path)}: has no {RECEIPT}; with the checkpoint and the adapter its weights can be compared.")
    verify_directory(path, receipt, lambda n: on_event({"event": "progress", "nbytes": n}))
    outputs = receipt["outputs"]
    checked = {"files": len(outputs), "nbytes": sum(entry["size"] for entry in outputs), "weights": 0}
    if ckpt is not None:
        base_dir = local_dir(fspath(ckpt), CHECKPOINT_FILES, CheckpointError)
        found = [local_adapter(fspath(one), 1.0, receipt["settings"].get("adapter_name"), on_event) for one in adapters]
        checked["weights"] = _check_inputs(path, receipt, base_dir, found, sample, device, memory_limit, on_event)
    return checked


def _check_inputs(
    path: Path, receipt: dict[str, Any], base_dir: Path, found: Sequence[LocalAdapter], sample: int, device: str,
    memory_limit: str | int, on_event: Callable[[dict[str, Any]], None],
) -> int:  # fmt: skip
    settings = Settings.of_receipt(receipt["settings"], device=device, memory_nbytes=parse_nbytes(memory_limit))
    with closing(Checkpoint(path)) as merged, closing(Checkpoint(base_dir)) as base, opened(found) as adapters:
        with InputHashes(base, str(base_dir), adapters) as inputs:
            weights = _weights(path, receipt, inputs.result(), adapters, settings)
        first, *others = (Weighted(one.adapter, weight) for one, weight in zip(adapters, weights, strict=True))
        plan = make_plan(base, first.adapter, replace(settings, adapter_scale=first.weight), others)
        return check_merge(merged, plan, sample, pick_device(device), on_event)


def _weights(
    path: Path, receipt: dict[str, Any], inputs: list[dict[str, Any]], adapters: Sequence[Weighted], settings: Settings
) -> list[float]:
    """The weight of each adapter, as the receipt says. Raises ResultError unless these are the files that were merged."""

    def identity(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry.get(name) for name in ("role", "size", "sha256"))

    merged = Counter(map(identity, receipt["inputs"]))
    if merged != Counter(map(identity, inputs)):
        names = [shown(entry["path"]) for entry in inputs if identity(entry) not in merged]
        raise ResultError(
            f"{shown(path)}: was merged from other files than these: "
            + (f"{listed(names)} differ from what the receipt says." if names else "the receipt lists more of them.")
        )
    if len(adapters) == 1:
        return [settings.adapter_scale]
    by_hash = {entry["sha256"]: entry["weight"] for entry in receipt["inputs"] if "weight" in entry}
    own = {entry["path"]: entry["sha256"] for entry in inputs}
    return [by_hash[own[f"{one.adapter.name.rstrip('/')}/{one.adapter.file.relative_to(one.adapter.root)}"]] for one in adapters]
