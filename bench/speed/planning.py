"""What each stored tensor of a mixture of experts costs: to read the headers, to plan, and in whole commands.

    python -m bench.speed.planning --work build/bench

The base has six stored tensors for each weight, in NF4 (bench/support/mixture.py); the adapter is on the
attention, or on every expert, whose factors are stored tensors, too. Headers and plan are timed in one
process, which is what a merge does before it reads a weight; bytes are the most that it then holds. Commands
are timed whole, without what `inspect` of an empty folder takes. Time is CPU time. A figure for each tensor
that stays the same from line to line is linear.
"""

import json
from pathlib import Path

from bench.support import measure
from bench.support.measure import ChildError, Usage, median, table

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


def planned(folder: Path, kind: str) -> list[str]:
    """What headers and plan cost: ns and ns, and bytes, of each stored tensor."""
    n = n_stored(folder / "base") + n_stored(folder / kind)
    command = ("-m", "bench.speed.plan_once", folder / "base", folder / kind)
    runs = [json.loads(measure.python(*command).stdout) for _ in range(RUNS)]
    headers, plan, held = (median([run[key] for run in runs]) / n for key in ("headers_s", "plan_s", "held"))
    return [kind, f"{n:,}", f"{1e9 * headers:,.0f}", f"{1e9 * plan:,.0f}", f"{held:,.0f}"]


def started(work: Path) -> Usage:
    """What every command takes that imports torch and looks at a folder, an empty one here."""
    with measure.scratch(work) as empty:
        try:
            return measure.python("-m", "lorafuse.cli", "inspect", empty)
        except ChildError as e:
            return e.usage


def commands(folder: Path, kind: str, out: Path, start_s: float) -> list[list[str]]:
    """CPU ns and peak memory of the commands that a merge of so many tensors is made and looked at with."""
    base, adapter = folder / "base", folder / kind
    n = n_stored(base) + n_stored(adapter)
    named: dict[str, tuple[str | Path, ...]] = {
        "convert --dry-run": ("convert", "--quiet", "--dry-run", *LIMIT, base, adapter, out),
        "convert": ("convert", "--quiet", *LIMIT, base, adapter, out),
        "verify": ("verify", "--quiet", out),
        "inspect, of the result": ("inspect", out),
        "inspect, of the base": ("inspect", base),
        "report": ("report", out),
    }
    rows = []
    for title, arguments in named.items():
        used = measure.python("-m", "lorafuse.cli", *arguments)
        each_s = max(used.cpu_s - start_s, 0) / n
        rows.append([title, kind, f"{n:,}", f"{1e9 * each_s:,.0f}", f"{used.peak_rss / measure.MB:,.0f}"])
    return rows


def report(work: Path, layers: int) -> str:
    start_s = median([started(work).cpu_s for _ in range(RUNS)])
    plans, whole = [], []
    for kind in KINDS:
        for size in SIZES:
            folder = mixture(work, size)
            plans.append(planned(folder, kind))
            with measure.scratch(work) as outputs:
                whole += commands(folder, kind, outputs / "merged", start_s)
    header = ("adapter on", "stored tensors", "headers, ns each", "plan, ns each", "bytes each")
    titles = list(dict.fromkeys(row[0] for row in whole))
    whole.sort(key=lambda row: titles.index(row[0]))
    head = ("command", "adapter on", "stored tensors", "CPU, ns each", "peak, MB")
    return f"{table(header, plans)}\n\n{table(head, whole, 2)}"


if __name__ == "__main__":
    measure.main(__doc__, report)
