"""`lorafuse_receipt.json`: what was merged into what, from which bytes, and how much of the update was kept.

Schema 1, see docs/receipt.md. Everything except `timing`, `peak_rss` and `tool` is the same from run to run.
Importing this does not import torch, so that reading a receipt does not either.
"""

import os
import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafuse._version import __version__
from lorafuse.files.hashing import FileHash, hash_file
from lorafuse.files.local_folder import LocalFolder
from lorafuse.settings import Settings

if TYPE_CHECKING:
    from lorafuse.merge.destination import Outcome
    from lorafuse.planning.plan import Plan, Step
from lorafuse.receipt.read import SCHEMA


def make_receipt(
    plan: "Plan",
    outcome: "Outcome",
    staging: Path,
    settings: Settings,
    inputs: list[dict[str, Any]],
    wall_s: float,
) -> dict[str, Any]:
    """The receipt of a finished merge, whose files are all in `staging`; those beside the shards are small
    and hashed here."""
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
        "settings": settings.that_decide_bytes,
        "plan_id": plan.plan_id,
        "inputs": inputs,
        "outputs": [
            *(_output(w.file, FileHash(w.nbytes, w.sha256)) for w in outcome.written),
            *_others(outcome, staging),
        ],
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
    names = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
    return [_output(name, hash_file(LocalFolder(staging), name)) for name in sorted(names - shards)]


def _stored(plan: "Plan") -> str:
    """How the weights that the adapter updates are stored, most of them first."""
    schemes = Counter(str(step.sources.scheme) for step in plan.steps if step.action == "merged")
    words = " and in ".join(scheme for scheme, _ in schemes.most_common())
    return f"stored in {words}" if words else "stored"


def _tensor(step: "Step", outcome: "Outcome") -> dict[str, Any]:
    entry: dict[str, Any] = {
        "action": step.action,
        "dtype": step.spec.torch_name,
        "shape": list(step.spec.shape),
    }
    for patch in step.patches:
        entry |= patch.facts
    if step.name in outcome.measures:
        entry |= outcome.measures[step.name].summary()
    if step.encoder.tensors != ((step.name, step.spec),):
        entry["stored"] = {
            tensor.name: {"dtype": tensor.spec.torch_name, "shape": list(tensor.spec.shape)}
            for tensor in step.encoder.tensors
        }
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

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if os.uname().sysname == "Darwin" else 1024
        )
