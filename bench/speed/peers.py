"""The whole merge, side by side: lorafuse with its kernel and without, transformers + PEFT, `dd` of the
result, and bitsandbytes' dequantization of the base.

    python -m bench.speed.peers --work build/bench

All take turns, each in a process of its own, and each round begins with another one; every output goes to the
work directory, and before each run nothing waits to be written. lorafuse's time includes hashing all it reads
and writes and syncing it to disk, which the save of transformers does not do; dd writes and syncs
(conv=fdatasync) the same bytes. Of bitsandbytes the arithmetic counts, the calls of dequantize_4bit alone;
lorafuse's is decode, update, cast and measures. The inputs lie in the page cache. Ratios are medians of the
rounds' quotients, with the least and the greatest. The last table has the phases of a merge, which end with
torch imported, with lorafuse imported, with the first tile in its file, with the last one, with the result
under its name, and with the process. Only the writing grows with the model.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.support import chart, measure, sides
from bench.support.measure import GB, MB, each, median, table
from bench.support.ratios import Ratio, ratio
from bench.support.sides import BNB, DD, FULL, KERNEL, PEFT, TORCH, Side

ROUNDS = 5
Runs = Mapping[str, Sequence[Side]]


def times(runs: Runs) -> str:
    """What each side took, run by run."""
    rows = []
    for name, of_name in runs.items():
        arithmetic = "" if name in (PEFT, DD) else each(sides.arithmetics(of_name))
        peak = each([nbytes / MB for nbytes in sides.peaks(of_name)], 0)
        rows.append((name, each(sides.walls(of_name)), each(sides.cpus(of_name)), arithmetic, peak))
    return table(("", "wall, s", "CPU, s", "arithmetic, CPU s", "peak memory, MB"), rows)


def ratios(runs: Runs) -> dict[str, Ratio]:
    """What lorafuse takes of what the others take."""
    ours, torch, peft, dd, bnb = (runs[name] for name in FULL)
    return {
        "wall, of dd": ratio(sides.walls(ours), sides.walls(dd)),
        "wall, of transformers + PEFT": ratio(sides.walls(ours), sides.walls(peft)),
        "CPU, of transformers + PEFT": ratio(sides.cpus(ours), sides.cpus(peft)),
        "peak memory, of transformers + PEFT": ratio(sides.peaks(ours), sides.peaks(peft)),
        "wall, of lorafuse without its kernel": ratio(sides.walls(ours), sides.walls(torch)),
        "CPU, of lorafuse without its kernel": ratio(sides.cpus(ours), sides.cpus(torch)),
        "arithmetic, of bitsandbytes' dequantization": ratio(sides.arithmetics(ours), sides.arithmetics(bnb)),
        "arithmetic without the kernel, of the same": ratio(sides.arithmetics(torch), sides.arithmetics(bnb)),
    }


def drawn(runs: Runs, nbytes: int) -> str:
    """The SVG of the page."""
    colours = {KERNEL: "right", TORCH: "right", PEFT: "wrong", DD: "none", BNB: "light"}
    whole = [name for name in runs if name != BNB]
    return chart.bars(
        f"A merge of {nbytes / GB:.1f} GB, median and spread of {len(runs[KERNEL])} runs",
        {
            "wall time, s": [chart.Spread(n, sides.walls(runs[n]), colours[n]) for n in whole],
            "CPU time, s": [chart.Spread(n, sides.cpus(runs[n]), colours[n]) for n in whole],
            "CPU time of the arithmetic, s": [
                chart.Spread(n, sides.arithmetics(runs[n]), colours[n]) for n in (KERNEL, TORCH, BNB)
            ],
        },
    )


def phases(base: Path, adapter: Path, out_dir: Path) -> dict[str, float]:
    """Seconds of each phase of one merge."""
    words = ("-m", "bench.speed.phases", base, adapter, measure.fresh(out_dir))
    used = measure.python(*words, str(time.time()))
    ends = json.loads(used.stdout)
    return {
        "import of torch": ends["torch"],
        "import of lorafuse": ends["lorafuse"] - ends["torch"],
        "plan, until the first tile is written": ends["first"] - ends["lorafuse"],
        "writing": ends["last"] - ends["first"],
        "what follows the last tile": ends["named"] - ends["last"],
        "end of the interpreter": used.wall_s - ends["named"],
    }


def profile(rounds: Sequence[Mapping[str, float]], dd: Sequence[Side]) -> str:
    rows = [
        (f"{name}, s", each(of_name), f"{median(of_name):.2f}")
        for name in rounds[0]
        if (of_name := [one[name] for one in rounds])
    ]
    rows.append(("dd of the result, s", each(sides.walls(dd)), f"{median(sides.walls(dd)):.2f}"))
    return table(("phase of a merge", "each run", "median"), rows)


def report(work: Path, layers: int) -> str:
    """Also draws work/benchmarks.svg."""
    base, adapter = measure.inputs(work, "llama", layers)
    with measure.scratch(work) as outputs:
        runs = sides.in_turns(sides.sides_of(FULL, base, adapter, outputs), ROUNDS)
        nbytes = (outputs / sides.RESULT).stat().st_size
        compared = measure.python("-m", "bench.speed.differing", outputs / "merged", outputs / "peft")
        differing, total = map(int, compared.stdout.split())
        rounds = [phases(base, adapter, outputs / "merged") for _ in range(ROUNDS)]
    (work / "benchmarks.svg").write_text(drawn(runs, nbytes))
    rows = [
        (name, f"**{one.median:.2f}**", f"{one.low:.2f} to {one.high:.2f}")
        for name, one in ratios(runs).items()
    ]
    header = (
        f"of a merge with the kernel, Llama of {layers} layers, {nbytes / GB:.2f} GB",
        "ratio",
        "spread",
    )
    agree = f"Of {total:,} elements, {differing:,} differ between the results of lorafuse and of PEFT."
    return f"{times(runs)}\n\n{table(header, rows)}\n\n{agree}\n\n{profile(rounds, runs[DD])}"


if __name__ == "__main__":
    measure.main(__doc__, report)
