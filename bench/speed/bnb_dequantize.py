"""The yardstick of compute.py: bitsandbytes dequantizes each NF4 weight of a safetensors file, as a user
would call it.

    python -m bench.speed.bnb_dequantize FILE

Prints the CPU seconds (every thread) of the calls of dequantize_4bit alone. A pass over all weights goes
before the timed one, since load_file maps the file: what is timed finds the weights in memory and the library
warm. Nothing is done with the results, and the number of threads is the default.
"""

import os
import sys
import time

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first call compiles kernels that this path does not use
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from torch import Tensor

QUANT_STATE = ".quant_state.bitsandbytes__nf4"


def dequantize_all(weights: list[tuple[Tensor, QuantState]]) -> float:
    cpu_s = 0.0
    for packed, state in weights:
        start = time.process_time()
        dequantize_4bit(packed, state)
        cpu_s += time.process_time() - start
    return cpu_s


def main() -> None:
    tensors = load_file(sys.argv[1])
    weights = []
    for key in [key for key in tensors if key.endswith(QUANT_STATE)]:
        name = key.removesuffix(QUANT_STATE)
        state = {k: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        weights.append((tensors[name], QuantState.from_dict(state, device="cpu")))
    dequantize_all(weights)
    print(dequantize_all(weights))


if __name__ == "__main__":
    main()
