"""planning.py's side of lorafuse: headers are read and a merge is planned, once.

    python -m bench.speed.plan_once BASE ADAPTER

Prints JSON: CPU seconds for the headers of both and for the plan, the most bytes that both took, and how many
tensors the headers have. These are counted here: planning.py's own process would grow with them.
"""

import json
import resource
import sys
import time
from contextlib import closing
from pathlib import Path

import lorafuse.pipeline  # noqa: F401 (all that a merge imports)
from bench.speed.planning import n_stored
from lorafuse.adapters import open_adapter
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.settings import Settings

KIB = 1024


def peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    base, adapter = map(LocalFolder, folders)
    before, began = peak_nbytes(), time.process_time()
    with closing(Checkpoint(base)) as ckpt, closing(open_adapter(adapter)) as lora:
        read = time.process_time()
        make_plan(ckpt, [WeightedAdapter(lora, 1.0)], Settings(memory_nbytes=4 * 10**9))
        ended = time.process_time()
        held = peak_nbytes() - before
    figures = {"headers_s": read - began, "plan_s": ended - read, "held": held}
    print(json.dumps(figures | {"stored": sum(map(n_stored, folders))}))


if __name__ == "__main__":
    main()
