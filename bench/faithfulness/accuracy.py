"""Three adapters trained on a quantized base, merged in every common way: how far each result is from what
was trained.

The first tables of docs/accuracy.md, and its first plot:
    python -m bench.faithfulness.accuracy --work DIR [--docs docs/accuracy.md]
One row:
    python -m bench.faithfulness.accuracy --work DIR --adapter smollm2-dora --row float16

smollm2.py says what the inputs are, ways.py how each row is merged, distance.py what is measured. It takes
about half an hour on two busy cores, 2.6 GB of memory and 11 GB of disk; inputs, PEFT's merges and the
unmerged logits are kept in DIR.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from bench.faithfulness.bars import Bar, svg
from bench.faithfulness.distance import (
    HEADER,
    Row,
    around_block,
    figures,
    measure,
    nbytes_of,
    relative_sizes,
    versions,
)
from bench.faithfulness.smollm2 import ADAPTERS, Adapter, Work
from bench.faithfulness.ways import LIGHT, SAME, directory, merges, stored, titles
from bench.support.measure import table


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, byte for byte, in whatever files."""
    with ExitStack() as stack:
        sides = []
        for path in (a, b):
            handles = [stack.enter_context(safe_open(f, "pt")) for f in sorted(path.glob("*.safetensors"))]
            sides.append({name: handle for handle in handles for name in handle.keys()})  # noqa: SIM118 (not a dict)
        ours, theirs = sides
        return ours.keys() == theirs.keys() and all(
            torch.equal(
                ours[name].get_tensor(name).view(torch.uint8), theirs[name].get_tensor(name).view(torch.uint8)
            )
            for name in ours
        )


def rows_of(adapter: Adapter) -> list[str]:
    """Of this page's first tables; light.py has the others."""
    return [row for row in titles(adapter.base) if row not in LIGHT]


def measured(work: Work, adapter: Adapter, rows: list[str]) -> tuple[dict[str, Row], str]:
    """The figures of each row, and a sentence on rows of SAME, which are not measured when their weights are
    those of the other."""
    found: dict[str, Row] = {}
    paths: dict[str, Path] = {}
    sentences = []
    for row in rows:
        path = paths[row] = directory(work, adapter, row)
        files, other = stored(work, adapter, row), SAME.get(row)
        same = other in paths and same_weights(path, paths[other])
        if other in paths:
            verdict = "the same weights, bit for bit" if same else "different weights"
            sentences.append(f"`{row}` and `{other}`: {verdict}, as the script compared them.")
        found[row] = (
            replace(found[other], nbytes=nbytes_of(files)) if same else measure(path, files, work, adapter)
        )
        print(f"{adapter.name} {row}: {found[row]}", file=sys.stderr)
    return found, " ".join(sentences)


def commands(adapter: Adapter, rows: Iterable[str]) -> str:
    """The command lines of those rows that are merges by lorafuse, as a block; nothing without any."""
    runs = merges(adapter.base)
    lines = [
        shlex.join(
            [
                "lorafuse-convert",
                f"DIR/{runs[row].ckpt}",
                f"fixtures/{adapter.name}",
                "OUT",
                *runs[row].options,
            ]
        )
        for row in rows
        if row in runs
    ]
    return "```\n" + "\n".join(lines) + "\n```" if lines else ""


def section(adapter: Adapter, found: dict[str, Row], sentence: str, sizes: tuple[float, float]) -> str:
    names = titles(adapter.base)
    lines = [[f"`{row}`", names[row], *figures(figure)] for row, figure in found.items()]
    parts = [
        f"### {adapter.what} (`fixtures/{adapter.name}/`)",
        table(["row", "what is loaded", *HEADER], lines, n_words=2),
    ]
    update, error = sizes
    size = (
        f"The update is {update:.2%} of the norm of the weights that it is added to; quantizing them moved "
        f"them by {error:.2%}."
    )
    parts += [f"{size} {sentence}".rstrip(), commands(adapter, found)]
    return "\n\n".join(filter(None, parts))


RIGHT = (
    "float32",
    "float16",
    "bfloat16",
    "base-quant",
)  # the rows that merge into the base that training saw, and keep it


def plot(results: dict[Adapter, dict[str, Row]]) -> str:
    colours = dict.fromkeys(RIGHT, "right") | {"none": "none"}
    return svg(
        "KL divergence from the unmerged model, on held-out text",
        {
            adapter.what: [
                Bar(titles(adapter.base)[row].replace("`", ""), figure.kl, colours.get(row, "wrong"))
                for row, figure in found.items()
            ]
            for adapter, found in results.items()
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for checkpoints, reused by the next run"
    )
    parser.add_argument(
        "--docs",
        type=Path,
        help="page whose block between the faithfulness: markers is rewritten, and FILE.svg",
    )
    parser.add_argument("--adapter", choices=[adapter.name for adapter in ADAPTERS], help="only this one")
    parser.add_argument("--row", choices=list(titles("nf4")), help="only this one")
    args = parser.parse_args()
    if args.docs and (args.adapter or args.row):
        parser.error("--docs needs every row")
    torch.set_num_threads(2)
    before, after = around_block(args.docs, "faithfulness") if args.docs else ("", "")
    work, results, sections = Work(args.work), {}, []
    for adapter in ADAPTERS:
        if args.adapter in (None, adapter.name):
            found, sentence = measured(work, adapter, [args.row] if args.row else rows_of(adapter))
            results[adapter] = found
            sections.append(section(adapter, found, sentence, relative_sizes(adapter, work)))
    block = "\n\n".join([*sections, f"SmolLM2-135M-Instruct; 40 × 128 held-out tokens; {versions()}."])
    print(block)
    if args.docs:
        args.docs.write_text(f"{before}{block}{after}")
        args.docs.with_suffix(".svg").write_text(plot(results))


if __name__ == "__main__":
    main()
