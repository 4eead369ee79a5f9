"""Where the CPU time of a merge goes: what is hashing, what the operating system, what arithmetic.

    python -m bench.speed.cpu_profile --work build/bench

`perf record` samples the whole command a thousand times a second of CPU time, and `perf report` counts the
samples by the library that ran; `import torch` alone is sampled, too. The operating system reads, writes and
finds memory. Torch is the product of the adapter's factors, and copies; the compiled kernel decodes, rounds
and measures. The rest is Python and what it loads. Figures are medians of runs in turns; *beyond* is without
`import torch`.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.support import measure
from bench.support.measure import median, table

ROUNDS, HERTZ = 3, 1000
REST = "Python and the rest"
OF_LIBRARY = {
    "SHA-256": r"libcrypto|_sha",
    "operating system": r"\[(kernel|vdso|guest)",
    "torch": r"libtorch_cpu|libc10|libgomp|libmkl",
    "compiled kernel": r"_kernel\.",
}


def by_part(listing: str) -> dict[str, int]:
    """The samples of each part, of a report with lines `samples;library`."""
    found = dict.fromkeys([*OF_LIBRARY, REST], 0)
    for line in listing.splitlines():
        if match := re.match(r"\s*(\d+)\s*;\s*(\S+)", line):
            part = next((part for part, names in OF_LIBRARY.items() if re.search(names, match[2])), REST)
            found[part] += int(match[1])
    return found


def sampled(argv: Sequence[str | Path], data: Path) -> dict[str, float]:
    """CPU seconds of each part of a command."""
    record = ["perf", "record", "--quiet", "--event=cpu-clock", f"--freq={HERTZ}", f"--output={data}", "--"]
    measure.run([*record, *argv])
    fields = ["--fields=sample,dso", "--field-separator=;"]
    listing = measure.run(["perf", "report", "--stdio", f"--input={data}", *fields]).stdout
    return {part: n / HERTZ for part, n in by_part(listing).items()}


def can_sample(data: Path) -> bool:
    """Whether there is perf, and the kernel lets it."""
    try:
        sampled(["true"], data)
    except (OSError, measure.ChildError):
        return False
    return True


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    merges, floors = [], []
    with measure.scratch(work) as outputs:
        if not can_sample(outputs / "perf.data"):
            return "`perf record` does not sample on this machine."
        for _ in range(ROUNDS):
            out_dir = measure.fresh(outputs / "merged")
            words = ("-m", "lorafuse.cli", "convert", "--quiet", base, adapter, out_dir)
            merges.append(sampled([sys.executable, *words], outputs / "perf.data"))
            floors.append(sampled([sys.executable, "-c", "import torch"], outputs / "perf.data"))
    rows, beyond = [], {}
    for part in merges[0]:
        whole, floor = (median([run[part] for run in runs]) for runs in (merges, floors))
        beyond[part] = whole - floor
        rows.append((part, f"{whole:.2f}", f"{floor:.2f}", f"{whole - floor:.2f}"))
    total = sum(beyond.values())
    rows = [(*row, f"{beyond[row[0]] / total:.0%}") for row in rows]
    return table(("CPU, s", "a merge", "`import torch`", "beyond", "share"), rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
