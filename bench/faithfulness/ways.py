"""The ways to merge that are compared: the rows of the tables."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from bench.faithfulness.smollm2 import Adapter, Work, once, quantize, save_decoded


@dataclass(frozen=True)
class Merge:
    """One run of lorafuse: what it makes, the checkpoint's name in the work directory, and the options."""

    title: str
    ckpt: str
    options: tuple[str, ...]


# What is quantized in the result: on the grid of the base, or by compressed-tensors' formats.
ON_BASE_GRID = ("base-nearest", "base", "simulated", "light", "light-qkv", "mixed")
ANEW = ("w4a16", "fp8", "w8a16")
# w8a16 with scales and weights in more digits: what is left then is the distance of the scheme.
FINER = ("w8a16-float16", "w8a16-float32")
LIGHT = ON_BASE_GRID + ANEW + FINER
# Rows that should have the weights of another one.
SAME = {"base-quant": "bfloat16", "simulated": "base"}
QUERIES_AND_KEYS = ("--keep-dense", "*.q_proj", "--keep-dense", "*.k_proj")


def merges(base: str) -> dict[str, Merge]:
    def light(*options: str, ckpt: str = base) -> Merge:
        return Merge(f"lorafuse `{shlex.join(options)}`", ckpt, options)

    return {
        "float32": Merge("lorafuse → float32", base, ("--dtype", "float32")),
        "float16": Merge("lorafuse → float16", base, ("--dtype", "float16")),
        "bfloat16": Merge("lorafuse → bfloat16", base, ("--dtype", "bfloat16")),
        "base-quant": Merge(
            f"lorafuse `--base-quant {base}` → bfloat16",
            "bf16",
            ("--base-quant", base, "--dtype", "bfloat16"),
        ),
        "base-nearest": light("--format", "base", "--rounding", "nearest"),
        "base": light("--format", "base"),
        "simulated": light("--base-quant", base, "--format", "base", ckpt="bf16"),
        "light": light("--format", "light"),
        "light-qkv": light("--format", "light", *QUERIES_AND_KEYS),
        "mixed": light("--format", "mixed"),
        **{form: light("--format", form) for form in ANEW},
        **{row: light("--format", *row.replace("-", " --dtype ").split()) for row in FINER},
        "16bit": Merge("plain merge into the 16-bit base → bfloat16", "bf16", ("--dtype", "bfloat16")),
    }


def titles(base: str) -> dict[str, str]:
    """{row: what is loaded}, in the order of the tables."""
    return {row: merge.title for row, merge in merges(base).items()} | {
        "peft": f"PEFT's merge into the {base} base (re-quantizes)",
        "naive": f"bfloat16, quantized to {base} again",
        "none": "no adapter",
    }


def run_lorafuse(work: Work, adapter: Adapter, row: str) -> Path:
    """What a user would run; made again each time, since it is what is tested."""
    merge, out = merges(adapter.base)[row], work.root / f"{adapter.name}-{row}"
    command = [
        "convert",
        work.checkpoint(merge.ckpt),
        adapter.path,
        out,
        *merge.options,
        "--overwrite",
        "--quiet",
    ]
    subprocess.run(
        [sys.executable, "-m", "lorafuse.cli", *map(str, command)], check=True, stdout=subprocess.DEVNULL
    )
    return out


def peft_merge(work: Work, adapter: Adapter) -> Path:
    """Each weight that the adapter updates decoded, added to in fp32 (DoRA: in its dtype), quantized
    again."""

    def make(out: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(work.quantized(adapter.base))
        save_decoded(PeftModel.from_pretrained(model, adapter.path).merge_and_unload(), work.dense(), out)

    return once(work.root / f"{adapter.name}-peft", make)


def quantized_again(work: Work, adapter: Adapter) -> Path:
    """A finished merge in 16 bits, loaded with the base's quantization: every linear layer is quantized
    again, merged or not."""
    merged, out = run_lorafuse(work, adapter, "bfloat16"), work.root / f"{adapter.name}-naive"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    save_decoded(quantize(merged, adapter.base), merged, out)
    return out


def directory(work: Work, adapter: Adapter, row: str) -> Path:
    """The checkpoint of one row of `titles`."""
    if row == "none":
        return work.decoded(adapter.base)
    if row == "peft":
        return peft_merge(work, adapter)
    if row == "naive":
        return quantized_again(work, adapter)
    made = run_lorafuse(work, adapter, row)
    return decoded_by_its_library(work, made, row) if row in LIGHT else made


def stored(work: Work, adapter: Adapter, row: str) -> Path:
    """Where the files of a row lie as a user would keep them; PEFT's and the naive merge are as large as the
    base."""
    return (
        work.root / f"{adapter.name}-{row}" if row in merges(adapter.base) else work.quantized(adapter.base)
    )


def decoded_by_its_library(work: Work, made: Path, row: str) -> Path:
    """A result that is quantized, as transformers loads it and bitsandbytes or compressed-tensors decodes
    it."""
    out = made.with_name(f"{made.name}-decoded")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if row in ANEW + FINER else {}
    save_decoded(AutoModelForCausalLM.from_pretrained(made, **how), work.dense(), out)
    return out
