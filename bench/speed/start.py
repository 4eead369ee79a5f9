"""How soon the command answers, and what of its start could be done at once.

    python -m bench.speed.start --work build/bench

A merge of a tiny model (fixtures/) is mostly `import torch`. The last lines import torch in a thread while
the main thread sleeps, or works in Python, for as long as the whole rest of such a merge takes: a sleep
lets the import go on, but the import needs the interpreter's lock nearly all of the time, so that work beside
it takes as long as work after it. What a run hashes anyway needs that lock seldom, and is begun beside the
import (lorafuse/files/early_hashing.py); its input lies in the page cache. Figures are medians of runs in
turns, each in a process of its own.
"""

from pathlib import Path

from bench.support import measure
from bench.support.measure import MB, Usage, median, table

ROUNDS = 9
REST_S = 0.3  # about what a tiny merge takes without torch
WORK = f"\nimport time\nend = time.thread_time() + {REST_S}\nwhile time.thread_time() < end: pass\n"
IN_THREAD = (
    "import threading, time\nthread = threading.Thread(target=__import__, args=('torch',))\nthread.start()\n"
)
MERGE = "`lorafuse-convert`, a tiny model"
HELP = "`lorafuse-convert --help`"
ALONE, HASHING, BESIDE, AFTER, ASLEEP = (
    "`import torch`",
    "`import torch` beside SHA-256 of a base in another thread",
    "`import torch` beside 0.3 s of Python in another thread",
    "`import torch`, then 0.3 s of Python",
    "`import torch` beside 0.3 s of sleep in another thread",
)


EARLY = (
    "import sys\nfrom lorafuse.files import early_hashing as early\n"
    "with early.hashing_meanwhile(sys.argv[1]):\n    import torch\n"
    "print(sum(begun.nbytes for begun in early._BEGUN.values()))\n"
)


def commands(base: Path, out: Path) -> dict[str, tuple[str | Path, ...]]:
    fixtures = ("fixtures/llama-nf4", "fixtures/llama-adapter")
    convert = ("-m", "lorafuse.cli", "convert")
    return {
        "`python -c pass`": ("-c", "pass"),
        HELP: (*convert, "--help"),
        MERGE: (*convert, "--quiet", "--overwrite", *fixtures, out),
        "`import lorafuse.pipeline`": ("-c", "import lorafuse.pipeline"),
        ALONE: ("-c", "import torch"),
        HASHING: ("-c", EARLY, base),
        AFTER: ("-c", f"import torch{WORK}"),
        BESIDE: ("-c", f"{IN_THREAD}{WORK}thread.join()"),
        ASLEEP: ("-c", f"{IN_THREAD}time.sleep({REST_S})\nthread.join()"),
    }


def imports_torch(command: tuple[str | Path, ...]) -> bool:
    imported = measure.python("-X", "importtime", *command).stderr
    return any(line.rpartition("|")[2].strip() == "torch" for line in imported.splitlines())


def report(work: Path, layers: int) -> str:
    base, _ = measure.inputs(work, "llama", layers)
    with measure.scratch(work) as outputs:
        wanted = commands(base, outputs / "merged")
        runs: dict[str, list[Usage]] = {name: [] for name in wanted}
        for _ in range(ROUNDS):
            for name, command in wanted.items():
                runs[name].append(measure.python(*command))
        rows = []
        for name, command in wanted.items():
            wall_s, cpu_s = (median([getattr(run, key) for run in runs[name]]) for key in ("wall_s", "cpu_s"))
            torch = "yes" if imports_torch(command) else "no"
            rows.append((name, f"{wall_s:.2f}", f"{cpu_s:.2f}", torch))
    header = (f"median of {ROUNDS} runs", "wall, s", "CPU, s", "imports torch")
    gains = [
        median([b.wall_s / a.wall_s for a, b in zip(runs[AFTER], runs[name], strict=True)])
        for name in (BESIDE, ASLEEP)
    ]
    said = (
        f"Of the wall time of one after the other, work beside the import takes {gains[0]:.2f}, sleep beside "
        f"it {gains[1]:.2f}: what waits can be done meanwhile, what computes in Python cannot. Hashed beside "
        f"it: {median([int(run.stdout) for run in runs[HASHING]]) / MB:.0f} MB of a base of "
        f"{(base / 'model.safetensors').stat().st_size / MB:.0f} MB."
    )
    return f"{table(header, rows)}\n\n{said}"


if __name__ == "__main__":
    measure.main(__doc__, report)
