"""What is measured side by side: lorafuse with and without its kernel, and what does a part of its work.

Each side is one command in a process of its own. `in_turns` runs all sides round after round, each round
beginning with another one.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.support import measure
from bench.support.measure import Usage

KERNEL, TORCH, PEFT, DD, BNB = "lorafuse", "lorafuse, no kernel", "transformers + PEFT", "dd", "bitsandbytes"
DIRECT, IMPORT = "dd, past the page cache", "import torch"
RESULT = "result"  # in one file, for dd
FULL = (KERNEL, TORCH, PEFT, DD, BNB)


@dataclass(frozen=True)
class Side:
    """One run: the whole process, and the CPU seconds of the arithmetic in it, where it says."""

    usage: Usage
    arithmetic_s: float = 0.0
    measures_s: float = 0.0


def in_turns(sides: Mapping[str, Callable[[], Side]], rounds: int) -> dict[str, list[Side]]:
    """Every side once a round."""
    names, runs = list(sides), dict[str, list[Side]]((name, []) for name in sides)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(sides[name]())
    return runs


def sides_of(names: Sequence[str], base: Path, adapter: Path, outputs: Path) -> dict[str, Callable[[], Side]]:
    """Those of a merge. `outputs`: a folder for what they write, and for what dd copies."""
    copied = outputs / "copied"
    if {DD, DIRECT} & {*names}:
        measure.convert(base, adapter, outputs / "first")
        joined(sorted((outputs / "first").glob("*.safetensors")), outputs / RESULT)

    def dd(*more: str) -> Side:
        measure.fresh(copied).mkdir()
        paths = f"if={outputs / RESULT}", f"of={copied / RESULT}"
        return Side(measure.run(["dd", *paths, "bs=8M", "conv=fdatasync", *more]))

    def peft() -> Side:
        return Side(
            measure.python("-m", "bench.speed.peft_merge", base, adapter, measure.fresh(outputs / "peft"))
        )

    def bitsandbytes() -> Side:
        usage = measure.python("-m", "bench.speed.bnb_dequantize", base / "model.safetensors")
        return Side(usage, float(usage.stdout.split()[-1]))

    every: dict[str, Callable[[], Side]] = {
        KERNEL: lambda: merge(base, adapter, outputs / "merged", "on"),
        TORCH: lambda: merge(base, adapter, outputs / "merged", "off"),
        PEFT: peft,
        DD: dd,
        DIRECT: lambda: dd("oflag=direct"),
        BNB: bitsandbytes,
        IMPORT: lambda: Side(measure.python("-c", "import torch")),
    }
    return {name: every[name] for name in names}


def joined(files: Sequence[Path], whole: Path) -> None:
    """All bytes in one file; the files are removed."""
    with whole.open("wb") as to:
        for path in files:
            with path.open("rb") as file:
                shutil.copyfileobj(file, to)
            path.unlink()


def merge(base: Path, adapter: Path, out_dir: Path, kernel: str) -> Side:
    """One merge by lorafuse, with its kernel "on" or "off"."""
    used = measure.convert(base, adapter, measure.fresh(out_dir), LORAFUSE_KERNEL=kernel)
    timing = json.loads((out_dir / "lorafuse_receipt.json").read_text())["timing"]
    return Side(used, timing["compute_cpu_s"], timing["stats_cpu_s"])


def walls(runs: Sequence[Side]) -> list[float]:
    return [run.usage.wall_s for run in runs]


def cpus(runs: Sequence[Side]) -> list[float]:
    return [run.usage.cpu_s for run in runs]


def peaks(runs: Sequence[Side]) -> list[float]:
    return [float(run.usage.peak_rss) for run in runs]


def arithmetics(runs: Sequence[Side]) -> list[float]:
    """CPU seconds of decode, update, cast and measures; of bitsandbytes' dequantization alone."""
    return [run.arithmetic_s + run.measures_s for run in runs]
