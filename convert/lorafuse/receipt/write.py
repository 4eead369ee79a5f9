"""`lorafuse_receipt.json`: what was merged into what, from which bytes, and how much of the update was kept.

Schema 1, see docs/receipt.md. Everything except `timing`, `peak_rss` and `tool` is the same from run to run.
Importing this does not import torch, so that reading a receipt does not either.
"""

import os
import platform
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from lorafuse._version import __version__
from lorafuse.arithmetic import kernel
from lorafuse.files.folder import FileHash
from lorafuse.receipt.fields import (
    SCHEMA,
    InputEntry,
    OutputEntry,
    Receipt,
    StoredSpec,
    TensorEntry,
    TimingEntry,
)
from lorafuse.settings import Settings

if TYPE_CHECKING:
    from lorafuse.files.tensors import TensorSpec
    from lorafuse.merge.destination import Outcome, Timing
    from lorafuse.outdir.out_dir import OutDir
    from lorafuse.planning.plan import Plan, Step


def make_receipt(
    plan: "Plan",
    outcome: "Outcome",
    out_dir: "OutDir",
    settings: Settings,
    inputs: list[InputEntry],
    wall_s: float,
) -> Receipt:
    """The receipt of a finished merge, whose files are all in `out_dir`; those beside the shards are small
    and hashed here."""
    import torch

    receipt: Receipt = {
        "schema": SCHEMA,
        "tool": {
            "name": "lorafuse",
            "version": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernel": kernel.described(),
            "device": settings.device,
        },
        "settings": settings.that_decide_bytes,
        "plan_id": plan.plan_id,
        "inputs": inputs,
        "outputs": [
            *(_output(w.file, FileHash(w.nbytes, w.sha256)) for w in outcome.written),
            *_others(outcome, out_dir),
        ],
        "tensors": {step.name: tensor_entry(step, outcome) for step in plan.steps},
        "adapter_tensors": {"used": plan.used, "ignored": plan.ignored},
        "base_semantics": base_semantics(plan, settings),
        "timing": _timing(wall_s, outcome.timing),
        "peak_rss": peak_rss(),
    }
    if plan.dropped:
        receipt["dropped"] = plan.dropped
    return receipt


def _timing(wall_s: float, spent: "Timing") -> TimingEntry:
    return {
        "wall_s": round(wall_s, 4),
        "compute_cpu_s": round(spent.compute_cpu_s, 4),
        "stats_cpu_s": round(spent.stats_cpu_s, 4),
        "read_s": round(spent.read_s, 4),
        "write_s": round(spent.write_s, 4),
    }


def _output(file: str, hashed: FileHash) -> OutputEntry:
    return {"file": file, "size": hashed.size, "sha256": hashed.sha256}


def _others(outcome: "Outcome", out_dir: "OutDir") -> list[OutputEntry]:
    """The files that are no shards, in sub-folders too."""
    shards = {w.file for w in outcome.written}
    return [_output(file, out_dir.hash(file)) for file in out_dir.files() if file not in shards]


def base_semantics(plan: "Plan", settings: Settings) -> str:
    """How training quantized the base, or how the weights that the adapter updates are stored, most of them
    first."""
    if settings.base_quant:
        return f"simulated: {settings.base_quant}"
    schemes = Counter(str(step.sources.scheme) for step in plan.steps if step.action == "merged")
    words = " and in ".join(scheme for scheme, _ in schemes.most_common())
    return f"stored in {words}" if words else "stored"


def tensor_entry(step: "Step", outcome: "Outcome") -> TensorEntry:
    """What a receipt says of a weight."""
    entry: dict[str, Any] = {"action": step.action, **_spec(step.spec)}
    for patch in step.patches:
        entry |= patch.facts
    if step.name in outcome.measures:
        measures = outcome.measures[step.name]
        entry |= measures.summary()
        if step.encoder.clips:
            entry["clipped"] = measures.n_clipped / measures.numel
    if step.patches and step.encoder.clips:
        entry["rounding"] = step.encoder.rounding
    if step.encoder.tensors != ((step.name, step.spec),):
        entry["stored"] = {tensor.name: _spec(tensor.spec) for tensor in step.encoder.tensors}
    if not step.changes and step.sources.names[0] != step.name:
        entry["source"] = step.sources.names[0]  # of a replicated layer
    return cast(TensorEntry, entry)  # what a patch says of itself is not typed


def _spec(spec: "TensorSpec") -> StoredSpec:
    return {"dtype": spec.torch_name, "shape": list(spec.shape)}


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
