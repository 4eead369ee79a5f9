"""Many adapters in one call of `lorafuse batch`, against as many runs of `lorafuse convert`, and what the
next adapter costs.

    python -m bench.speed.batch --work build/bench

The base is a Llama of 1.2 B parameters in NF4 (--layers makes it smaller), the adapters are rank 16 over all
linear layers, or on q_proj and v_proj. Wall and CPU time are those of whole commands, one run each; disk is
what results take, a file with several names counted once. The last table is a prediction for a model that was
not merged here, and says from what. The second compares a batch with single runs, as ratios of wall and of
CPU time.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from bench.support import measure
from bench.support.measure import GB, MB, Usage, table

COUNTS = (1, 4, 16)
ADAPTERS = {"all linear layers": "adapter", "q_proj and v_proj": "adapter-qv"}
LIMITS = ("100MB", "1GB")
MOST = 32  # jobs of a pass: batching/batch.py, MAX_MEMBERS
N_LARGE = 1000
HEAD = (
    "adapters on", "memory limit", "jobs", "passes", "wall, s", "CPU, s", "disk, GB",
    "MB beyond `import torch`", "alone, s", "what binds",
)  # fmt: skip
WRITER = """import os, sys
file, block = open(sys.argv[1], "wb", buffering=0), os.urandom(8 << 20)
for _ in range(int(sys.argv[2]) // len(block)): file.write(block)
os.fdatasync(file.fileno())"""


@dataclass(frozen=True)
class Llama:
    """The shapes of a Llama; embedding and head count as one when they are tied."""

    hidden: int
    inter: int
    kv: int
    embeddings: int
    layers: int

    @property
    def changed(self) -> dict[str, int]:
        """Elements that each kind of adapter changes."""
        linear = self.layers * self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.inter)
        return dict(zip(ADAPTERS, (linear, self.layers * self.hidden * (self.hidden + self.kv)), strict=True))

    @property
    def numel(self) -> int:
        return max(self.changed.values()) + self.embeddings * self.hidden


LARGE = Llama(8192, 28672, 1024, 2 * 128256, 80)  # Llama-3.1-70B


@dataclass(frozen=True)
class Run:
    """A call of batch: what it took, in how many passes, and what its results take on disk."""

    usage: Usage
    n_passes: int
    disk_nbytes: int


def jobs(work: Path, adapter: Path, n: int) -> Path:
    """A list of n jobs with the same adapter. Nothing that an adapter changes is shared, whether it is the
    same or not."""
    path = work / f"{adapter.name}-{n}.jsonl"
    path.write_text(
        "".join(json.dumps({"adapter": str(adapter.resolve()), "name": f"job-{i}"}) + "\n" for i in range(n))
    )
    return path


def batch(base: Path, listed: Path, out_root: Path, memory: str) -> Run:
    arguments = (
        "batch",
        base,
        listed,
        measure.fresh(out_root),
        "--memory-limit",
        memory,
        "--json",
        "--quiet",
    )
    usage = measure.python("-m", "lorafuse.cli", *arguments)
    n_passes = sum(json.loads(line)["event"] == "pass" for line in usage.stdout.splitlines())
    return Run(usage, n_passes, disk_nbytes(out_root))


def disk_nbytes(root: Path) -> int:
    """Of all files below, each once."""
    found = [os.stat(path) for path in root.rglob("*") if path.is_file()]
    return sum({(one.st_dev, one.st_ino): one.st_blocks * 512 for one in found}.values())


def alone_s(nbytes: int, path: Path) -> float:
    """Seconds in which a process does nothing but write as many bytes and sync them."""
    measure.fresh(path)
    return measure.python("-c", WRITER, path, str(nbytes)).wall_s


def binds(usage: Usage, disk_s: float) -> str:
    """The disk, the cores, or neither alone."""
    n_cores = len(os.sched_getaffinity(0))
    if usage.wall_s <= 1.1 * disk_s:
        return "disk"
    return "cores" if usage.cpu_s >= 0.9 * n_cores * usage.wall_s else "neither alone"


def singles(base: Path, adapter: Path, out_dir: Path, n: int) -> tuple[float, float]:
    """Wall and CPU seconds of n runs one after the other."""
    runs = [measure.convert(base, adapter, measure.fresh(out_dir)) for _ in range(n)]
    return sum(run.wall_s for run in runs), sum(run.cpu_s for run in runs)


def figures(n: int, run: Run, floor: float, disk_s: float) -> list[str]:
    usage = run.usage
    beyond = (usage.peak_rss - floor) / MB
    return [
        str(n),
        str(run.n_passes),
        f"{usage.wall_s:.1f}",
        f"{usage.cpu_s:.1f}",
        f"{run.disk_nbytes / GB:.2f}",
        f"{beyond:.0f}",
        f"{disk_s:.1f}",
        binds(usage, disk_s),
    ]


def marginal(runs: dict[int, Run]) -> list[str]:
    first, last, more = runs[COUNTS[0]], runs[COUNTS[-1]], COUNTS[-1] - COUNTS[0]
    wall_s, cpu_s = last.usage.wall_s - first.usage.wall_s, last.usage.cpu_s - first.usage.cpu_s
    return [
        f"{wall_s / more:.2f}",
        f"{cpu_s / more:.2f}",
        f"{(last.disk_nbytes - first.disk_nbytes) / more / MB:.0f}",
    ]


def against_singles(run: Run, wall_s: float, cpu_s: float) -> list[str]:
    """The largest batch in parts of what its single runs took, in sum."""
    return [f"**{run.usage.wall_s / wall_s:.2f}**", f"**{run.usage.cpu_s / cpu_s:.2f}**"]


def prediction(runs: dict[int, Run], small: Llama, title: str) -> list[str]:
    """T(n) = pass + n · adapter, each in proportion to its elements; single runs are passes with one
    adapter."""
    first, last = runs[COUNTS[0]].usage.wall_s, runs[COUNTS[-1]].usage.wall_s
    small_s = (last - first) / (COUNTS[-1] - COUNTS[0])
    n_passes, changed = math.ceil(N_LARGE / MOST), LARGE.changed[title]
    pass_s, adapter_s = (
        (first - small_s) * LARGE.numel / small.numel,
        small_s * changed / small.changed[title],
    )
    hours, alone = ((n * pass_s + N_LARGE * adapter_s) / 3600 for n in (n_passes, N_LARGE))
    disk = 2 * (LARGE.numel - changed + N_LARGE * changed) / 1e12  # bfloat16
    return [
        str(n_passes),
        f"{hours:,.0f}",
        f"{alone:,.0f}",
        f"{disk:.1f}",
        f"{2 * LARGE.numel * N_LARGE / 1e12:.1f}",
    ]


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    small = Llama(2048, 8192, 512, 128256, layers)
    floor = measure.median([measure.python("-c", "import torch").peak_rss for _ in range(3)])
    rows, next_rows, ratios, predicted = [], [], [], []
    for title, name in ADAPTERS.items():
        runs: dict[int, Run] = {}
        largest: dict[str, Run] = {}
        for memory in LIMITS:
            for n in COUNTS:
                with measure.scratch(work) as outputs:
                    runs[n] = batch(base, jobs(work, adapter.with_name(name), n), outputs / "merged", memory)
                with measure.scratch(work) as outputs:
                    disk_s = alone_s(runs[n].disk_nbytes, outputs / "copied")
                rows.append([title, memory, *figures(n, runs[n], floor, disk_s)])
            next_rows.append([title, memory, *marginal(runs)])
            largest[memory] = runs[COUNTS[-1]]
        with measure.scratch(work) as outputs:
            wall_s, cpu_s = singles(base, adapter.with_name(name), outputs / "merged", COUNTS[-1])
        rows.append(
            [
                title,
                "single runs",
                str(COUNTS[-1]),
                str(COUNTS[-1]),
                f"{wall_s:.1f}",
                f"{cpu_s:.1f}",
                *[""] * 4,
            ]
        )
        ratios += [[title, memory, *against_singles(run, wall_s, cpu_s)] for memory, run in largest.items()]
        predicted.append([title, *prediction(runs, small, title)])
    said = (
        f"Predicted, not measured: {N_LARGE} adapters on Llama-3.1-70B on one machine such as this, from the "
        f"walls of {COUNTS[0]} and {COUNTS[-1]} jobs with {LIMITS[-1]}: what a pass costs grows with the "
        "model's elements, what an adapter costs with the elements that it changes."
    )
    large = ("adapters on", "passes", "hours", "hours of single runs", "disk, TB", "without sharing, TB")
    tables = [
        table(HEAD, rows),
        table((f"{COUNTS[-1]} jobs against single runs, on", "memory limit", "wall", "CPU"), ratios),
        table(("the next adapter, on", "memory limit", "wall, s", "CPU, s", "disk, MB"), next_rows),
    ]
    return "\n\n".join([*tables, said, table(large, predicted)])


if __name__ == "__main__":
    measure.main(__doc__, report)
