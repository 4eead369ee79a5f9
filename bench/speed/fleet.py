"""A fleet: a result by several workers, many adapters by several workers, and a prediction for large models.

    python -m bench.speed.fleet --work build/bench

The base is a Llama in NF4 (--layers 16 has 1.2 B parameters). Each worker is a process with a core of its own
(taskset); all write to the work directory's disk. The coefficients come from one worker, on a quarter and on
half of the layers: how long it takes to start, to make a byte that is decoded and one that is copied, and to
commit a byte; for a batch from calls with one job and with five. They are checked against whole runs by one
and by two workers, which they were not made from. What they predict holds where every worker has such a core,
and its share of such a disk; the time to decode is that of NF4.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.speed.batch import LARGE, MOST, N_LARGE, Llama, jobs
from bench.support import measure
from bench.support.measure import GB, table

SHARD, SHARD_NBYTES = "100MB", 100e6
WORKERS = (1, 2)
FLEETS = (1, 2, 4, 8, 16, 32, 64)
FEW_JOBS, N_JOBS = (1, 5), 8
HUGE_NUMEL, FILE_NBYTES = 671e9, 5 * GB


@dataclass(frozen=True)
class Size:
    """Of a result: bytes of weights that are decoded, and of the others."""

    decoded: float
    copied: float

    @property
    def nbytes(self) -> float:
        return self.decoded + self.copied


@dataclass(frozen=True)
class Coefficients:
    """Seconds of one worker: to start and to plan, to make a byte that is decoded or copied, and to commit a
    byte."""

    start_s: float
    decoded_s: float
    copied_s: float
    commit_s: float

    def files_s(self, size: Size, n_workers: int, file_nbytes: float) -> float:
        """Until the last of N workers has made its files, which are whole ones."""
        n_files = max(round(size.nbytes / file_nbytes), 1)
        most = math.ceil(n_files / n_workers) / n_files
        return self.start_s + most * (self.decoded_s * size.decoded + self.copied_s * size.copied)

    def committed_s(self, size: Size) -> float:
        """One process checks all files, hashes the inputs, and gives the result its name."""
        return self.start_s + self.commit_s * size.nbytes


def batch_s(n_jobs: int, n_workers: int, start_s: float, pass_s: float, job_s: float) -> float:
    """Of the worker that has most jobs: it starts, and each pass and each job takes its time."""
    most = math.ceil(n_jobs / n_workers)
    return start_s + math.ceil(most / MOST) * pass_s + most * job_s


def at_once(commands: Sequence[Sequence[str | Path]]) -> float:
    """Seconds until all have ended, each on a core of its own. Raises ChildError."""
    began = time.perf_counter()
    workers = [
        subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, "-m", "lorafuse.cli", *map(str, command), "--quiet"],
            stdout=subprocess.DEVNULL,
        )
        for core, command in enumerate(commands)
    ]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise measure.ChildError(f"a worker failed: {commands}")
    return time.perf_counter() - began


def convert(base: Path, adapter: Path, out: Path, *options: str) -> list[str | Path]:
    return ["convert", base, adapter, out, "--max-shard-size", SHARD, *options]


def result_of(base: Path, adapter: Path, out: Path, n_workers: int) -> tuple[float, float]:
    """Seconds for the files by so many workers at once, and to commit them."""
    measure.fresh(out)
    parts = [
        convert(base, adapter, out, "--index", str(index), "--of", str(n_workers))
        for index in range(n_workers)
    ]
    return at_once(parts), at_once([convert(base, adapter, out, "--commit")])


def size_of(base: Path, adapter: Path, out: Path) -> Size:
    said = measure.python("-m", "lorafuse.cli", *convert(base, adapter, out, "--dry-run", "--json"))
    plan = json.loads(said.stdout.splitlines()[-1])
    decoded = 2 * sum(plan["decoded"].values())  # bfloat16
    return Size(decoded, plan["nbytes"] - decoded)


def coefficients(work: Path, quarter: tuple[Path, Path], half: tuple[Path, Path]) -> Coefficients:
    """Two models differ in what is decoded, so that both kinds of bytes can be told apart."""
    with measure.scratch(work) as outputs:
        out = outputs / "merged"
        small, large = (size_of(*inputs, out) for inputs in (quarter, half))
        idle = convert(*half, measure.fresh(out), "--index", "9999", "--of", "10000")
        start_s = measure.median([at_once([idle]) for _ in range(3)])
        small_s, _ = result_of(*quarter, out, 1)
        large_s, commit_s = result_of(*half, out, 1)
    decoded_s = (large_s - small_s) / (large.decoded - small.decoded)
    return Coefficients(
        start_s,
        decoded_s,
        (large_s - start_s - decoded_s * large.decoded) / large.copied,
        (commit_s - start_s) / large.nbytes,
    )


def checked(predicted: float, measured: float) -> list[str]:
    return [f"{predicted:.1f}", f"{measured:.1f}", f"{predicted / measured - 1:+.0%}"]


def one_result(work: Path, whole: tuple[Path, Path], known: Coefficients) -> str:
    rows = []
    for n_workers in WORKERS:
        with measure.scratch(work) as outputs:
            size = size_of(*whole, outputs / "merged")
            files_s, commit_s = result_of(*whole, outputs / "merged", n_workers)
        of_files = checked(known.files_s(size, n_workers, SHARD_NBYTES), files_s)
        rows.append([str(n_workers), *of_files, *checked(known.committed_s(size), commit_s)])
    said = ("predicted, s", "measured, s", "error")
    head = [f"{what}, {word}" for what in ("files", "commit") for word in said]
    return table(("workers", *head), rows)


def batch_of(base: Path, adapter: Path, work: Path, n_jobs: int, n_workers: int) -> float:
    with measure.scratch(work) as outputs:
        command = ["batch", base, jobs(work, adapter, n_jobs), outputs / "merged", "--memory-limit", "1GB"]
        shares = [[*command, "--index", str(i), "--of", str(n_workers)] for i in range(n_workers)]
        return at_once(shares)


def many_adapters(work: Path, whole: tuple[Path, Path], layers: int, start_s: float) -> str:
    """Checked on a few adapters; predicted for a thousand, of a larger model."""
    adapter = whole[1].with_name("adapter-qv")
    few_s, more_s = (batch_of(whole[0], adapter, work, n, 1) for n in FEW_JOBS)
    job_s = (more_s - few_s) / (FEW_JOBS[1] - FEW_JOBS[0])
    pass_s = few_s - start_s - FEW_JOBS[0] * job_s
    rows = []
    for n_workers in WORKERS:
        measured = batch_of(whole[0], adapter, work, N_JOBS, n_workers)
        rows.append([str(n_workers), *checked(batch_s(N_JOBS, n_workers, start_s, pass_s, job_s), measured)])
    small, title = Llama(2048, 8192, 512, 128256, layers), "q_proj and v_proj"
    of_pass = pass_s * LARGE.numel / small.numel
    of_job = job_s * LARGE.changed[title] / small.changed[title]
    hours = [f"{batch_s(N_LARGE, n, start_s, of_pass, of_job) / 3600:,.1f}" for n in FLEETS]
    return "\n\n".join(
        [
            table(("workers", "predicted, s", "measured, s", "error"), rows),
            f"Predicted, not measured: {N_LARGE} adapters on q_proj and v_proj of Llama-3.1-70B.",
            table(("workers", *map(str, FLEETS)), [["hours", *hours]]),
        ]
    )


def predicted_huge(known: Coefficients) -> str:
    size = Size(2 * HUGE_NUMEL, 0)
    files = [f"{known.files_s(size, n, FILE_NBYTES) / 3600:,.1f}" for n in FLEETS]
    commit = f"{known.committed_s(size) / 3600:,.1f}"
    rows = [["files, hours", *files], ["commit, hours", *[commit] * len(FLEETS)]]
    return table(("workers", *map(str, FLEETS)), rows)


def report(work: Path, layers: int) -> str:
    quarter, half, whole = (measure.inputs(work, "llama", layers // part) for part in (4, 2, 1))
    known = coefficients(work, quarter, half)
    said = (
        f"A worker takes {known.start_s:.1f} s to start and to plan, {known.decoded_s * GB:.1f} s for a GB "
        f"that is decoded, {known.copied_s * GB:.1f} s for a GB that is copied; a commit takes "
        f"{known.commit_s * GB:.1f} s for a GB. One result of {layers} layers:"
    )
    return "\n\n".join(
        [
            said,
            one_result(work, whole, known),
            f"{N_JOBS} adapters on q_proj and v_proj of it:",
            many_adapters(work, whole, layers, known.start_s),
            "Predicted, not measured: one result of 671 B parameters in bfloat16, in files of 5 GB.",
            predicted_huge(known),
        ]
    )


if __name__ == "__main__":
    measure.main(__doc__, report)
