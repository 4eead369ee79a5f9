"""CPU time of the arithmetic: lorafuse's decode + update + cast against bitsandbytes' dequantization alone.

    python -m bench.speed.compute --work build/bench

Both work on the same NF4 weights, read from the same file, each in a process of its own, in turns, with one
thread for each core. arithmetic.py and bnb_dequantize.py say what they count; neither counts reading. The
figure within a merge is `timing.compute_cpu_s` of the receipt: the same arithmetic, while other threads hash
and write and take the cache from it. ComputedOnce with the machine idle, and once beside as many endless
loops as there are cores.
"""

import json
import os
import shutil
from pathlib import Path

from bench.support import measure
from bench.support.measure import each, median

SHM = Path("/dev/shm")
ROUNDS = 5


def arithmetic_cpu_s(base: Path, adapter: Path) -> float:
    return float(measure.python("-m", "bench.speed.arithmetic", base, adapter).stdout)


def within_merge_cpu_s(base: Path, adapter: Path, out_dir: Path) -> float:
    measure.convert(base, adapter, measure.fresh(out_dir))
    receipt = json.loads((out_dir / "lorafuse_receipt.json").read_text())
    return float(receipt["timing"]["compute_cpu_s"])


def bitsandbytes_cpu_s(base: Path) -> float:
    return float(measure.python("-m", "bench.speed.bnb_dequantize", base / "model.safetensors").stdout)


def roomy(work: Path, base: Path) -> Path:
    """Memory rather than a disk where there is room: writing is not what is measured."""
    need = 5 * sum(path.stat().st_size for path in base.iterdir())
    return SHM if SHM.is_dir() and shutil.disk_usage(SHM).free > need else work


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    rows = []
    for state, n_loops in (("idle", 0), ("busy", os.cpu_count() or 1)):
        with measure.scratch(roomy(work, base)) as outputs, measure.busy(n_loops):
            rounds = [
                (
                    arithmetic_cpu_s(base, adapter),
                    bitsandbytes_cpu_s(base),
                    within_merge_cpu_s(base, adapter, outputs / "merged"),
                )
                for _ in range(ROUNDS)
            ]
        ours, theirs, merging = (list(column) for column in zip(*rounds, strict=True))
        ratio, within = (f"**{median(figures) / median(theirs):.2f}**" for figures in (ours, merging))
        rows.append((state, each(ours), each(theirs), ratio, each(merging), within))
    header = (
        "machine",
        "lorafuse, CPU s",
        "bitsandbytes, CPU s",
        "ratio of medians",
        "within a merge, CPU s",
        "ratio",
    )
    return measure.table(header, rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
