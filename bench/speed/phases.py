"""How long each phase of one merge takes, as JSON, in seconds since the time that the caller gives.

    python -m bench.speed.phases BASE ADAPTER OUT_DIR BEGAN

BEGAN is `time.time()` of whoever started this process. *torch* is imported first, then lorafuse, as the
command does it; then all until the first tile is in its file, until the last one is, and until OUT_DIR has
its name.
"""

import gc
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from lorafuse.files.uncollected import uncollected


def main() -> None:
    base, adapter, out_dir, began = sys.argv[1:]
    with uncollected():
        import torch  # noqa: F401

        torch_at = time.time()
        from lorafuse.pipeline import convert

        gc.freeze()
    lorafuse_at = time.time()

    written: list[float] = []

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            written.append(time.time())

    convert(base, adapter, out_dir, on_event=on_event)
    times = {
        "torch": torch_at,
        "lorafuse": lorafuse_at,
        "first": written[0],
        "last": written[-1],
        "named": time.time(),
    }
    print(json.dumps({name: at - float(began) for name, at in times.items()}), flush=True)
    gc.freeze()


if __name__ == "__main__":
    main()
