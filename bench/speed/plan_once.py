"""planning.py's side of lorafuse: headers are read and a merge is planned, once.

    python -m bench.speed.plan_once BASE ADAPTER

Prints JSON: CPU seconds for the headers of both and for the plan, and the most bytes that both took.
"""

import json
import resource
import sys
import time
from contextlib import closing
from pathlib import Path

import lorafuse.pipeline  # noqa: F401 (all that a merge imports)
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
    base, adapter = (LocalFolder(Path(name)) for name in sys.argv[1:])
    before, began = peak_nbytes(), time.process_time()
    with closing(Checkpoint(base)) as ckpt, closing(open_adapter(adapter)) as lora:
        read = time.process_time()
        make_plan(ckpt, [WeightedAdapter(lora, 1.0)], Settings(memory_nbytes=4 * 10**9))
        ended = time.process_time()
        held = peak_nbytes() - before
    print(json.dumps({"headers_s": read - began, "plan_s": ended - read, "held": held}))


if __name__ == "__main__":
    main()
