"""Run by test_free_space.py on a small file system, in a process of its own: fill it at a random moment of
a run, to a random degree.

    python fill_disk.py CKPT ADAPTER WORK CLEAN N SECONDS

Each round, the run ends well, or with exit 5 and no OUT_DIR; with space again, the same command makes what is
in CLEAN. Goes on for N rounds and so many seconds, and prints how they ended.
"""

import os
import random
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from scenario import SHARD, content

import lorafuse
from lorafuse.errors import StorageError


class Filler:
    """A file that takes all space but a few bytes, at some event of a run."""

    def __init__(self, path, n_events, rng):
        self.path, self.moment, self.left = (
            path,
            rng.randrange(1, n_events),
            rng.choice([0, rng.randrange(40_000)]),
        )
        self.n_events = 0

    def __call__(self, event):
        self.n_events += 1
        if self.n_events != self.moment:
            return
        with open(self.path, "wb", buffering=0) as f:
            for piece in (1 << 16, 1 << 10):
                with suppress(OSError):
                    while f.write(b"x" * piece):
                        os.fsync(f.fileno())
            f.truncate(max(f.tell() - self.left, 0))
            os.fsync(f.fileno())


def one_round(ckpt, adapter, work, clean, n_events, rng):
    """How it ended: files that were finished then, or that it succeeded."""
    out, filler = work / "out", Filler(work / "filler", n_events, rng)
    try:
        lorafuse.convert(ckpt, adapter, out, max_shard_size=SHARD, on_event=filler)
        end = "done"
    except (OSError, StorageError) as e:  # exit 5, both
        assert not out.exists(), e
        end = f"{sum(1 for _ in work.glob('.out.lorafuse-*/out/*.safetensors'))} shards"
        filler.path.unlink(missing_ok=True)
        lorafuse.convert(ckpt, adapter, out, max_shard_size=SHARD)
    filler.path.unlink(missing_ok=True)
    assert [path.name for path in work.iterdir() if path.name != "lost+found"] == ["out"]
    assert content(out) == clean
    shutil.rmtree(out)
    return end


def main():
    ckpt, adapter, work, clean = map(Path, sys.argv[1:5])
    n, until = int(sys.argv[5]), time.monotonic() + float(sys.argv[6])
    rng = random.Random(None if float(sys.argv[6]) else 0)
    expected, ends, events = content(clean), Counter(), []
    lorafuse.convert(ckpt, adapter, work / "out", max_shard_size=SHARD, on_event=events.append)
    shutil.rmtree(work / "out")
    while ends.total() < n or time.monotonic() < until:
        ends[one_round(ckpt, adapter, work, expected, len(events), rng)] += 1
    assert len(ends) > 3 and ends["done"] < ends.total() / 2, ends
    sys.stdout.write(f"{ends.total()} runs ({', '.join(f'{end}: {n}' for end, n in sorted(ends.items()))})\n")


if __name__ == "__main__":
    main()
