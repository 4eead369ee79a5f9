"""A fleet: a result by several workers, many adapters by several workers, and a prediction for large models.

    python -m bench.speed.fleet --work build/bench

The base is a Llama in NF4 (--layers 16 has 1.2 B parameters; 4 are for a try). Each worker is a process with
a core of its own (taskset); all write to the work directory's disk, and the inputs lie in the page cache. The
coefficients come from one worker, on a quarter and on half of the layers, each the median of five: how long
it takes to start and to plan, to make a byte that is decoded and one that is copied, to commit a byte; for a
batch from calls with one job and with five; and from dd, how fast the disk takes what is written. They are
checked against whole runs by one and by two workers, which they were not made from. *Serial* is what each
worker does for itself, its start and its plan, and the commit, which one process does with as many cores as
it has. *Divided* is what falls to the worker that has most: files are whole, and so are jobs. All workers
wait for the disk where it takes less than they make. A prediction holds where a worker has such a core; the
time to decode is that of NF4.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

from bench.speed.batch import LARGE, MOST, N_LARGE, Llama, jobs
from bench.support import measure
from bench.support.measure import GB, MB, table

SHARD, SHARD_NBYTES = "100MB", 100e6
WORKERS = (1, 2)
FLEETS = (1, 2, 4, 8, 16, 32, 64)
STORAGE = (1 * GB, 10 * GB, math.inf)  # bytes a second, read and written by all workers together
FEW_JOBS, N_JOBS = (1, 5), 36
ROUNDS = 5
HUGE_NUMEL, FILE_NBYTES = 671e9, 5 * GB
NF4_NBYTES = 0.516  # of an element: half a byte, and the scales of double quantization
COMMIT_CORES = 16


@dataclass(frozen=True)
class Size:
    """Bytes of a result's weights that are decoded, and of the others; and what is read for them."""

    decoded: float
    copied: float
    read: float = 0.0  # from a disk; nothing of what lies in the page cache

    @property
    def nbytes(self) -> float:
        return self.decoded + self.copied


@dataclass(frozen=True)
class Coefficients:
    """Seconds of one worker with one core: to start and to plan, to make a byte that is decoded or copied,
    and to commit a byte."""

    start_s: float
    decoded_s: float
    copied_s: float
    commit_s: float

    def files_s(self, size: Size, n_workers: int, file_nbytes: float, disk: float = math.inf) -> float:
        """Until the last of N workers has made its files, which are whole ones, on a disk that takes and
        gives so many bytes a second."""
        n_files = max(round(size.nbytes / file_nbytes), 1)
        most = math.ceil(n_files / n_workers) / n_files
        made_s = most * (self.decoded_s * size.decoded + self.copied_s * size.copied)
        return self.start_s + max(made_s, (size.nbytes + size.read) / disk)

    def committed_s(self, size: Size, n_cores: int, disk: float = math.inf) -> float:
        """One process hashes all files and the inputs, and gives the result its name."""
        return self.start_s + max(self.commit_s * size.nbytes / n_cores, (size.nbytes + size.read) / disk)


@dataclass(frozen=True)
class BatchCoefficients:
    """Seconds of one worker: to start; for a pass, in which the files that all results share are made; for a
    job; and how much of a pass a later one takes, which finds these files."""

    start_s: float
    pass_s: float
    job_s: float
    later: float

    def batch_s(self, n_jobs: int, n_workers: int) -> float:
        """Until the worker that has most jobs has done them."""
        most = math.ceil(n_jobs / n_workers)
        passes = 1 + self.later * (math.ceil(most / MOST) - 1)
        return self.start_s + passes * self.pass_s + most * self.job_s

    def scaled(self, of: Llama, to: Llama, kind: str) -> "BatchCoefficients":
        """For another model: a pass grows with its elements, a job with those that its adapter changes."""
        return BatchCoefficients(
            self.start_s,
            self.pass_s * to.numel / of.numel,
            self.job_s * to.changed[kind] / of.changed[kind],
            to.changed[kind] / to.numel,
        )


def at_once(commands: Sequence[Sequence[str | Path]], n_cores: int = 1) -> float:
    """Seconds until all have ended, each on cores of its own. Raises ChildError."""
    began = time.perf_counter()
    workers = []
    for number, command in enumerate(commands):
        cores = ",".join(str(number * n_cores + i) for i in range(n_cores))
        words = ["taskset", "-c", cores, sys.executable, "-m", "lorafuse.cli", *map(str, command), "--quiet"]
        workers.append(subprocess.Popen(words, stdout=subprocess.DEVNULL))
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise measure.ChildError(f"a worker failed: {commands}")
    return time.perf_counter() - began


def convert(base: Path, adapter: Path, out: Path, *options: str) -> list[str | Path]:
    return ["convert", base, adapter, out, "--max-shard-size", SHARD, *options]


def result_of(base: Path, adapter: Path, out: Path, n_workers: int, cores: int = 1) -> tuple[float, float]:
    """Seconds for the files by so many workers at once, and to commit them with so many cores."""
    measure.fresh(out)
    parts = [
        convert(base, adapter, out, "--index", str(index), "--of", str(n_workers))
        for index in range(n_workers)
    ]
    return at_once(parts), at_once([convert(base, adapter, out, "--commit")], cores)


def medians(run: Callable[[], tuple[float, ...]]) -> list[float]:
    """Of each figure of several runs."""
    return [measure.median(figures) for figures in zip(*(run() for _ in range(ROUNDS)), strict=True)]


def size_of(base: Path, adapter: Path, out: Path) -> Size:
    said = measure.python("-m", "lorafuse.cli", *convert(base, adapter, out, "--dry-run", "--json"))
    plan = json.loads(said.stdout.splitlines()[-1])
    decoded = 2 * sum(plan["decoded"].values())  # bfloat16
    return Size(decoded, plan["nbytes"] - decoded)


def written_rate(work: Path, nbytes: float) -> float:
    """Bytes a second that the disk takes, by dd."""
    with measure.scratch(work) as outputs:
        path, n_mb = outputs / "zeros", max(round(nbytes / MB), 1)
        words = ["dd", "if=/dev/zero", f"of={path}", "bs=1000000", f"count={n_mb}", "conv=fdatasync"]
        return n_mb * MB / medians(lambda: (measure.run(words).wall_s,))[0]


def coefficients(work: Path, quarter: tuple[Path, Path], half: tuple[Path, Path]) -> Coefficients:
    """Two models differ in what is decoded, so that both kinds of bytes can be told apart."""
    with measure.scratch(work) as outputs:
        out = outputs / "merged"
        small, large = (size_of(*inputs, out) for inputs in (quarter, half))
        idle = convert(*half, measure.fresh(out), "--index", "9999", "--of", "10000")
        start_s = medians(lambda: (at_once([idle]),))[0]
        small_s, _ = medians(lambda: result_of(*quarter, out, 1))
        large_s, commit_s = medians(lambda: result_of(*half, out, 1))
    decoded_s = (large_s - small_s) / (large.decoded - small.decoded)
    return Coefficients(
        start_s,
        decoded_s,
        (large_s - start_s - decoded_s * large.decoded) / large.copied,
        (commit_s - start_s) / large.nbytes,
    )


def doubtful(*coefficients: float) -> str:
    """What to say of a difference of two runs that nothing but other processes can have made."""
    return "" if min(coefficients) > 0 else "\n\nA coefficient is negative: the machine was not idle."


def checked(predicted: float, measured: float) -> list[str]:
    return [f"{predicted:.1f}", f"{measured:.1f}", f"{predicted / measured - 1:+.0%}"]


def one_result(work: Path, whole: tuple[Path, Path], known: Coefficients) -> str:
    """N workers, and a commit with N cores."""
    rows = []
    for n in WORKERS:
        with measure.scratch(work) as outputs:
            out = outputs / "merged"
            size = size_of(*whole, out)
            files_s, commit_s = medians(partial(result_of, *whole, out, n, n))
        of_files = checked(known.files_s(size, n, SHARD_NBYTES, written_rate(work, size.nbytes)), files_s)
        rows.append([str(n), *of_files, *checked(known.committed_s(size, n), commit_s)])
    said = ("predicted, s", "measured, s", "error")
    head = [f"{what}, {word}" for what in ("files", "commit") for word in said]
    return table(("workers, or cores of the commit", *head), rows)


def batch_of(base: Path, adapter: Path, work: Path, n_jobs: int, n_workers: int) -> float:
    with measure.scratch(work) as outputs:
        command = ["batch", base, jobs(work, adapter, n_jobs), outputs / "merged", "--memory-limit", "1GB"]
        shares = [[*command, "--index", str(i), "--of", str(n_workers)] for i in range(n_workers)]
        return at_once(shares)


def many_adapters(work: Path, whole: tuple[Path, Path], layers: int, start_s: float) -> str:
    """Checked on a few adapters; predicted for a thousand, of a larger model."""
    base, adapter, title = whole[0], whole[1].with_name("adapter-qv"), "q_proj and v_proj"
    small = Llama(2048, 8192, 512, 128256, layers)
    few_s, more_s = medians(lambda: tuple(batch_of(base, adapter, work, n, 1) for n in FEW_JOBS))
    job_s = (more_s - few_s) / (FEW_JOBS[1] - FEW_JOBS[0])
    pass_s = few_s - start_s - FEW_JOBS[0] * job_s
    known = BatchCoefficients(start_s, pass_s, job_s, small.changed[title] / small.numel)
    rows = []
    for n in WORKERS:
        measured = batch_of(base, adapter, work, N_JOBS, n)
        rows.append([str(n), *checked(known.batch_s(N_JOBS, n), measured)])
    doubt = doubtful(start_s, pass_s, job_s)
    large = known.scaled(small, LARGE, title)
    hours = [f"{large.batch_s(N_LARGE, n) / 3600:,.1f}" for n in FLEETS]
    written = 2 * (LARGE.numel + (N_LARGE - 1) * LARGE.changed[title])
    said = (
        f"Predicted, not measured: {N_LARGE} adapters on q_proj and v_proj of Llama-3.1-70B, in NF4. The "
        f"results of one worker take {written / 1e12:.1f} TB; each further worker writes the files that all "
        f"of its results share once more, {2 * (LARGE.numel - LARGE.changed[title]) / 1e12:.1f} TB."
    )
    return "\n\n".join(
        [
            table(("workers", "predicted, s", "measured, s", "error"), rows) + doubt,
            said,
            table(("workers", *map(str, FLEETS)), [["hours", *hours]]),
        ]
    )


def predicted_huge(known: Coefficients) -> str:
    """By what storage all workers together have, since it may be what binds."""
    size = Size(2 * HUGE_NUMEL, 0, NF4_NBYTES * HUGE_NUMEL)
    rows = []
    for disk in STORAGE:
        files = [f"{known.files_s(size, n, FILE_NBYTES, disk) / 3600:,.1f}" for n in FLEETS]
        commit = f"{known.committed_s(size, COMMIT_CORES, disk) / 3600:,.2f}"
        rows.append([f"{disk / GB:g} GB/s" if disk < math.inf else "never binds", *files, commit])
    return table(("storage", *(f"{n}, h" for n in FLEETS), f"commit, {COMMIT_CORES} cores, h"), rows)


def report(work: Path, layers: int) -> str:
    quarter, half, whole = (measure.inputs(work, "llama", layers // part) for part in (4, 2, 1))
    known = coefficients(work, quarter, half)
    said = (
        f"A worker takes {known.start_s:.1f} s to start and to plan, {known.decoded_s * GB:.2f} s for a GB "
        f"that is decoded, {known.copied_s * GB:.2f} s for a GB that is copied; a commit takes "
        f"{known.commit_s * GB:.2f} s for a GB, with one core. One result of {layers} layers:"
    ) + doubtful(*astuple(known))
    return "\n\n".join(
        [
            said,
            one_result(work, whole, known),
            f"{N_JOBS} adapters on q_proj and v_proj of it, at most {MOST} to a pass:",
            many_adapters(work, whole, layers, known.start_s),
            "Predicted, not measured: one result of 671 B parameters in bfloat16, from NF4, in files of 5 "
            "GB: hours by so many workers, by how much storage gives and takes of all of them in a second.",
            predicted_huge(known),
        ]
    )


if __name__ == "__main__":
    measure.main(__doc__, report)
