"""Light results of three adapters trained on a quantized base: how far each is from what was trained, and how
large.

The second tables of docs/accuracy.md, and their plot:
    python -m bench.faithfulness.light --work DIR [--docs docs/accuracy.md]

smollm2.py says what the inputs are, ways.py how each row is merged, distance.py what is measured. Results
that are quantized are loaded by transformers with bitsandbytes or compressed-tensors, which decode them. No
row rounds activations.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.faithfulness.accuracy import commands, measured
from bench.faithfulness.bars import Point, scatter
from bench.faithfulness.distance import HEADER, SIZE_HEADER, Row, around_block, figures, size, versions
from bench.faithfulness.smollm2 import ADAPTERS, Adapter, Work
from bench.faithfulness.ways import FINER, LIGHT, SAME, titles
from bench.support.measure import table

ROWS = ["none", *LIGHT, "bfloat16"]


def section(adapter: Adapter, found: dict[str, Row], sentence: str) -> str:
    names = titles(adapter.base)
    lines = [[f"`{row}`", names[row], *figures(figure), *size(figure)] for row, figure in found.items()]
    return "\n\n".join(
        [
            f"### Light results: {adapter.what} (`fixtures/{adapter.name}/`)",
            table(["row", "what is loaded", *HEADER, *SIZE_HEADER], lines, n_words=2),
            sentence,
            commands(adapter, found),
        ]
    )


def curve(results: dict[Adapter, dict[str, Row]]) -> str:
    """Without rows that stand for the same model as another one, or nearly."""
    return scatter(
        "KL divergence from the unmerged model against the size of the result",
        {
            adapter.what: [
                Point(row, figure.nbytes / 1e6, figure.kl)
                for row, figure in found.items()
                if row not in (*SAME, *FINER)
            ]
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
    work, results, sections = Work(args.work), {}, []
    for adapter in ADAPTERS:
        results[adapter], sentence = measured(work, adapter, ROWS)
        sections.append(section(adapter, results[adapter], sentence))
        print(sections[-1], file=sys.stderr)
    which = versions("compressed-tensors")
    block = "\n\n".join([*sections, f"SmolLM2-135M-Instruct; 40 × 128 held-out tokens; {which}."])
    print(block)
    if args.docs:
        args.docs.write_text(f"{before}{block}{after}")
        args.docs.with_name(f"{args.docs.stem}-size.svg").write_text(curve(results))


if __name__ == "__main__":
    main()
