"""base_quant.py's measurement of one kind of quantization.

    python -m bench.speed.quantizers nf4|fp4|int8 [single]

Prints nanoseconds of CPU time for each element: lorafuse's, bitsandbytes' quantization, and with its
dequantization.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first call compiles kernels that this path does not use
import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

from lorafuse.codecs import Arena, open_weights
from lorafuse.codecs.dense import DenseSources
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.simulated import simulated

SIDE, TILE_NUMEL, ROUNDS = 4096, 1 << 19, 9


class InMemory(DenseSources):
    """The stored tensor, which is not read again: reading is not what is measured."""

    def __init__(self, inner: Sources, weight: torch.Tensor) -> None:
        super().__init__(inner.store, inner.names[0])
        self._weight = weight.view(-1)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return (self._weight[slice(*box.run)].view(torch.uint8),)


def decode_all(weight: torch.Tensor, quant: BaseQuant, directory: Path) -> Callable[[], None]:
    """A function that decodes the whole weight, tile by tile."""
    save_file({"w": weight}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    inner = InMemory(open_weights(Checkpoint(LocalFolder(directory)))["w"], weight)
    sources, arena = simulated(inner, quant, "bfloat16", transposed=False), Arena(torch.device("cpu"))

    def run() -> None:
        sources.release()
        for start in range(0, weight.numel(), TILE_NUMEL):
            sources.values(Box.of_run(sources.spec, start, start + TILE_NUMEL), arena)

    return run


def by_bitsandbytes(
    weight: torch.Tensor, quant: BaseQuant
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Functions that quantize, and that dequantize as well."""
    if quant.kind == "int8":
        half = weight.half()
        return (
            lambda: bnb.int8_vectorwise_quant(half),
            lambda: bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(half)[:2]),
        )
    settings = {"quant_type": quant.kind, "compress_statistics": quant.double_quant}
    return lambda: bnb.quantize_4bit(weight, **settings), lambda: bnb.dequantize_4bit(
        *bnb.quantize_4bit(weight, **settings)
    )


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    quant = BaseQuant(kind=sys.argv[1], double_quant="single" not in sys.argv[2:])
    weight = (torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    with tempfile.TemporaryDirectory() as directory:
        runs = [decode_all(weight, quant, Path(directory)), *by_bitsandbytes(weight, quant)]
        least = [float("inf")] * len(runs)
        for _ in range(ROUNDS):
            for number, run in enumerate(runs):
                began = time.process_time()
                run()
                least[number] = min(least[number], time.process_time() - began)
    print(json.dumps([seconds / weight.numel() * 1e9 for seconds in least]))


if __name__ == "__main__":
    main()
