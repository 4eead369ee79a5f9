"""How long each phase of one merge takes, as JSON, in seconds since the time that the caller gives.

    python -m bench.speed.phases BASE ADAPTER OUT_DIR BEGAN

BEGAN is `time.time()` of whoever started this process. *torch* is imported first; then all until the first
tile is in its file, until the last one is, and until OUT_DIR has its name.
"""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any


def main() -> None:
    base, adapter, out_dir, began = sys.argv[1:]
    import torch  # noqa: F401

    imported = time.time()
    from lorafuse.pipeline import convert

    written: list[float] = []

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "progress":
            written.append(time.time())

    convert(base, adapter, out_dir, on_event=on_event)
    times = {"torch": imported, "first": written[0], "last": written[-1], "named": time.time()}
    print(json.dumps({name: at - float(began) for name, at in times.items()}))


if __name__ == "__main__":
    main()
