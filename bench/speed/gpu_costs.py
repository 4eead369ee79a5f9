"""What a GPU's part of a merge costs by itself, as JSON, beside what is assumed of it; null where torch sees
no GPU.

    python -m bench.speed.gpu_costs DEVICE

In a process of its own, so that the start of CUDA is in it.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from bench.speed.gpu import UNITS
from lorafuse.arithmetic import devices

NBYTES = 64 << 20
N_COPIES, N_OPERATIONS, OF_TILE = 20, 2000, 60


def seconds(work: Callable[[], object]) -> float:
    """Until the GPU has done it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def started_s(device: str) -> float:
    """The context, and the first product."""
    began = time.perf_counter()
    x = torch.ones(64, 64, dtype=torch.float32, device=device)
    x.addmm_(x, x)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def costs(device: str) -> dict[str, object]:
    start_s = started_s(device)
    host = torch.empty(NBYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    there = torch.empty(NBYTES, dtype=torch.uint8, device=device)
    x = torch.ones(1024, dtype=torch.float32, device=device)

    def copy_in() -> None:
        for _ in range(N_COPIES):
            there.copy_(host, non_blocking=True)

    def copy_out() -> None:
        for _ in range(N_COPIES):
            host.copy_(there, non_blocking=True)

    def operate() -> None:
        for _ in range(N_OPERATIONS):
            x.add_(1)

    copied = N_COPIES * NBYTES / 1e9
    in_s, out_s, operations_s = (
        min(seconds(work) for _ in range(3)) for work in (copy_in, copy_out, operate)
    )
    measured = (copied / in_s, copied / out_s, start_s, 1e3 * operations_s * OF_TILE / N_OPERATIONS)
    copies = devices.COPY_NBYTES_PER_S / 1e9
    assumed = (copies, copies, devices.START_S, 1e3 * devices.TILE_S)
    return {
        "name": torch.cuda.get_device_name(device),
        "measured": dict(zip(UNITS, measured, strict=True)),
        "assumed": dict(zip(UNITS, assumed, strict=True)),
    }


if __name__ == "__main__":
    print(json.dumps(costs(sys.argv[1]) if torch.cuda.is_available() else None))
