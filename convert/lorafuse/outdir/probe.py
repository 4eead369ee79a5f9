"""How fast a disk takes what is hashed and written to it: a file without a name, which is gone at once."""

import hashlib
import os
import time
from pathlib import Path

from lorafuse.files.names import scheme_of

SECONDS = 0.2
CHUNK_NBYTES, MOST_CHUNKS = 4 << 20, 16


def write_rate(out_dir: str) -> float | None:
    """Bytes a second, synced, in the directory that OUT_DIR is going to be in. None where nobody can tell."""
    if scheme_of(out_dir):
        return None
    path = Path(out_dir).absolute()
    folder = next(parent for parent in path.parents if parent.is_dir())
    chunk = os.urandom(CHUNK_NBYTES)
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:  # not every file system knows files without a name
        return None
    began, n_chunks = time.perf_counter(), 0
    try:
        while n_chunks < MOST_CHUNKS and time.perf_counter() - began < SECONDS:
            hashlib.sha256(chunk)
            os.write(fd, chunk)
            os.fdatasync(fd)
            n_chunks += 1
    except OSError:
        return None
    finally:
        os.close(fd)
    return n_chunks * CHUNK_NBYTES / (time.perf_counter() - began)
