"""Runs the benchmarks and writes what they print, with the machine they ran on.

    python -m bench.run --work build/bench [--only compute ...] [--docs docs/benchmarks.md] [--quick]

Nothing else should run meanwhile. The work directory needs about 50 GB; the inputs in it are kept for the
next run. With --docs the page is written, its picture beside it, and, unless --only some ran,
bench/ratios.json, with which `make bench-check` compares. With --quick everything runs, once, with the least
inputs, so that it is seen to run: its figures say nothing, and bench/ratios.json stays as it is. Only
instructions are not counted then.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench import check
from bench.memory import peak
from bench.speed import (
    base_quant,
    bases,
    batch,
    compute,
    cores,
    cpu_profile,
    fleet,
    gpu,
    hashing,
    instructions,
    kernel,
    large,
    peers,
    planning,
    start,
)
from bench.support import measure, ratios

LAYERS = 16
CHECKED_ROUNDS = 11  # of what `make bench-check` measures in fewer
BENCHMARKS = {
    "peers": peers,
    "large": large,
    "cpu_profile": cpu_profile,
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
    "large": "A larger model",
    "cpu_profile": "Where the CPU time goes",
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
QUICK_LAYERS = 4  # of which fleet.py takes a quarter
QUICK: dict[str, dict[str, object]] = {
    "peers": {"ROUNDS": 1},
    "large": {"ROUNDS": 1},
    "cpu_profile": {"ROUNDS": 1},
    "compute": {"ROUNDS": 1},
    "kernel": {"ROUNDS": 1},
    "bases": {"FEWEST": 1, "MOST": 1, "N_BASES": 3},
    "base_quant": {"KINDS": ("nf4", "int8")},
    "instructions": {"N_PARTS": 0, "TENSORS": 600},
    "memory": {"RUNS": 1, "SHAPES": {"Llama of {layers} layers": "llama"}},
    "cores": {"ROUNDS": 1},
    "gpu": {"ROUNDS": 1},
    "batch": {"COUNTS": (1, 2), "LIMITS": ("1GB",)},
    "fleet": {"FEW_JOBS": (1, 2), "N_JOBS": 2},
    "planning": {"SIZES": (600, 1200), "KINDS": ("experts",), "RUNS": 1},
    "hashing": {"ROUNDS": 1},
    "start": {"ROUNDS": 1},
}
PREAMBLE = """# Benchmarks

Written by `python -m bench.run --work build/bench{options}`; each table by the command above it.

The inputs are synthetic (`bench/support/synthetic.py`): a checkpoint with the shapes of Llama-3.2-1B in
double-quantized NF4, one matrix of 16384 x 53248 in the same format, and a rank-16 LoRA adapter over every
linear layer of either. What is compared runs in alternation, each run in a process of its own, and what
counts is the ratio of the medians. Seconds depend on the machine, and on a rented one on its neighbours; only
ratios should be carried over to another. 1 MB is 10^6 bytes."""


def preamble(only: Sequence[str], docs: Path | None) -> str:
    """What comes before the machine."""
    words = ["--only", *only] if only else []
    words += ["--docs", str(docs)] if docs else []
    return PREAMBLE.format(options="".join(f" {word}" for word in words))


def section(name: str, work: Path, layers: int) -> str:
    """The benchmark's own account of itself, then its tables."""
    title, doc = TITLES[name], BENCHMARKS[name].__doc__ or ""
    what, command, how = doc.strip().split("\n\n")
    tables = measure.watched(BENCHMARKS[name].report, work, layers)
    return f"## {title}\n\n{what}\n\n```\n{command.strip()}\n```\n\n{how}\n\n{tables}"


def hurry() -> None:
    """Have every benchmark do the least that it can."""
    for name, constants in QUICK.items():
        for constant, value in constants.items():
            if not hasattr(BENCHMARKS[name], constant):
                raise AttributeError(f"bench: {name} has no {constant}")
            setattr(BENCHMARKS[name], constant, value)
    check.LAYERS, check.TENSORS = QUICK_LAYERS, 600


def page(parts: list[str], docs: Path, picture: Path | None) -> None:
    """Write the page, and its picture, if there is one, beside it."""
    docs.parent.mkdir(parents=True, exist_ok=True)
    shown = []
    if picture:
        shutil.copyfile(picture, docs.with_suffix(".svg"))
        shown = [f"![wall time, CPU time and arithmetic of a merge, side by side]({docs.stem}.svg)"]
    docs.write_text("\n\n".join([*parts[:2], *shown, *parts[2:]]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for inputs (kept) and outputs (removed)"
    )
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", help="run these benchmarks")
    parser.add_argument("--docs", type=Path, help="write the page here too")
    parser.add_argument("--quick", action="store_true", help="run everything once, with the least inputs")
    args = parser.parse_args()
    layers, rounds, committed = LAYERS, CHECKED_ROUNDS, check.COMMITTED
    if args.quick:
        hurry()
        layers, rounds, committed = QUICK_LAYERS, 1, args.work / "ratios.json"
    names = args.only or list(BENCHMARKS)
    parts = [preamble(args.only, args.docs), measure.machine()]
    print("\n\n".join(parts), flush=True)
    for name in names:
        parts.append(section(name, args.work, layers))
        print(f"\n{parts[-1]}", flush=True)
    if args.docs:
        page(parts, args.docs, args.work / "benchmarks.svg" if "peers" in names else None)
    if args.docs and not args.only:
        ratios.save(committed, check.medians(check.measured(args.work, rounds)), measure.processor())


if __name__ == "__main__":
    main()
