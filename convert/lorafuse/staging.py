"""The hidden sibling directory that becomes OUT_DIR, and the checks of OUT_DIR itself.

A directory under its final name is complete: everything is written and synced in `.<name>.lorafuse-<plan id>` beside it, which
is renamed as a whole. (Resuming a run, locking against another one and staging inside a mount point are not done yet.)
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

from lorafuse.errors import OutDirError, shown

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_out_dir(out_dir: Path, inputs: list[Path], *, overwrite: bool) -> None:
    """Raises OutDirError unless OUT_DIR may be written: absent or empty, or overwritten, and apart from the inputs."""
    real_out = Path(os.path.realpath(out_dir))
    for path in inputs:
        real_in = Path(os.path.realpath(path))
        if real_out == real_in or real_in in real_out.parents or real_out in real_in.parents:
            raise OutDirError(f"{shown(out_dir)}: is, contains or lies inside the input {shown(path)}; choose another directory.")
    if not os.path.lexists(out_dir):
        return
    if not out_dir.is_dir():
        raise OutDirError(f"{shown(out_dir)}: exists and is not a directory.")
    if not overwrite and any(out_dir.iterdir()):
        raise OutDirError(f"{shown(out_dir)}: exists and is not empty; --overwrite replaces it once the new one is complete.")


class Staging:
    """A context: `path` is the staging directory, `commit` gives it its name, and leaving without that removes it."""

    def __init__(self, out_dir: Path, plan_id: str) -> None:
        # Through symbolic links, so that the sibling is on the file system that the result goes to.
        self.out_dir = Path(os.path.realpath(out_dir))
        self.path = self.out_dir.with_name(f".{self.out_dir.name[:200]}.lorafuse-{plan_id[:8]}")

    def __enter__(self) -> "Staging":
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():  # left by a run that was killed
            shutil.rmtree(self.path)
        self.path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> None:
        """Sync the directory, rename it to OUT_DIR, replacing what is there, and sync the parent."""
        _fsync_dir(self.path)
        if self.out_dir.exists() and any(self.out_dir.iterdir()):
            _exchange(self.path, self.out_dir)
            shutil.rmtree(self.path)
        else:
            os.rename(self.path, self.out_dir)
        _fsync_dir(self.out_dir.parent)


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories, in one step where the kernel and file system can (Linux renameat2)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(old))
    aside = new.with_name(f"{new.name}.old")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)
