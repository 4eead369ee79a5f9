"""compute.py's side of lorafuse: every NF4 weight of a checkpoint is decoded, updated and rounded, tile by
tile.

    python -m bench.speed.arithmetic BASE ADAPTER

Prints the CPU seconds of the arithmetic alone: the tiles of a merge, computed by the code of a merge, in as
many threads as there are cores. They are read too, which is not counted, but not measured, hashed or written.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch

from lorafuse.adapters import open_adapter
from lorafuse.codecs import Arena
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.merge.tile import patched
from lorafuse.patches.patch import Base
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.plan import Step
from lorafuse.settings import Settings


@torch.inference_mode()
def compute_cpu_s(steps: list[Step]) -> float:
    """One worker's share."""
    torch.set_num_threads(1)
    arena, loader = Arena(torch.device("cpu")), Arena(torch.device("cpu"))
    buffer = torch.empty(max(step.tile_nbytes for step in steps), dtype=torch.uint8)
    cpu_s = 0.0
    for step in steps:
        finished = buffer.view(getattr(torch, step.spec.torch_name))
        for patch in step.patches:
            patch.prepare(Base(step.sources, loader), loader)
        for start, stop in step.tiles():
            box = step.box(start, stop)
            raw = step.sources.fetch(box, arena)
            began = time.thread_time()
            base = step.sources.decode(raw, box, arena)
            finished[: stop - start].copy_(patched(step, base, start, arena))
            cpu_s += time.thread_time() - began
        for patch in step.patches:
            patch.release()
    return cpu_s


def main() -> None:
    base, adapter = map(Path, sys.argv[1:])
    n_threads = os.cpu_count() or 1
    with closing(Checkpoint(LocalFolder(base))) as ckpt, closing(open_adapter(LocalFolder(adapter))) as lora:
        merged = [
            step for step in make_plan(ckpt, [WeightedAdapter(lora, 1.0)], Settings()).steps if step.patches
        ]
        with ThreadPoolExecutor(n_threads) as pool:
            print(sum(pool.map(compute_cpu_s, (merged[i::n_threads] for i in range(n_threads)))))


if __name__ == "__main__":
    main()
