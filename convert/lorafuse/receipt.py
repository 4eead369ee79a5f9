"""`lorafuse_receipt.json`: what was merged into what, from which bytes, and how much of the update was kept.

Schema 1, see docs/receipt.md. Everything except `timing`, `peak_rss` and `tool` is the same from run to run. Importing this
does not import torch, so that reading a receipt does not either.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from lorafuse._version import __version__
from lorafuse.checkpoint import Checkpoint
from lorafuse.hashing import FileHash, hash_file
from lorafuse.settings import Settings

if TYPE_CHECKING:
    from lorafuse.outputs import Outcome
    from lorafuse.several import Weighted
    from lorafuse.steps import Plan, Step

SCHEMA = 1


class InputHashes:
    """sha256 of every input file, taken in a thread beside the merge; leaving the context early stops it."""

    def __init__(self, ckpt: Checkpoint, ckpt_name: str, adapters: Sequence["Weighted"]) -> None:
        files = (ckpt.path / "config.json", *(shard.path for shard in ckpt.shards))
        self._files = [(path, _entry("checkpoint", ckpt_name, ckpt.path, path)) for path in files]
        for one in adapters:
            self._files += _adapter_files(one, {"weight": one.weight} if len(adapters) > 1 else {})
        self._stop = Event()
        self._executor = ThreadPoolExecutor(1, "hash")

    def __enter__(self) -> "InputHashes":
        self._future = self._executor.submit(lambda: [entry | self._hashed(path) for path, entry in self._files])
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown()

    def result(self) -> list[dict[str, Any]]:
        """role, path (the input as it was named, then the file), size and sha256 of each file; with several adapters also the
        weight of each."""
        return self._future.result()

    def _hashed(self, path: Path) -> dict[str, Any]:
        return hash_file(path, self._go_on)._asdict()

    def _go_on(self, _: int) -> None:
        if self._stop.is_set():
            raise CancelledError


def adapter_hashes(one: "Weighted", hashed: Callable[[Path], FileHash]) -> list[dict[str, Any]]:
    """The same for the files of one adapter, at once."""
    return [entry | hashed(path)._asdict() for path, entry in _adapter_files(one, {})]


def _adapter_files(one: "Weighted", facts: dict[str, float]) -> list[tuple[Path, dict[str, Any]]]:
    adapter = one.adapter
    return [(path, _entry("adapter", adapter.name, adapter.root, path) | facts) for path in adapter.files]


def _entry(role: str, name: str, root: Path, path: Path) -> dict[str, Any]:
    return {"role": role, "path": f"{name.rstrip('/')}/{path.relative_to(root)}"}


def make_receipt(
    plan: "Plan", outcome: "Outcome", staging: Path, settings: Settings, inputs: list[dict[str, Any]], wall_s: float
) -> dict[str, Any]:
    """The receipt of a finished merge, whose files are all in `staging`; those beside the shards are small and hashed here."""
    import torch

    timing = {"wall_s": wall_s, **vars(outcome.timing)}
    return {
        "schema": SCHEMA,
        "tool": {
            "name": "lorafuse",
            "version": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "settings": settings.decisive,
        "plan_id": plan.plan_id,
        "inputs": inputs,
        "outputs": [*(_output(w.file, FileHash(w.nbytes, w.sha256)) for w in outcome.written), *_others(outcome, staging)],
        "tensors": {step.name: _tensor(step, outcome) for step in plan.steps},
        "adapter_tensors": {"used": plan.used, "ignored": plan.ignored},
        "base_semantics": f"simulated: {settings.base_quant}" if settings.base_quant else _stored(plan),
        "timing": {name: round(seconds, 4) for name, seconds in timing.items()},
        "peak_rss": peak_rss(),
    }


def _output(file: str, found: FileHash) -> dict[str, Any]:
    return {"file": file, **found._asdict()}


def _others(outcome: "Outcome", staging: Path) -> list[dict[str, Any]]:
    """The files of a directory that are no shards of it, in sub-folders too."""
    shards = {w.file for w in outcome.written}
    files = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
    return [_output(name, hash_file(files[name])) for name in sorted(files.keys() - shards)]


def _stored(plan: "Plan") -> str:
    """How the weights that the adapter updates are stored, most of them first."""
    schemes = Counter(str(step.sources.scheme) for step in plan.steps if step.action == "merged")
    words = " and in ".join(scheme for scheme, _ in schemes.most_common())
    return f"stored in {words}" if words else "stored"


def _tensor(step: "Step", outcome: "Outcome") -> dict[str, Any]:
    entry: dict[str, Any] = {"action": step.action, "dtype": step.spec.torch_name, "shape": list(step.spec.shape)}
    for patch in step.patches:
        entry |= patch.facts
    if step.name in outcome.measures:
        entry |= outcome.measures[step.name].summary()
    if not step.changes and step.sources.names[0] != step.name:
        entry["source"] = step.sources.names[0]  # of a replicated layer
    return entry


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    # Not ru_maxrss: a child starts with its parent's, until it execs something larger.
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
