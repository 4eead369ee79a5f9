"""What each stored tensor of a mixture of experts costs: to read the headers, to plan, and in whole commands.

    python -m bench.speed.planning --work build/bench

The base has six stored tensors for each weight, in NF4 (bench/support/mixture.py); the adapter is on the
attention, or on every expert, whose factors are stored tensors, too. Headers and plan are timed in one
process, which is what a merge does before it reads a weight; bytes are the most that it then holds. Commands
are timed whole, and what each further tensor costs is the difference to the line before. Time is CPU time.
What is linear has the same figure for each tensor on every line.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from bench.support import measure
from bench.support.measure import Usage, median, table

SIZES = (10_000, 50_000, 250_000)
KINDS = ("attention", "experts")
LIMIT = ("--memory-limit", "4GB")
RUNS = 3


def mixture(work: Path, size: int) -> Path:
    """The folder of a base of so many stored tensors and its adapters, made once."""
    directory = work / f"mixture-{size}"
    if not directory.exists():
        work.mkdir(parents=True, exist_ok=True)
        measure.python("-m", "bench.support.mixture", str(size), directory)
    return directory


def n_stored(folder: Path) -> int:
    """The tensors in the headers of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += len(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
    return total


def planned(folder: Path, kind: str) -> tuple[int, list[str]]:
    """How many tensors are stored, and what headers and plan cost: ns and ns, and bytes, of each of them."""
    command = ("-m", "bench.speed.plan_once", folder / "base", folder / kind)
    runs = [json.loads(measure.python(*command).stdout) for _ in range(RUNS)]
    n = int(runs[0]["stored"])
    headers, plan, held = (median([run[key] for run in runs]) / n for key in ("headers_s", "plan_s", "held"))
    return n, [kind, f"{n:,}", f"{1e9 * headers:,.0f}", f"{1e9 * plan:,.0f}", f"{held:,.0f}"]


def commands(folder: Path, kind: str, out: Path) -> dict[str, Usage]:
    """What the commands take that a merge of so many tensors is made and looked at with."""
    base, adapter = folder / "base", folder / kind
    named: dict[str, tuple[str | Path, ...]] = {
        "convert --dry-run": ("convert", "--quiet", "--dry-run", *LIMIT, base, adapter, out),
        "convert": ("convert", "--quiet", *LIMIT, base, adapter, out),
        "verify": ("verify", "--quiet", out),
        "inspect, of the result": ("inspect", out),
        "inspect, of the base": ("inspect", base),
        "report": ("report", out),
    }
    return {title: measure.python("-m", "lorafuse.cli", *words) for title, words in named.items()}


def further(title: str, kind: str, used: dict[int, Usage]) -> Iterator[list[str]]:
    """A line for each size, by its number of tensors: the whole, and what each tensor costs that it has more
    than the line before."""
    n_before, before = 0, None
    for n, now in used.items():
        more = f"{1e9 * (now.cpu_s - before.cpu_s) / (n - n_before):,.0f}" if before else ""
        yield [title, kind, f"{n:,}", f"{now.cpu_s:.1f}", more, f"{now.peak_rss / measure.MB:,.0f}"]
        n_before, before = n, now


def report(work: Path, layers: int) -> str:
    plans, whole = [], dict[str, list[list[str]]]()
    for kind in KINDS:
        used: dict[int, dict[str, Usage]] = {}
        for size in SIZES:
            folder = mixture(work, size)
            n, row = planned(folder, kind)
            plans.append(row)
            with measure.scratch(work) as outputs:
                used[n] = commands(folder, kind, outputs / "merged")
        for title in next(iter(used.values())):
            of_title = {n: of_size[title] for n, of_size in used.items()}
            whole.setdefault(title, []).extend(further(title, kind, of_title))
    header = ("adapter on", "stored tensors", "headers, ns each", "plan, ns each", "bytes each")
    head = ("command", "adapter on", "stored tensors", "CPU, s", "ns for each further", "peak, MB")
    rows = [row for of_title in whole.values() for row in of_title]
    return f"{table(header, plans)}\n\n{table(head, rows, 2)}"


if __name__ == "__main__":
    measure.main(__doc__, report)
