"""CPU time of the arithmetic: lorafuse's decode + update + cast against bitsandbytes' dequantization alone.

    python bench/compute.py --work build/bench

Both work on the same NF4 weights, read from the same file, each in a process of its own, in alternation. lorafuse's
figure is `timing.compute_cpu_s` of the receipt: every worker's decoding, low-rank update and rounding to bfloat16,
without reading, statistics, hashing and writing. The other is what bnb_dequantize.py prints. Once with the machine
idle, and once beside as many endless loops as there are cores.
"""

import json
import os
import shutil
from pathlib import Path

import measure
from measure import each, median

SHM = Path("/dev/shm")
PAIRS = 3


def lorafuse_cpu_s(base: Path, adapter: Path, out_dir: Path) -> float:
    measure.convert(base, adapter, measure.fresh(out_dir))
    receipt = json.loads((out_dir / "lorafuse_receipt.json").read_text())
    return float(receipt["timing"]["compute_cpu_s"])


def bitsandbytes_cpu_s(base: Path) -> float:
    return float(measure.python(measure.BENCH / "bnb_dequantize.py", base / "model.safetensors").stdout)


def roomy(work: Path, base: Path) -> Path:
    """Memory rather than a disk where there is room: writing is not what is measured."""
    need = 5 * sum(path.stat().st_size for path in base.iterdir())
    return SHM if SHM.is_dir() and shutil.disk_usage(SHM).free > need else work


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    rows = []
    for state, n_loops in (("idle", 0), ("busy", os.cpu_count() or 1)):
        with measure.scratch(roomy(work, base)) as outputs, measure.busy(n_loops):
            ours, theirs = measure.alternate(
                lambda out_dir=outputs / "merged": lorafuse_cpu_s(base, adapter, out_dir),
                lambda: bitsandbytes_cpu_s(base),
                PAIRS,
            )
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append((state, each(ours), each(theirs), f"**{median(ours) / median(theirs):.2f}**", each(ratios)))
    header = ("machine", "lorafuse, CPU s", "bitsandbytes, CPU s", "ratio of medians", "ratio of each pair")
    return measure.table(header, rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
