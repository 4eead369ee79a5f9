"""CPU time of `--base-quant`: lorafuse's quantization and dequantization against bitsandbytes' quantization
alone.

    python -m bench.speed.base_quant --work build/bench

The same bfloat16 weight of 4096 x 4096, one thread each, in turns in one process, quantize.py and
simulated.py against quantize_4bit and int8_vectorwise_quant. lorafuse's time includes what double
quantization takes beforehand, the pass over the weight, and dequantizing afterwards; that of bitsandbytes,
which needs it too, is in the last column. Each figure is the least of 9 runs, since others on the machine
only add to it.
"""

import json
import subprocess
import sys
from pathlib import Path

from bench.support import measure
from bench.support.measure import table

KINDS = ("nf4", "nf4 single", "fp4", "int8")


def report(work: Path, layers: int) -> str:
    rows = []
    for kind in KINDS:
        done = subprocess.run(
            [sys.executable, "-m", "bench.speed.quantizers", *kind.split()], check=True, capture_output=True
        )
        ours, theirs, both = json.loads(done.stdout)
        rows.append((kind, f"{ours:.1f}", f"{theirs:.1f}", f"**{theirs / ours:.1f}**", f"{both:.1f}"))
    header = ("ns for each element", "lorafuse", "bitsandbytes", "ratio", "bitsandbytes, dequantized too")
    return table(header, rows)


if __name__ == "__main__":
    measure.main(__doc__, report)
