"""Runs the benchmarks and writes what they print, with the machine they ran on.

    python -m bench.run --work build/bench [--only compute] [--docs docs/benchmarks.md]

Nothing else should run meanwhile. The work directory needs about 50 GB; the inputs in it are kept for the
next run. With --docs the page is written, its picture beside it, and bench/ratios.json, with which
`make bench-check` compares.
"""

import argparse
import shutil
from pathlib import Path

from bench import check
from bench.memory import peak
from bench.speed import (
    base_quant,
    bases,
    batch,
    compute,
    cores,
    fleet,
    gpu,
    hashing,
    instructions,
    kernel,
    peers,
    planning,
    start,
)
from bench.support import measure, ratios

LAYERS = 16
CHECKED_ROUNDS = 11  # of what `make bench-check` measures in fewer
BENCHMARKS = {
    "peers": peers,
    "compute": compute,
    "kernel": kernel,
    "bases": bases,
    "base_quant": base_quant,
    "instructions": instructions,
    "memory": peak,
    "cores": cores,
    "gpu": gpu,
    "batch": batch,
    "fleet": fleet,
    "planning": planning,
    "hashing": hashing,
    "start": start,
}
TITLES = {
    "peers": "The whole merge",
    "compute": "CPU time of the arithmetic",
    "kernel": "The compiled kernel",
    "bases": "Quantized bases",
    "base_quant": "CPU time of --base-quant",
    "memory": "Memory",
    "instructions": "Instructions",
    "cores": "Many cores",
    "gpu": "A GPU",
    "batch": "Many adapters",
    "fleet": "Many workers",
    "planning": "Many tensors",
    "hashing": "Hashing the inputs",
    "start": "The start",
}
PREAMBLE = """# Benchmarks

Written by `python -m bench.run --work build/bench --docs docs/benchmarks.md`; each table by the command above
it.

The inputs are synthetic (`bench/support/synthetic.py`): a checkpoint with the shapes of Llama-3.2-1B in
double-quantized NF4, one matrix of 16384 x 53248 in the same format, and a rank-16 LoRA adapter over every
linear layer of either. What is compared runs in alternation, each run in a process of its own, and what
counts is the ratio of the medians. Seconds depend on the machine, and on a rented one on its neighbours; only
ratios should be carried over to another. 1 MB is 10^6 bytes."""


def section(name: str, work: Path) -> str:
    """The benchmark's own account of itself, then its tables."""
    title, doc = TITLES[name], BENCHMARKS[name].__doc__ or ""
    what, command, how = doc.strip().split("\n\n")
    tables = measure.watched(BENCHMARKS[name].report, work, LAYERS)
    return f"## {title}\n\n{what}\n\n```\n{command.strip()}\n```\n\n{how}\n\n{tables}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for inputs (kept) and outputs (removed)"
    )
    parser.add_argument("--only", choices=BENCHMARKS, help="run one benchmark")
    parser.add_argument("--docs", type=Path, help="write the page here too")
    args = parser.parse_args()
    if args.only and args.docs:
        parser.error("--docs wants every benchmark, not --only one")
    parts = [PREAMBLE, measure.machine()]
    print("\n\n".join(parts), flush=True)
    for name in [args.only] if args.only else BENCHMARKS:
        parts.append(section(name, args.work))
        print(f"\n{parts[-1]}", flush=True)
    if args.docs:
        args.docs.parent.mkdir(parents=True, exist_ok=True)
        picture = args.docs.with_suffix(".svg")
        shutil.copyfile(args.work / "benchmarks.svg", picture)
        parts.insert(2, f"![wall time, CPU time and arithmetic of a merge, side by side]({picture.name})")
        args.docs.write_text("\n\n".join(parts) + "\n")
        ratios.save(
            check.COMMITTED, check.medians(check.measured(args.work, CHECKED_ROUNDS)), measure.processor()
        )


if __name__ == "__main__":
    main()
