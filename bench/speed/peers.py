"""The whole merge: against transformers + PEFT, against writing the bytes alone, and how soon the command
answers.

    python -m bench.speed.peers --work build/bench

Each pair of commands takes turns; every output goes to the work directory, and before each run nothing waits
to be written. lorafuse's time includes hashing all it reads and writes and syncing it to disk, which the save
of transformers does not do; dd writes and syncs (conv=fdatasync) the same number of bytes. The inputs lie in
the page cache.
"""

from pathlib import Path

from bench.support import measure
from bench.support.measure import GB, MB, Usage, each, median, table

PAIRS = 3
STARTS = 10


def merges(work: Path, layers: int) -> str:
    """lorafuse against what a user of transformers and PEFT does (peft_merge.py), and whether the results
    agree."""
    base, adapter = measure.inputs(work, "llama", layers)
    with measure.scratch(work) as outputs:
        ours_dir, theirs_dir = outputs / "lorafuse", outputs / "peft"

        def theirs() -> Usage:
            return measure.python("-m", "bench.speed.peft_merge", base, adapter, measure.fresh(theirs_dir))

        a, b = measure.alternate(
            lambda: measure.convert(base, adapter, measure.fresh(ours_dir)), theirs, PAIRS
        )
        differing, total = measure.python("-m", "bench.speed.differing", ours_dir, theirs_dir).stdout.split()
    rows = [
        versus("wall time, s", [run.wall_s for run in a], [run.wall_s for run in b]),
        versus("CPU time, s", [run.cpu_s for run in a], [run.cpu_s for run in b]),
        versus(
            "peak memory, MB", [run.peak_rss / MB for run in a], [run.peak_rss / MB for run in b], digits=0
        ),
    ]
    header = (f"whole merge, Llama of {layers} layers", "lorafuse", "transformers + PEFT", "PEFT / lorafuse")
    return (
        f"{table(header, rows)}\n\nOf {int(total):,} elements, {int(differing):,} differ between the two "
        "results."
    )


def versus(what: str, ours: list[float], theirs: list[float], digits: int = 1) -> tuple[str, ...]:
    return what, each(ours, digits), each(theirs, digits), f"**{median(theirs) / median(ours):.1f}**"


def disk(work: Path, layers: int) -> str:
    """The merge against copying its result to the same disk with dd."""
    base, adapter = measure.inputs(work, "llama", layers)
    with measure.scratch(work) as outputs:
        merged, copy = outputs / "merged", outputs / "copy"
        measure.convert(base, adapter, merged)
        result = merged / "model.safetensors"

        def dd() -> float:
            measure.fresh(copy).mkdir()
            return measure.run(
                ["dd", f"if={result}", f"of={copy / result.name}", "bs=8M", "conv=fdatasync"]
            ).wall_s

        a, b = measure.alternate(
            lambda: measure.convert(base, adapter, measure.fresh(outputs / "again")).wall_s, dd, PAIRS
        )
        n_bytes = result.stat().st_size
    header = (f"{n_bytes / GB:.2f} GB to the same disk", "lorafuse", "dd, synced", "lorafuse / dd")
    return table(header, [("wall time, s", each(a), each(b), f"**{median(a) / median(b):.2f}**")])


def start() -> str:
    """How long --help takes, and that it does not import torch."""
    command = ("-m", "lorafuse.cli", "convert", "--help")
    imported = measure.python("-X", "importtime", *command).stderr
    has_torch = any(line.rpartition("|")[2].strip() == "torch" for line in imported.splitlines())
    ours, floor = measure.alternate(
        lambda: measure.python(*command).wall_s, lambda: measure.python("-c", "pass").wall_s, STARTS
    )
    header = (f"median of {STARTS} starts", "wall time, s", "imports torch")
    rows = [
        ("`lorafuse-convert --help`", f"**{median(ours):.2f}**", "yes" if has_torch else "no"),
        ("`python -c pass`", f"{median(floor):.2f}", "no"),
    ]
    return table(header, rows)


def report(work: Path, layers: int) -> str:
    return "\n\n".join([merges(work, layers), disk(work, layers), start()])


if __name__ == "__main__":
    measure.main(__doc__, report)
