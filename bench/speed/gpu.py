"""A merge on the GPU against the same on the CPU.

    python -m bench.speed.gpu --work build/bench

`--device cpu` and `--device cuda` in turns, each in a process of its own, the result in memory (tmpfs) where
there is room. *Merge* is the receipt's `wall_s`, which begins after torch is imported; *command* is all of
it. *Assumed* is what `--device auto` reckons with (`lorafuse/arithmetic/devices.py`).
"""

import json
from pathlib import Path
from typing import Any

from bench.speed.compute import roomy
from bench.support import measure
from bench.support.measure import each, median, table

ROUNDS = 3
NOT_RUN = "CUDA has not been run: torch sees no GPU on this machine."
UNITS = {"copies in": "GB/s", "copies out": "GB/s", "start of CUDA": "s", "operations of a tile": "ms"}


def merge(base: Path, adapter: Path, out_dir: Path, device: str) -> tuple[float, float, float]:
    """Wall seconds of the merge and of the whole command, and gigabytes of weights before and after."""
    measure.fresh(out_dir)
    usage = measure.python("-m", "lorafuse.cli", "convert", base, adapter, out_dir, "--device", device, "-q")
    receipt = json.loads((out_dir / "lorafuse_receipt.json").read_text())
    weights = [file for role in (base, out_dir) for file in role.glob("*.safetensors")]
    moved = sum(file.stat().st_size for file in weights) / 1e9
    return float(receipt["timing"]["wall_s"]), usage.wall_s, moved


def report(work: Path, layers: int) -> str:
    costs = json.loads(measure.python("-m", "bench.speed.gpu_costs", "cuda").stdout)
    if costs is None:
        return NOT_RUN
    base, adapter = measure.inputs(work, "llama", layers)
    with measure.scratch(roomy(work, base)) as outputs:
        cpu, cuda = measure.alternate(
            lambda: merge(base, adapter, outputs / "merged", "cpu"),
            lambda: merge(base, adapter, outputs / "merged", "cuda"),
            ROUNDS,
        )
    return f"{times(cpu, cuda)}\n\n{alone(costs, cuda)}"


def times(cpu: list[tuple[float, float, float]], cuda: list[tuple[float, float, float]]) -> str:
    rows = []
    for what, place in (("merge", 0), ("command", 1)):
        of_cpu, of_cuda = ([taken[place] for taken in side] for side in (cpu, cuda))
        rows.append((what, each(of_cpu), each(of_cuda), f"**{median(of_cuda) / median(of_cpu):.2f}**"))
    return table(("wall time", "CPU, s", "CUDA, s", "CUDA / CPU"), rows)


def alone(costs: dict[str, Any], cuda: list[tuple[float, float, float]]) -> str:
    """What the GPU takes for each thing by itself, and what the merge reaches."""
    reached = median([moved / wall_s for wall_s, _, moved in cuda])
    measured, assumed = costs["measured"], costs["assumed"]
    rows = [
        (f"{what}, {unit}", f"{measured[what]:.2f}", f"{assumed[what]:.2f}") for what, unit in UNITS.items()
    ]
    rows.insert(2, ("both, in the merge, GB/s", f"{reached:.2f}", ""))
    return table((costs["name"], "measured", "assumed"), rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
