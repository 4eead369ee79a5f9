"""Runs the benchmarks and writes what they print, with the machine they ran on.

    python -m bench.run --work build/bench [--only compute] [--docs docs/benchmarks.md]

Nothing else should run meanwhile. The work directory needs about 50 GB; the inputs in it are kept for the
next run.
"""

import argparse
from pathlib import Path

from bench.memory import peak
from bench.speed import base_quant, bases, batch, compute, fleet, kernel, peers
from bench.support import measure

LAYERS = 16
BENCHMARKS = {
    "compute": compute,
    "kernel": kernel,
    "bases": bases,
    "base_quant": base_quant,
    "memory": peak,
    "peers": peers,
    "batch": batch,
    "fleet": fleet,
}
TITLES = {
    "compute": "CPU time of the arithmetic",
    "kernel": "The compiled kernel",
    "bases": "Quantized bases",
    "base_quant": "CPU time of --base-quant",
    "memory": "Memory",
    "peers": "The whole merge",
    "batch": "Many adapters",
    "fleet": "Many workers",
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
        args.docs.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
