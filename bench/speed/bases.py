"""Quantized bases: how long a merge takes for each element, against the same merge of an NF4 checkpoint.

    python -m bench.speed.bases --work build/bench [--only WORDS]

Each format has the shapes of two layers of the 1B model (gpt-oss: of four experts of its 20B), and a
rank-16 adapter over all of it (bench/support/bases.py). Merges of a format and of NF4 take turns. Compute is
`timing.compute_cpu_s` of the receipt: decode, update, cast, and the measures that the kernel takes with
them; start, reading, hashes and writing are not in it. A ratio is that of the medians, by element, of at
least three rounds; there are more, up to nine, while the rounds' own ratios differ by more than a tenth.
What is stored transposed comes last. `--only`: the formats whose names have these words.
"""

import json
from functools import partial
from pathlib import Path

from bench.speed.compute import roomy
from bench.support import measure
from bench.support.measure import median

FEWEST, MOST = 3, 9  # rounds
SPREAD = 0.1
N_BASES: int | None = None  # all of them
NF4 = "NF4"


def inputs(work: Path, name: str) -> Path:
    """The directory with a base and an adapter, made once."""
    directory = work / "bases" / "".join(c if c.isalnum() else "-" for c in name)
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        measure.python("-m", "bench.support.bases", name, directory)
    return directory


def compute(directory: Path, out_dir: Path) -> float:
    """Nanoseconds for each element of the result."""
    measure.convert(directory / "base", directory / "adapter", measure.fresh(out_dir))
    receipt = json.loads((out_dir / "lorafuse_receipt.json").read_text())
    n_elements = sum(path.stat().st_size for path in out_dir.glob("*.safetensors")) // 2
    return 1e9 * float(receipt["timing"]["compute_cpu_s"]) / n_elements


def rounds(directory: Path, nf4: Path, outputs: Path) -> list[tuple[float, float]]:
    """(compute of the format, of NF4) of each round."""
    compute(directory, outputs / "merged")  # the inputs into the page cache
    pairs: list[tuple[float, float]] = []
    while len(pairs) < FEWEST or (len(pairs) < MOST and _spread(pairs) > SPREAD):
        pairs.append((compute(directory, outputs / "merged"), compute(nf4, outputs / "nf4")))
    return pairs


def _spread(pairs: list[tuple[float, float]]) -> float:
    """How far the ratios of the middle half of the rounds are apart."""
    ratios = sorted(own / of_nf4 for own, of_nf4 in pairs)
    cut = len(ratios) // 4
    return ratios[-1 - cut] / ratios[cut] - 1


def report(work: Path, layers: int, only: str = "") -> str:
    rows, nf4 = [], inputs(work, NF4)
    names = measure.python("-m", "bench.support.bases", "--list").stdout.split("\n")
    with measure.scratch(roomy(work, nf4 / "base")) as outputs:
        for name in [name for name in names if name and only in name][:N_BASES]:
            pairs = rounds(inputs(work, name), nf4, outputs)
            own, of_nf4 = (median(costs) for costs in zip(*pairs, strict=True))
            rows.append((name, f"{own:.2f}", f"{of_nf4:.2f}", f"**{own / of_nf4:.2f}**", str(len(pairs))))
    return measure.table(("base", "compute, ns", "of NF4", "ratio", "rounds"), rows)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--only", default="", help="words of a format's name")
    args = parser.parse_args()
    print(measure.watched(partial(report, only=args.only), args.work, args.layers))


if __name__ == "__main__":
    main()
