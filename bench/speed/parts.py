"""What two cores give for the parts of a merge alone: no merge gains more from the second core than they do.

    python -m bench.speed.parts NAME BASE ADAPTER DIRECTORY

Does one part again and again, once for each line on stdin, and prints the seconds that it took. `gains` runs
one such process on one core, then two of them at once on two cores, which share nothing but the machine.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.support.measure import median

ROUNDS = 7
CHUNK, N_CHUNKS = 1 << 20, 128
Work = Callable[[], object]


def sha256(base: Path, adapter: Path, directory: Path) -> Work:
    chunk, digest = os.urandom(CHUNK), hashlib.sha256()
    return lambda: [digest.update(chunk) for _ in range(N_CHUNKS)]


def arithmetic(base: Path, adapter: Path, directory: Path) -> Work:
    """Decode, update, cast and measures, of tiles of a few weights."""
    from bench.speed.costs import opened_tiles

    return opened_tiles(base, adapter).make


def page_cache(base: Path, adapter: Path, directory: Path) -> Work:
    """Ranged reads of the base."""
    file, buffer = (base / "model.safetensors").open("rb", buffering=0), bytearray(CHUNK)
    return lambda: [os.preadv(file.fileno(), [buffer], number * CHUNK) for number in range(N_CHUNKS)]


def writing(base: Path, adapter: Path, directory: Path) -> Work:
    """Positioned writes into a new file of `directory`."""
    path, chunk = directory / f"part-{os.getpid()}", os.urandom(CHUNK)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for number in range(N_CHUNKS):
                os.pwrite(file.fileno(), chunk, number * CHUNK)
        path.unlink()

    return write


def writing_beside(base: Path, adapter: Path, directory: Path) -> Work:
    """Positioned writes into a file of `directory` that another process writes too, elsewhere: the kernel
    lets one of them in at a time."""
    chunk, number = os.urandom(CHUNK), os.open(directory / "parts", os.O_WRONLY | os.O_CREAT)
    first = min(os.sched_getaffinity(0)) * N_CHUNKS
    return lambda: [os.pwrite(number, chunk, (first + n) * CHUNK) for n in range(N_CHUNKS)]


def copying(base: Path, adapter: Path, directory: Path) -> Work:
    """Memory that no cache holds."""
    source, target = bytearray(N_CHUNKS * CHUNK), bytearray(N_CHUNKS * CHUNK)

    def copy() -> None:
        target[:] = source

    return copy


def interpreting(base: Path, adapter: Path, directory: Path) -> Work:
    """Python's own bytecode."""
    return lambda: sum(number & 1 for number in range(1_000_000))


PARTS = {
    "SHA-256": sha256,
    "decode, update, cast, measures": arithmetic,
    "reading from the page cache": page_cache,
    "writing to a new file": writing,
    "writing to one file": writing_beside,
    "copying memory": copying,
    "Python": interpreting,
}


class Worker:
    """A process that does one part, on one core."""

    def __init__(self, name: str, core: int, paths: Sequence[Path]) -> None:
        command = ["taskset", "-c", str(core), sys.executable, "-m", "bench.speed.parts", name, *paths]
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def begin(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("\n")

    def seconds(self) -> float:
        assert self._process.stdout
        return float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def gains(base: Path, adapter: Path, directory: Path) -> dict[str, tuple[float, float]]:
    """Name of a part → seconds of it on one core alone, and on each of two at once: medians of rounds in
    turns."""
    found = {}
    for name in PARTS:
        workers = [Worker(name, core, (base, adapter, directory)) for core in cores(2)]
        alone, both = [], []
        for number in range(ROUNDS + 1):
            workers[0].begin()
            alone.append(workers[0].seconds())
            for worker in workers:
                worker.begin()
            both.append(max([worker.seconds() for worker in workers]))
            if number == 0:  # which warms up
                alone, both = [], []
        for worker in workers:
            worker.end()
        found[name] = (median(alone), median(both))
    return found


def cores(n: int) -> list[int]:
    """The first of those that this process may use."""
    return sorted(os.sched_getaffinity(0))[:n]


def main() -> None:
    name, *paths = sys.argv[1:]
    base, adapter, directory = map(Path, paths)
    work = PARTS[name](base, adapter, directory)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
