"""Merges a trained QLoRA adapter into a real model, several ways, and measures how much of it is left.

    python -m bench.faithfulness.real --work DIR [--readme README.md]

The table of the README: the rows of accuracy.py that matter most, for one adapter, and what each model
writes. smollm2.py says what the inputs are, ways.py how they are merged, distance.py what is measured.

It takes 5 to 13 minutes on two cores, 2.6 GB of memory and 3.5 GB of disk.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from bench.faithfulness.distance import HEADER, around_block, figures, measure, megabytes, versions
from bench.faithfulness.smollm2 import QLORA, Work, load
from bench.faithfulness.ways import directory, stored, titles
from bench.support.measure import table

PROMPT = "def read_lines(path):\n"
ROWS = ("float32", "float16", "bfloat16", "light", "16bit", "peft", "none")


def continuation(model: PreTrainedModel | PeftModel, tokenizer_dir: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)


def run(work: Work) -> str:
    decoded = work.decoded(QLORA.base)
    want = continuation(PeftModel.from_pretrained(load(decoded), QLORA.path).eval(), decoded)
    lines, same = [], []
    for row in ROWS:
        title, path = titles(QLORA.base)[row], directory(work, QLORA, row)
        text = continuation(load(path), decoded)
        print(f"{title} writes {text!r}", file=sys.stderr)
        found = measure(path, stored(work, QLORA, row), work, QLORA)
        lines.append([title, *figures(found), megabytes(found)])
        same += [title] if text == want else []
    return (
        f"{table(['what is loaded', *HEADER, 'MB'], lines)}\n\n"
        f"SmolLM2-135M-Instruct, NF4 with double quantization; 40 × 128 held-out tokens; {versions()}. "
        f"Rows that continue `{PROMPT.strip()}` with the unmerged model's 32 tokens: "
        f"{'; '.join(same) or 'none'}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for checkpoints, reused by the next run"
    )
    parser.add_argument("--readme", type=Path, help="file whose block between the real: markers is rewritten")
    args = parser.parse_args()
    torch.set_num_threads(2)
    before, after = around_block(args.readme, "real") if args.readme else ("", "")
    block = run(Work(args.work))
    print(block)
    if args.readme:
        args.readme.write_text(f"{before}{block}{after}")


if __name__ == "__main__":
    main()
