"""compute.py's side of lorafuse: every NF4 weight of a checkpoint is decoded, updated, rounded and measured,
tile by tile.

    python -m bench.speed.arithmetic BASE ADAPTER

Prints CPU seconds as JSON: `all`, the arithmetic as in a merge, by the code of a merge; of that `product`,
the product of the adapter's factors and the sum alone; of that `multiplying`, what factors of WIDER times the
rank take more than these, divided by how many times more they multiply: what the processor needs to multiply
and add, without the passes over the tile; and `pass`, torch's copy of as many elements from fp32 to bfloat16,
which is one such pass. There are as many threads as cores. Reading is not counted, and nothing is hashed or
written.
"""

import json
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
from lorafuse.files.names import natural_key
from lorafuse.merge.tile import make_tile
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Base
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.plan import Step
from lorafuse.planning.shared_weights import SharedWeights
from lorafuse.settings import Settings

WIDER = 4


class Wide:
    """A patch's product with factors that are there WIDER times, beside each other."""

    def __init__(self, patch: LowRank, arena: Arena) -> None:
        self._left = torch.cat([patch.left.whole(arena)] * WIDER, 1)
        self._right = torch.cat([patch.right.whole(arena)] * WIDER, 0)
        self._scale = patch.scale

    def apply(self, tile: torch.Tensor, first_row: int) -> None:
        tile.addmm_(self._left[first_row : first_row + len(tile)], self._right, alpha=self._scale)


@torch.inference_mode()
def cpu_s(steps: list[Step]) -> dict[str, float]:
    """One worker's share."""
    torch.set_num_threads(1)
    arena, loader = Arena(torch.device("cpu")), Arena(torch.device("cpu"))
    buffer = torch.empty(max(step.tile_nbytes for step in steps), dtype=torch.uint8, device="cpu")
    spent = {"all": 0.0, "product": 0.0, "multiplying": 0.0, "pass": 0.0}
    for step, weight in zip(steps, SharedWeights([steps]), strict=True):
        for patch in step.patches:
            patch.prepare(Base(step.sources, loader), loader)
        for start, stop in step.tiles():
            [made] = make_tile(weight, start, stop, [buffer], arena)
            spent["all"] += made.timing.compute_cpu_s + made.timing.stats_cpu_s
        [patch] = step.patches
        assert isinstance(patch, LowRank)
        wide = Wide(patch, loader)
        total = torch.zeros(step.tile_size, dtype=torch.float32, device="cpu")
        for start, stop in step.tiles():
            first_row, tile = start // step.row_numel, total[: stop - start]
            rows, began = tile.view(-1, step.row_numel), time.thread_time()
            patch.apply(rows, first_row, arena)
            applied = time.thread_time()
            wide.apply(rows, first_row)
            multiplied = time.thread_time()
            buffer[: 2 * tile.numel()].view(torch.bfloat16).copy_(tile)
            spent["pass"] += time.thread_time() - multiplied
            spent["product"] += applied - began
            spent["multiplying"] += (multiplied - applied - (applied - began)) / (WIDER - 1)
        for patch in step.patches:
            patch.release()
    return spent


def main() -> None:
    base, adapter = map(Path, sys.argv[1:])
    n_threads = os.cpu_count() or 1
    with closing(Checkpoint(LocalFolder(base))) as ckpt, closing(open_adapter(LocalFolder(adapter))) as lora:
        plan = make_plan(ckpt, [WeightedAdapter(lora, 1.0)], Settings())
        merged = sorted(
            (step for step in plan.steps if step.patches), key=lambda step: natural_key(step.name)
        )
        with ThreadPoolExecutor(n_threads) as pool:
            shares = list(pool.map(cpu_s, (merged[i::n_threads] for i in range(n_threads))))
    print(json.dumps({name: sum(share[name] for share in shares) for name in shares[0]}))


if __name__ == "__main__":
    main()
