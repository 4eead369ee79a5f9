"""CPU time of the arithmetic: decode + update + cast + measures against bitsandbytes' dequantization alone.

    python -m bench.speed.compute --work build/bench

Both work on the same NF4 weights, read from the same file, each in a process of its own, in turns, with one
thread for each core. arithmetic.py and bnb_dequantize.py say what they count; neither counts reading. The
figure within a merge is `compute_cpu_s` + `stats_cpu_s` of the receipt: the same arithmetic, while other
threads hash and write and take the cache from it. Once with the machine idle, and once beside as many endless
loops as there are cores. The second table: what the product of the adapter's factors takes of it, which is
torch's in fp32, and what one pass of torch over as many elements would take. A product of rank 16 is 32
operations for each element, a dequantization is one: no code around the product makes the whole less than it.
"""

import json
import os
import shutil
from pathlib import Path

from bench.support import measure
from bench.support.measure import each, median

SHM = Path("/dev/shm")
ROUNDS = 5


def arithmetic_cpu_s(base: Path, adapter: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(measure.python("-m", "bench.speed.arithmetic", base, adapter).stdout)
    return found


def within_merge_cpu_s(base: Path, adapter: Path, out_dir: Path) -> float:
    measure.convert(base, adapter, measure.fresh(out_dir))
    timing = json.loads((out_dir / "lorafuse_receipt.json").read_text())["timing"]
    return float(timing["compute_cpu_s"] + timing["stats_cpu_s"])


def bitsandbytes_cpu_s(base: Path) -> float:
    return float(measure.python("-m", "bench.speed.bnb_dequantize", base / "model.safetensors").stdout)


def roomy(work: Path, base: Path) -> Path:
    """Memory rather than a disk where there is room: writing is not what is measured."""
    need = 5 * sum(path.stat().st_size for path in base.iterdir())
    return SHM if SHM.is_dir() and shutil.disk_usage(SHM).free > need else work


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    rows, parts = [], []
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
        found, theirs, merging = (list(column) for column in zip(*rounds, strict=True))
        ours, products, passes = ([one[name] for one in found] for name in ("all", "product", "pass"))
        ratio, within, product, one_pass = (
            f"**{median(figures) / median(theirs):.2f}**" for figures in (ours, merging, products, passes)
        )
        rows.append((state, each(ours), each(theirs), ratio, each(merging), within))
        parts.append((state, each(products), product, each(passes), one_pass))
    header = (
        "machine",
        "lorafuse, CPU s",
        "bitsandbytes, CPU s",
        "ratio of medians",
        "within a merge, CPU s",
        "ratio",
    )
    of_parts = ("machine", "product, CPU s", "of bitsandbytes", "one pass, CPU s", "of bitsandbytes")
    return f"{measure.table(header, rows)}\n\n{measure.table(of_parts, parts)}"


if __name__ == "__main__":
    measure.main(__doc__, report)
