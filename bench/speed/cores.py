"""One core against two, and what binds with more of them.

    python -m bench.speed.cores --work build/bench

The first table: the same merge, its result in memory (tmpfs), on one core and on two, in turns; *merge* is
the receipt's `wall_s`, which begins after torch is imported, *command* all of it. The second: the parts of a
merge alone, by one process on one core and then by two at once on two cores, which share nothing but the
machine: no merge gains more of the second core than these do. The third: what a byte of the result costs one
core, measured alone, each the median of five, and its share of them all: what a merge's CPU time consists of,
and the least that it can be while inputs and results are read, written and hashed. Reading back for a hash is
in it only where more than four workers do not wait for the hash. *Fixed* is what a tile costs before its
first byte, the most that can hold Python's interpreter. The fourth is a model: so many cores and such a disk
make the least of what the cores can do, what the interpreter can do (one process), what the hashes can do
(one of each file that is made or waits to be synced), what one file takes (the kernel lets one thread write
to it at a time, and weights come in order), and what the disk takes. Nothing in it was run.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from bench.speed import parts
from bench.speed.compute import roomy
from bench.support import measure
from bench.support.measure import each, median, table

ROUNDS = 5
CORES, DISKS = (1, 2, 8, 16, 64), (0.3, 2.0, 7.0)  # GB/s
N_HASHED = 1 + 4  # files at once: the one that is made, and outdir/output.py's N_FINISHING
MOST_PATIENT = 4  # workers that wait for the hash, as there


class Costs(NamedTuple):
    """Nanoseconds a byte of the result, of one core; `fixed_us`: microseconds a tile of `tile_nbytes`."""

    read: float  # in the page cache
    hash_input: float
    compute: float  # decode, update, cast, measures
    write: float
    hash: float
    read_back: float
    fixed_us: float
    tile_nbytes: int

    @property
    def of_cores(self) -> float:
        return self.read + self.hash_input + self.compute + self.write + self.hash

    def limits(self, n_cores: int, disk: float) -> dict[str, float]:
        """GB a second that each thing allows."""
        waits = n_cores <= MOST_PATIENT
        streams = 1 if waits else min(N_HASHED, n_cores)
        return {
            "cores": n_cores / (self.of_cores + (0 if waits else self.read_back)),
            "interpreter": self.tile_nbytes / self.fixed_us / 1e3,
            "hash": streams / (self.hash + (0 if waits else self.read_back)),
            "file": 1 / self.write,
            "disk": disk,
        }


def merge(base: Path, adapter: Path, out_dir: Path, n_cores: int) -> tuple[float, float]:
    """Wall seconds of the merge, and of the whole command."""
    measure.fresh(out_dir)
    cores = ",".join(map(str, parts.cores(n_cores)))
    command = ["lorafuse.cli", "convert", base, adapter, out_dir, "--max-shard-size", "1GB", "--quiet"]
    usage = measure.run(["taskset", "-c", cores, sys.executable, "-m", *command])
    receipt = json.loads((out_dir / "lorafuse_receipt.json").read_text())
    return float(receipt["timing"]["wall_s"]), usage.wall_s


def scaling(base: Path, adapter: Path, outputs: Path) -> str:
    one, two = measure.alternate(
        lambda: merge(base, adapter, outputs / "merged", 1),
        lambda: merge(base, adapter, outputs / "merged", 2),
        ROUNDS,
    )
    rows = []
    for what, first, second in zip(
        ("merge", "command"), zip(*one, strict=True), zip(*two, strict=True), strict=True
    ):
        ratio = f"**{median(first) / median(second):.2f}**"
        rows.append((what, each(first), each(second), ratio))
    return table(("tmpfs", "one core, s", "two cores, s", "ratio of medians"), rows)


def alone(base: Path, adapter: Path, outputs: Path) -> str:
    rows = [
        (name, f"{1e3 * one:.0f}", f"{1e3 * both:.0f}", f"**{2 * one / both:.2f}**")
        for name, (one, both) in parts.gains(base, adapter, outputs).items()
    ]
    return table(("a part alone", "one core, ms", "each of two cores at once, ms", "gain"), rows)


def model(costs: Costs) -> str:
    rows = []
    for n_cores in CORES:
        limits = [costs.limits(n_cores, disk) for disk in DISKS]
        least = [min(limit, key=limit.__getitem__) for limit in limits]
        cells = [f"{limit[what]:.1f}, {what}" for what, limit in zip(least, limits, strict=True)]
        rows.append((str(n_cores), f"{limits[0]['cores']:.1f}", f"{limits[0]['hash']:.1f}", *cells))
    header = ("cores", "cores alone, GB/s", "hashes alone", *(f"disk of {disk:g} GB/s" for disk in DISKS))
    said = f"The interpreter alone: {costs.limits(1, 1)['interpreter']:.1f} GB/s a process."
    return f"{table(header, rows)}\n\n{said}"


def report(work: Path, layers: int) -> str:
    base, adapter = measure.inputs(work, "llama", layers)
    with measure.scratch(roomy(work, base)) as outputs:
        scaled, gains = scaling(base, adapter, outputs), alone(base, adapter, outputs)
        found = measure.python("-m", "bench.speed.costs", base, adapter, outputs).stdout
    costs = Costs(**json.loads(found))
    names = {
        "read": "reading the base", "hash_input": "hashing the base",
        "compute": "decode, update, cast, measures",
        "write": "writing", "hash": "hashing", "read_back": "reading back for a hash",
    }  # fmt: skip
    rows = [
        (name, f"{(cost := getattr(costs, field)):.2f}", f"{cost / costs.of_cores:.0%}")
        for field, name in names.items()
    ]
    rows.append((f"fixed, µs a tile of {costs.tile_nbytes / 1e6:.1f} MB", f"{costs.fixed_us:.0f}", ""))
    header = ("what", "ns a byte of the result", "of all without reading back")
    return "\n\n".join([scaled, gains, table(header, rows), model(costs)])


if __name__ == "__main__":
    measure.main(__doc__, report)
