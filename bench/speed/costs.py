"""What a byte of a result costs one core: cores.py's coefficients, as JSON.

    python -m bench.speed.costs BASE ADAPTER DIRECTORY

CPU time of this thread alone, with nothing beside it: the tiles of a few weights that the adapter changes,
made by the code of a merge; and, in files of DIRECTORY, what writing and reading back take.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import torch

from lorafuse.adapters import open_adapter
from lorafuse.codecs import Arena
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.trailing_hash import READ_NBYTES
from lorafuse.merge.tile import make_tile
from lorafuse.patches.patch import Base
from lorafuse.planning import plan as planned
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.shared_weights import SharedWeights
from lorafuse.settings import Settings

ROUNDS, N_WEIGHTS, N_CHUNKS = 5, 4, 256
SMALL = 1 << 14  # elements of a tile whose cost is nearly fixed


def cpu_s(work: Callable[[], object]) -> float:
    """The median of some rounds, after one that does not count."""
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return median(times)


class Tiles:
    """All tiles of a few weights, with the current size of a tile, made one after the other."""

    def __init__(self, steps: list[planned.Step]) -> None:
        self._steps, self._arena = steps, Arena(torch.device("cpu"))
        self._buffer = torch.empty(max(step.tile_nbytes for step in steps), dtype=torch.uint8, device="cpu")
        self.nbytes = sum(step.nbytes for step in steps)
        self.n_tiles = sum(1 for step in steps for _ in step.tiles())

    def make(self) -> float:
        """Seconds of decode, update, cast and measures."""
        compute_s = 0.0
        for weight in SharedWeights([self._steps]):
            for patch in weight.patches:
                patch.prepare(Base(weight.sources, self._arena), self._arena)
            for start, stop in weight.tiles():
                [made] = make_tile(weight, start, stop, [self._buffer], self._arena)
                compute_s += made.timing.compute_cpu_s + made.timing.stats_cpu_s
            for patch in weight.patches:
                patch.release()
        return compute_s


def opened_tiles(base: Path, adapter: Path) -> Tiles:
    """Those of a few weights; nothing is closed."""
    torch.set_num_threads(1)
    ckpt, lora = Checkpoint(LocalFolder(base)), open_adapter(LocalFolder(adapter))
    plan = make_plan(ckpt, [WeightedAdapter(lora, 1.0)], Settings())
    return Tiles([step for step in plan.steps if step.patches][-N_WEIGHTS:])


def of_tiles(steps: list[planned.Step]) -> dict[str, float]:
    """Per byte of the result; the fixed cost of a tile by the difference to tiles that are much smaller."""
    large = Tiles(steps)
    large.make()
    compute_s = median(large.make() for _ in range(ROUNDS))
    large_s, usual = cpu_s(large.make), planned.TILE_NUMEL
    planned.TILE_NUMEL = SMALL
    small = Tiles(steps)
    small_s = cpu_s(small.make)
    planned.TILE_NUMEL = usual
    return {
        "read": (large_s - compute_s) / large.nbytes * 1e9,
        "compute": compute_s / large.nbytes * 1e9,
        "fixed_us": max(small_s - large_s, 0) / (small.n_tiles - large.n_tiles) * 1e6,
        "tile_nbytes": large.nbytes // large.n_tiles,
    }


def of_files(directory: Path) -> dict[str, float]:
    chunk, path = os.urandom(1 << 20), directory / "costs"
    nbytes = N_CHUNKS * len(chunk)

    def write() -> None:
        path.unlink(missing_ok=True)
        with open(path, "wb", buffering=0) as file:
            for number in range(N_CHUNKS):
                os.pwrite(file.fileno(), chunk, number * len(chunk))

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            for start in range(0, nbytes, READ_NBYTES):
                os.pread(file.fileno(), READ_NBYTES, start)

    def digest() -> None:
        sha256 = hashlib.sha256()
        for _ in range(N_CHUNKS):
            sha256.update(chunk)

    costs = {"write": write, "read_back": read, "hash": digest}
    found = {name: cpu_s(work) / nbytes * 1e9 for name, work in costs.items()}
    path.unlink()
    return found


def main() -> None:
    base, adapter, directory = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    with closing(Checkpoint(LocalFolder(base))) as ckpt, closing(open_adapter(LocalFolder(adapter))) as lora:
        plan = make_plan(ckpt, [WeightedAdapter(lora, 1.0)], Settings())
        changed = [step for step in plan.steps if step.patches]
        costs = of_tiles(changed[-N_WEIGHTS:]) | of_files(directory)
        base_nbytes = sum(shard.nbytes for shard in ckpt.shards)
        costs["hash_input"] = costs["hash"] * base_nbytes / plan.nbytes
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
