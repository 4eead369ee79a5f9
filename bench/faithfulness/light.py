"""Light results of three adapters trained on a quantized base: how far each is from what was trained, and how
large.

The second tables of docs/accuracy.md, and their plot:
    python -m bench.faithfulness.light --work DIR [--docs docs/accuracy.md]

smollm2.py says what the inputs are and how each row is merged, distance.py what is measured. Results that are
quantized are loaded by transformers with bitsandbytes, which decodes them.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.faithfulness.accuracy import commands, measured
from bench.faithfulness.bars import Point, scatter
from bench.faithfulness.distance import HEADER, SIZE_HEADER, Row, around_block, figures, size, versions
from bench.faithfulness.smollm2 import ADAPTERS, Adapter, Work, titles
from bench.support.measure import table

ROWS = ["none", "base-nearest", "base", "base-v", "mixed", "bfloat16"]


def section(adapter: Adapter, found: dict[str, Row]) -> str:
    names = titles(adapter.base)
    lines = [[f"`{row}`", names[row], *figures(figure), *size(figure)] for row, figure in found.items()]
    return "\n\n".join(
        [
            f"### Light results: {adapter.what} (`fixtures/{adapter.name}/`)",
            table(["row", "what is loaded", *HEADER, *SIZE_HEADER], lines, n_words=2),
            commands(adapter, found),
        ]
    )


def curve(results: dict[Adapter, dict[str, Row]]) -> str:
    return scatter(
        "KL divergence from the unmerged model against the size of the result",
        {
            adapter.what: [Point(row, figure.nbytes / 1e6, figure.kl) for row, figure in found.items()]
            for adapter, found in results.items()
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for checkpoints, kept for the next run"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        help="page whose block between the light: markers is rewritten, and FILE-size.svg",
    )
    args = parser.parse_args()
    torch.set_num_threads(2)
    before, after = around_block(args.docs, "light") if args.docs else ("", "")
    work, results = Work(args.work), {}
    for adapter in ADAPTERS:
        results[adapter], _ = measured(work, adapter, ROWS)
        print(section(adapter, results[adapter]), file=sys.stderr)
    sections = [section(adapter, found) for adapter, found in results.items()]
    block = "\n\n".join([*sections, f"SmolLM2-135M-Instruct; 40 × 128 held-out tokens; {versions()}."])
    print(block)
    if args.docs:
        args.docs.write_text(f"{before}{block}{after}")
        args.docs.with_name(f"{args.docs.stem}-size.svg").write_text(curve(results))


if __name__ == "__main__":
    main()
