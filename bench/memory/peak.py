"""Peak resident memory of the whole command beyond that of `import torch`, on a model and on one enormous
matrix.

    python -m bench.memory.peak --work build/bench

The matrix is 16384 x 53248 in NF4 (1.7 GB once merged), beside an embedding of 1.05 GB. What counts is the
highest figure of the runs against the median of a process that imports torch and ends; outputs go to the work
directory.
"""

from pathlib import Path

from bench.support import measure
from bench.support.measure import GB, MB, each, median, table

RUNS = 3
SHAPES = {"Llama of {layers} layers": "llama", "one matrix of 16384 x 53248, one embedding": "wide"}


def peaks(base: Path, adapter: Path, out_dir: Path) -> list[float]:
    """MB of each run."""
    return [measure.convert(base, adapter, measure.fresh(out_dir)).peak_rss / MB for _ in range(RUNS)]


def report(work: Path, layers: int) -> str:
    floors = [measure.python("-c", "import torch").peak_rss / MB for _ in range(RUNS)]
    rows = [("`python -c 'import torch'`", "", each(floors, 0), "")]
    for title, shape in SHAPES.items():
        base, adapter = measure.inputs(work, shape, layers)
        with measure.scratch(work) as outputs:
            ours = peaks(base, adapter, outputs / "merged")
            n_bytes = sum(path.stat().st_size for path in outputs.glob("merged/*.safetensors"))
        beyond = max(ours) - median(floors)
        rows.append((title.format(layers=layers), f"{n_bytes / GB:.2f}", each(ours, 0), f"**{beyond:.0f}**"))
    return table(("peak memory", "output, GB", "MB of each run", "MB beyond `import torch`"), rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
