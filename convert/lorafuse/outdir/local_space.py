"""What there is room for in a directory of this machine."""

import os
import resource
from pathlib import Path

from lorafuse.outdir.out_dir import Space


def space_below(folder: Path) -> Space:
    """Of a directory that is there."""
    status, (largest, _) = os.statvfs(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    return Space(
        # Some file systems say nothing of their blocks and files.
        free_nbytes=status.f_bavail * status.f_frsize if status.f_blocks else None,
        block_nbytes=status.f_frsize or 1,
        n_files=status.f_favail if status.f_files else None,
        file_nbytes=None if largest == resource.RLIM_INFINITY else largest,
    )
