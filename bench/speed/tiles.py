"""Nanoseconds an element of decode + update + cast, and of the measures, for several sizes of a tile.

    python -m bench.speed.tiles --work build/bench

The tiles of an eighth of the 1B checkpoint's layers, in this process, by one worker: no writing, no hashing.
A size in the package is a compromise between the fixed cost of an op and the cache; it is a constant, since
the bytes written must not depend on it.
"""

import argparse
from contextlib import closing
from pathlib import Path

import torch

from bench.support import measure
from lorafuse.adapters import open_adapter
from lorafuse.codecs import Arena
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.merge.workers import make_pieces
from lorafuse.patches.patch import Base
from lorafuse.planning import plan as steps
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.shared_weights import SharedWeights
from lorafuse.settings import Settings

SIZES = [1 << 16, 1 << 17, 1 << 18, 1 << 19, 3 << 18, 1 << 20, 1 << 21]


def nanoseconds(planned: list[steps.Step]) -> tuple[float, float]:
    """(compute, measures) an element, with the current size of a tile."""
    arena, loader = Arena(torch.device("cpu")), Arena(torch.device("cpu"))
    buffer = torch.empty(max(step.tile_nbytes for step in planned), dtype=torch.uint8)
    compute = stats = 0.0
    for step, turn in zip(planned, SharedWeights([planned]), strict=True):
        for patch in step.patches:
            patch.prepare(Base(step.sources, loader), loader)
        for start, stop in step.tiles():
            timing = make_pieces(turn, start, stop, [buffer], arena)[0].timing
            compute, stats = compute + timing.compute_cpu_s, stats + timing.stats_cpu_s
        for patch in step.patches:
            patch.release()
    numel = sum(step.spec.numel for step in planned)
    return 1e9 * compute / numel, 1e9 * stats / numel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for inputs, which are kept")
    base, adapter = measure.inputs(parser.parse_args().work, "llama", 16)
    torch.set_num_threads(1)
    with closing(Checkpoint(LocalFolder(base))) as ckpt, closing(open_adapter(LocalFolder(adapter))) as lora:
        merged = [
            step for step in make_plan(ckpt, [WeightedAdapter(lora, 1.0)], Settings()).steps if step.patches
        ]
        print("elements of a tile | compute, ns an element | measures, ns an element")
        for numel in SIZES:
            steps.TILE_NUMEL = numel
            print("{:18,} | {:22.2f} | {:.2f}".format(numel, *nanoseconds(merged[: len(merged) // 8])))


if __name__ == "__main__":
    main()
