"""Whether lorafuse became slower: measures some ratios again, and compares them with bench/ratios.json.

    python -m bench.check --work build/bench

Fails when a ratio is worse than the committed one by more than a quarter, in two measurements. It takes less
than five minutes, and less than a GB of memory where the outputs go (/dev/shm, so that no disk is measured).
Ratios compare lorafuse with something else that ran in the same rounds, so that they hold on other machines
and busy ones; what they depend on is the processor. `python -m bench.run --docs` writes the file.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.speed.compute import roomy
from bench.speed.planning import mixture
from bench.support import measure, ratios, sides
from bench.support.ratios import Ratio, ratio
from bench.support.sides import BNB, DD, IMPORT, KERNEL, PEFT, TORCH, Side

COMMITTED = Path(__file__).parent / "ratios.json"
LAYERS, TENSORS, ROUNDS = 2, 10_000, 5
PLAN, HELP = "plan", "help"


def measured(work: Path, rounds: int = ROUNDS) -> dict[str, Ratio]:
    """Name → ratio; less is better."""
    base, adapter = measure.inputs(work, "llama", LAYERS)
    experts = mixture(work, TENSORS)

    def planned() -> Side:
        used = measure.python("-m", "bench.speed.plan_once", experts / "base", experts / "experts")
        figures = json.loads(used.stdout)
        return Side(used, figures["headers_s"] + figures["plan_s"])

    def helped() -> Side:
        return Side(measure.python("-m", "lorafuse.cli", "convert", "--help"))

    with measure.scratch(roomy(work, base)) as outputs:
        of_merges = sides.sides_of((KERNEL, TORCH, PEFT, DD, BNB, IMPORT), base, adapter, outputs)
        runs = sides.in_turns(of_merges | {PLAN: planned, HELP: helped}, rounds)
    ours, torch, bnb, floor = (runs[name] for name in (KERNEL, TORCH, BNB, IMPORT))
    # Both sides have some of the start in them, so that a quotient never has noise around zero below it.
    return {
        "arithmetic / bitsandbytes": ratio(sides.arithmetics(ours), sides.arithmetics(bnb)),
        "arithmetic without kernel / bitsandbytes": ratio(sides.arithmetics(torch), sides.arithmetics(bnb)),
        "CPU of a merge / import torch": ratio(sides.cpus(ours), sides.cpus(floor)),
        "CPU of a merge without kernel / import torch": ratio(sides.cpus(torch), sides.cpus(floor)),
        "wall of a merge / transformers + PEFT": ratio(sides.walls(ours), sides.walls(runs[PEFT])),
        "wall of a merge / import torch + dd": ratio(
            sides.walls(ours),
            [a + b for a, b in zip(sides.walls(floor), sides.walls(runs[DD]), strict=True)],
        ),
        "peak memory of a merge / import torch": ratio(sides.peaks(ours), sides.peaks(floor)),
        "CPU of a plan / import torch": ratio(sides.arithmetics(runs[PLAN]), sides.cpus(floor)),
        "CPU of --help / import torch": ratio(sides.cpus(runs[HELP]), sides.cpus(floor)),
    }


def medians(found: dict[str, Ratio]) -> dict[str, float]:
    return {name: one.median for name, one in found.items()}


def check(work: Path) -> dict[str, str]:
    """What is worse, twice. Prints what was measured."""
    committed = ratios.load(COMMITTED)
    found = measured(work)
    print(told(committed, found), flush=True)
    wrong = ratios.regressions(committed, medians(found))
    if wrong:
        print(f"\n{len(wrong)} to be measured again.", flush=True)
        again = measured(work)
        print(told(committed, again), flush=True)
        wrong = ratios.regressions(committed, ratios.better(medians(found), medians(again)))
    return wrong


def told(committed: dict[str, float], found: dict[str, Ratio]) -> str:
    rows = [(name, f"{committed.get(name, 0):.3f}", str(one)) for name, one in found.items()]
    return measure.table(("ratio", "committed", "now"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for inputs, which are kept")
    args = parser.parse_args()
    if not COMMITTED.exists():
        sys.exit(f"{COMMITTED} is not there; `python -m bench.run --docs` writes it.")
    wrong = check(args.work)
    for name, why in wrong.items():
        print(f"{name} {why}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
