"""Instructions that the parts of a merge take, which no other process changes.

    python -m bench.speed.instructions --work build/bench

`perf stat` counts, or valgrind where the machine has no counters: then for a processor without AVX-512 and
without instructions for SHA-256. The base has two layers of the 1B model's shapes in NF4, or the many tensors
of planning.py; *beyond* is without `import torch`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from bench.speed.bases import NF4, inputs
from bench.speed.planning import mixture
from bench.support import measure
from bench.support.instructions import count, counter

TENSORS = 10_000
N_PARTS: int | None = None  # all of them
FLOOR = "`import torch`"


def report(work: Path, layers: int) -> str:
    tool = counter()
    if tool is None:
        return "Neither perf nor valgrind counts on this machine."
    small, experts = inputs(work, NF4), mixture(work, TENSORS)
    python = (sys.executable, "-m")
    merge = (*python, "lorafuse.cli", "convert", "--quiet", small / "base", small / "adapter")
    with measure.scratch(work) as outputs:
        parts: dict[str, Callable[[], int | None]] = {
            FLOOR: lambda: count(tool, (sys.executable, "-c", "import torch")),
            "merge": lambda: count(tool, (*merge, outputs / "on"), LORAFUSE_KERNEL="on"),
            "merge without the kernel": lambda: count(tool, (*merge, outputs / "off"), LORAFUSE_KERNEL="off"),
            f"plan of {TENSORS:,} tensors": lambda: count(
                tool, (*python, "bench.speed.plan_once", experts / "base", experts / "attention")
            ),
        }
        counted = {name: part() for name, part in list(parts.items())[:N_PARTS]}
    floor = counted.get(FLOOR) or 0
    rows = [
        (name, f"{n / 1e6:,.0f}", f"{(n - floor) / 1e6:,.0f}") if n else (name, "not counted", "")
        for name, n in counted.items()
    ]
    return measure.table((f"counted by {tool}", "million instructions", "beyond"), rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
