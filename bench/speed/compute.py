"""CPU time of the arithmetic: decode + update + cast + measures against bitsandbytes' dequantization alone.

    python -m bench.speed.compute --work build/bench

Both work on the same NF4 weights, read from the same file, each in a process of its own, in turns, with one
thread for each core. arithmetic.py and bnb_dequantize.py say what they count; neither counts reading. The
figure within a merge is `compute_cpu_s` + `stats_cpu_s` of the receipt: the same arithmetic, while other
threads hash and write and take the cache from it. Once with the machine idle, and once beside as many endless
loops as there are cores. The second table: what the product of the adapter's factors takes of it, which is
torch's in fp32 and defines the bytes; *multiplying* is what of that the processor needs to multiply and add
16 times for each element, measured with factors of a higher rank; and one pass of torch over as many
elements. No code around the product makes the whole less than it, and no other product would be less than its
multiplying: what is left below any bound is for decoding, rounding and measures, which are more instructions
than the product has.
"""

import json
import os
import shutil
from itertools import chain
from pathlib import Path

from bench.support import measure
from bench.support.measure import each, median

SHM = Path("/dev/shm")
ROUNDS = 5
PARTS = {"product": "product", "multiplying": "of it multiplying", "pass": "one pass"}  # of arithmetic.py


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
        ours, *of_parts = ([one[name] for one in found] for name in ("all", *PARTS))
        ratio, within, *shares = (
            f"**{median(figures) / median(theirs):.2f}**" for figures in (ours, merging, *of_parts)
        )
        rows.append((state, each(ours), each(theirs), ratio, each(merging), within))
        parts.append((state, *chain.from_iterable(zip(map(each, of_parts), shares, strict=True))))
    header = (
        "machine",
        "lorafuse, CPU s",
        "bitsandbytes, CPU s",
        "ratio of medians",
        "within a merge, CPU s",
        "ratio",
    )
    columns = [word for name in PARTS.values() for word in (f"{name}, CPU s", "of bitsandbytes")]
    return f"{measure.table(header, rows)}\n\n{measure.table(('machine', *columns), parts)}"


if __name__ == "__main__":
    measure.main(__doc__, report)
