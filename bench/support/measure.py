"""What the benchmarks share: running a command and reading what the kernel says of it, medians, inputs,
tables.

Wall time, CPU time (user + system, every thread and every child that was waited for) and peak resident memory
come from wait4 of a process of its own for each run. Linux starts a child's peak at that of the process it
was forked from, so this module and the scripts that measure import the standard library alone, and `run`
refuses to measure from a process that has grown; what needs torch runs in children.
"""

import argparse
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

MB, GB = 10**6, 10**9
KIB = 1024
LARGEST_PARENT = 60 * MB


class ChildError(Exception):
    """A measured command failed; the message holds the end of what it wrote to stderr."""


@dataclass(frozen=True)
class Usage:
    """What one run of a command took."""

    wall_s: float
    cpu_s: float
    peak_rss: int  # bytes
    stdout: str
    stderr: str
    read_nbytes: int = 0  # from a disk


def run(argv: Sequence[str | Path], **environment: str) -> Usage:
    """Runs a command to its end; a failure is an error, never a measurement. `environment`: what it has
    beside that of this process. Python finds bytecode, as in a package that pip has installed: else each run
    would compile lorafuse anew."""
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    if own_peak > LARGEST_PARENT:
        raise RuntimeError(
            f"this process has grown to {own_peak / MB:.0f} MB, which a child's peak would include"
        )
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        words, env = [str(word) for word in argv], os.environ | environment
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        process = subprocess.Popen(words, stdout=out, stderr=err, env=env)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        usage = Usage(
            wall_s,
            used.ru_utime + used.ru_stime,
            used.ru_maxrss * KIB,
            out.read().decode(),
            err.read().decode(),
            used.ru_inblock * 512,  # getrusage(2): blocks of so many bytes
        )
    if process.returncode:
        raise ChildError(
            f"{' '.join(map(str, argv))} exited with {process.returncode}:\n{usage.stderr[-2000:]}"
        )
    return usage


def python(*args: str | Path, **environment: str) -> Usage:
    return run([sys.executable, *args], **environment)


def convert(base: Path, adapter: Path, out_dir: Path, **environment: str) -> Usage:
    """`lorafuse-convert`, in this interpreter."""
    return python("-m", "lorafuse.cli", "convert", base, adapter, out_dir, "--quiet", **environment)


@contextmanager
def scratch(work: Path) -> Iterator[Path]:
    """A directory for outputs, in the work directory; removed with all that is in it."""
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="outputs-", dir=work) as directory:
        yield Path(directory)


def fresh(out_dir: Path) -> Path:
    """out_dir, which no longer exists, and nothing that waits to be written to disk."""
    shutil.rmtree(out_dir, ignore_errors=True)
    os.sync()
    return out_dir


def alternate(first: Callable[[], A], second: Callable[[], B], pairs: int) -> tuple[list[A], list[B]]:
    """A B A B ...: what else the machine does meanwhile falls on both alike."""
    results = [(first(), second()) for _ in range(pairs)]
    return [a for a, _ in results], [b for _, b in results]


@contextmanager
def busy(n_processes: int) -> Iterator[None]:
    """As many processes that never rest, until this one ends."""
    endless = f"import os\nwhile os.getppid() == {os.getpid()}:\n    for _ in range(10**7): pass"
    loops = [subprocess.Popen([sys.executable, "-c", endless]) for _ in range(n_processes)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def inputs(work: Path, shape: str, layers: int = 16) -> tuple[Path, Path]:
    """The checkpoint and the adapter that synthetic.py makes of this shape, made once in a work directory."""
    directory = work / (f"llama-{layers}" if shape == "llama" else shape)
    if not directory.exists():
        work.mkdir(parents=True, exist_ok=True)
        python("-m", "bench.support.synthetic", shape, directory, "--layers", str(layers))
    return directory / "base", directory / "adapter"


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of each benchmark."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--work", type=Path, required=True, help="directory for inputs (kept) and outputs (removed)"
    )
    made.add_argument("--layers", type=int, default=16, help="layers of the 1B checkpoint (16)")
    return made


def main(doc: str, report: Callable[[Path, int], str]) -> None:
    """The command line of each benchmark."""
    args = parser(doc).parse_args()
    print(watched(report, args.work, args.layers))


def watched(report: Callable[[Path, int], str], work: Path, layers: int) -> str:
    """The report, and how idle the machine was apart from it: what others took makes every figure worse, and
    not alike."""
    # A plain SIGTERM would leave gigabytes of outputs behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wall_began, others_began = time.monotonic(), others_cpu_s()
    text = report(work, layers)
    share = (others_cpu_s() - others_began) / (time.monotonic() - wall_began) / (os.cpu_count() or 1)
    return f"{text}\n\nOther processes took {max(share, 0):.0%} of the processors meanwhile."


def others_cpu_s() -> float:
    """CPU seconds of the whole machine since it started, less those of this process and the children it
    waited for."""
    user, nice, system, _, _, irq, softirq, *_ = (int(ticks) for ticks in _lines("/proc/stat")[0].split()[1:])
    own = sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def each(values: Sequence[float], digits: int = 2) -> str:
    """The single measurements behind a median."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], n_words: int = 1) -> str:
    """A Markdown table: the first `n_words` columns to the left, numbers to the right."""
    rule = ["---"] * n_words + ["---:"] * (len(header) - n_words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def processor() -> str:
    """Its name, how many cores it has, and how wide its vectors are: a name alone may stand for several."""
    facts = dict(map(str.strip, line.split(":", 1)) for line in _lines("/proc/cpuinfo") if ":" in line)
    flags = facts.get("flags", "").split()
    vectors = [name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags]
    name = facts.get("model name", os.uname().machine)
    return ", ".join([name, f"{os.cpu_count()} cores", *vectors[:1]])


def machine() -> str:
    """What the figures were measured on, as one Markdown table."""
    total_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    packages = ("torch", "bitsandbytes", "transformers", "peft", "safetensors")
    facts = [
        ("processor", processor()),
        ("memory", f"{total_kib * KIB / GB:.0f} GB"),
        ("kernel", f"{os.uname().sysname} {os.uname().release}"),
        ("Python", sys.version.split()[0]),
        *((name, version(name)) for name in packages),
        ("date", datetime.now(UTC).date().isoformat()),
    ]
    return table(("measured on", ""), facts).replace("---:", "---")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
