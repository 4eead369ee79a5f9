"""Quantized bases: how long a merge takes for each element, against the same merge of an NF4 checkpoint.

    python -m bench.speed.bases --work build/bench

Each format has the shapes of two layers of the 1B model (gpt-oss: of four experts of its 20B), and a rank-16
adapter over all of it (bench/support/bases.py). Merges of a format and of NF4 take turns. Compute is
`timing.compute_cpu_s` of the receipt: decode, update, cast. The command's CPU time holds the rest too: start,
reading, measures, hashes, writing. Ratios are those of the medians, by element; what is stored transposed
comes last.
"""

import json
from pathlib import Path
from typing import NamedTuple

from bench.speed.compute import roomy
from bench.support import measure
from bench.support.measure import median

ROUNDS = 5
N_BASES: int | None = None  # all of them
NF4 = "NF4"


class Cost(NamedTuple):
    """Nanoseconds for each element of the result."""

    compute: float
    command: float


def inputs(work: Path, name: str) -> Path:
    """The directory with a base and an adapter, made once."""
    directory = work / "bases" / "".join(c if c.isalnum() else "-" for c in name)
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        measure.python("-m", "bench.support.bases", name, directory)
    return directory


def merge(directory: Path, out_dir: Path) -> Cost:
    used = measure.convert(directory / "base", directory / "adapter", measure.fresh(out_dir))
    receipt = json.loads((out_dir / "lorafuse_receipt.json").read_text())
    n_elements = sum(path.stat().st_size for path in out_dir.glob("*.safetensors")) // 2
    return Cost(1e9 * float(receipt["timing"]["compute_cpu_s"]) / n_elements, 1e9 * used.cpu_s / n_elements)


def report(work: Path, layers: int) -> str:
    rows, nf4 = [], inputs(work, NF4)
    names = measure.python("-m", "bench.support.bases", "--list").stdout.split("\n")
    with measure.scratch(roomy(work, nf4 / "base")) as outputs:
        for name in list(filter(None, names))[:N_BASES]:
            directory = inputs(work, name)
            merge(directory, outputs / "merged")  # the inputs into the page cache
            of_nf4, own = measure.alternate(
                lambda: merge(nf4, outputs / "nf4"),
                lambda directory=directory: merge(directory, outputs / "merged"),  # type: ignore[misc]
                ROUNDS,
            )
            (compute, command), (compute_nf4, command_nf4) = (
                tuple(median(costs) for costs in zip(*runs, strict=True)) for runs in (own, of_nf4)
            )
            ratios = f"**{compute / compute_nf4:.2f}**", f"{command / command_nf4:.2f}"
            rows.append(
                (name, f"{compute:.2f}", f"{compute_nf4:.2f}", ratios[0], f"{command:.1f}", ratios[1])
            )
    header = ("base", "compute, ns", "of NF4", "ratio", "command, CPU ns", "ratio to NF4's")
    return measure.table(header, rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
