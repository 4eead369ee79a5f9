"""CPU time of merges with the compiled kernel and without, and of `--format base` beside dense.

    python -m bench.speed.kernel --work build/bench

Four merges of the same inputs in turns, each in a process of its own: to bfloat16 (dense) and onto the base's
own grid (base), each with LORAFUSE_KERNEL=on and off. The adapter's update is scaled so that about 3 % of the
codes move. *Arithmetic* is `compute_cpu_s` + `stats_cpu_s` of the receipt: decode, update, cast or code, and
measures, which the kernel takes while it rounds; *process* is all CPU time of the process, with Python,
torch's import, hashing and writing. A ratio is the median of the ratios of the rounds.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from bench.speed.compute import roomy
from bench.support import measure
from bench.support.measure import each, median

ROUNDS = 5
SCALE = "0.25"  # of the update, which is 3 % of the weight
FORMATS, SWITCHES = ("dense", "base"), ("on", "off")


class Spent(NamedTuple):
    """CPU seconds of one merge, and the share of the elements that it changed."""

    arithmetic: float
    process: float
    changed: float


def merge(base: Path, adapter: Path, out_dir: Path, form: str, switch: str) -> Spent:
    measure.fresh(out_dir)
    options = ["--format", form, "--adapter-scale", SCALE, "--quiet"]
    command = [sys.executable, "-m", "lorafuse.cli", "convert", base, adapter, out_dir, *options]
    used = measure.run(["env", f"LORAFUSE_KERNEL={switch}", *command])
    receipt = json.loads((out_dir / "lorafuse_receipt.json").read_text())
    timing, changed = receipt["timing"], [t["changed"] for t in receipt["tensors"].values() if "changed" in t]
    arithmetic_s = timing["compute_cpu_s"] + timing["stats_cpu_s"]
    return Spent(arithmetic_s, used.cpu_s, sum(changed) / len(changed))


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    cases = [(form, switch) for form in FORMATS for switch in SWITCHES]
    with measure.scratch(roomy(work, base)) as outputs:
        rounds = [
            {case: merge(base, adapter, outputs / "merged", *case) for case in cases} for _ in range(ROUNDS)
        ]
    header = ("format", "kernel", "arithmetic, CPU s", "process, CPU s", "codes changed")
    rows = []
    for form, switch in cases:
        spent = [made[form, switch] for made in rounds]
        changed = f"{spent[0].changed:.1%}" if form == "base" else ""
        rows.append((form, switch, *(each([s[n] for s in spent]) for n in range(2)), changed))
    ratios = [
        *((f"{form}, kernel on / off", (form, "on"), (form, "off")) for form in FORMATS),
        *((f"base / dense, kernel {switch}", ("base", switch), ("dense", switch)) for switch in SWITCHES),
        ("base with the kernel / dense without", ("base", "on"), ("dense", "off")),
    ]
    return f"{measure.table(header, rows, 2)}\n\n{_ratios(rounds, ratios)}"


def _ratios(
    rounds: list[dict[tuple[str, str], Spent]],
    ratios: list[tuple[str, tuple[str, str], tuple[str, str]]],
) -> str:
    def of(a: tuple[str, str], b: tuple[str, str], n: int) -> str:
        return f"**{median([made[a][n] / made[b][n] for made in rounds]):.2f}**"

    rows = [(words, *(of(a, b, n) for n in range(2))) for words, a, b in ratios]
    return measure.table(("ratio", "arithmetic", "process"), rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
