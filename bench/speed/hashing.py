"""What it costs to hash the inputs: how much of it is reading them once more, beside the merge.

    python -m bench.speed.hashing --work build/bench

A merge reads a weight's tensors from several places of a file at once, in the order of names; SHA-256 needs
the file's own order. So a thread reads each file again, about as far as the merge is: the disk reads a byte
once, for whichever of the two comes first. That is saved where the file is known: one that this run fetched
from the hub was compared on the way. CPU time of one thread, in this process; the least of several runs. The
last line is of a whole merge whose inputs were in no cache, on a disk; the rest of what it read is Python's.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from bench.support import measure

PIECE = 1 << 20  # as files/hashing.py
ROUNDS = 7


def cpu_s(path: Path, use: Callable[[memoryview], object]) -> float:
    """Reads the file in pieces, each given to `use`."""
    view, at = memoryview(bytearray(PIECE)), 0
    with path.open("rb", buffering=0) as file:
        began = time.thread_time()
        while n := os.preadv(file.fileno(), [view], at):
            use(view[:n])
            at += n
        return time.thread_time() - began


def read_of_inputs(base: Path, adapter: Path, outputs: Path) -> str:
    """What a merge reads from the disk when the page cache holds none of its inputs."""
    files = [path for folder in (base, adapter) for path in folder.iterdir()]
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    used, nbytes = measure.convert(base, adapter, outputs / "merged"), sum(p.stat().st_size for p in files)
    return (
        f"A merge read {used.read_nbytes / measure.GB:.2f} GB from the disk, {used.read_nbytes / nbytes:.2f} "
        f"times its inputs of {nbytes / measure.GB:.2f} GB."
    )


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    path = base / "model.safetensors"
    n_bytes = path.stat().st_size
    uses: dict[str, Callable[[], Callable[[memoryview], object]]] = {
        "reading from the page cache": lambda: len,
        "reading and SHA-256": lambda: hashlib.sha256().update,
    }
    seconds = {name: min(cpu_s(path, make()) for _ in range(ROUNDS)) for name, make in uses.items()}
    whole = max(seconds.values())
    rows = [(name, f"{1e9 * s / n_bytes:.2f}", f"{s / whole:.0%}") for name, s in seconds.items()]
    with measure.scratch(work) as outputs:
        said = read_of_inputs(base, adapter, outputs)
    return f"{measure.table((f'{n_bytes / measure.GB:.2f} GB', 'CPU, ns a byte', 'of both'), rows)}\n\n{said}"


if __name__ == "__main__":
    measure.main(__doc__, report)
