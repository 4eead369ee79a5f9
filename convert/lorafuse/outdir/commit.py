"""Where a result is staged, and how it becomes OUT_DIR.

As a rule beside OUT_DIR, in the hidden directory `.<name>.lorafuse-<plan>-<run>`, whose sub-directory `out`
is renamed to OUT_DIR when it is complete and synced, or exchanged with it. So OUT_DIR appears as a whole, or
the old one is there.

A mount point (a container's volume) cannot be renamed to, and a directory whose parent may not be written
cannot get a sibling: there the hidden directory lies inside OUT_DIR, and files are moved out of it one by
one, config.json and the receipt last. Loaders read config.json first, so that they do not take a part for the
whole; but a program that looks for shards alone can see some.
"""

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lorafuse.errors import OutDirError, shown
from lorafuse.files.names import RECEIPT
from lorafuse.outdir.journal import fsync_dir
from lorafuse.outdir.lock import Lock, PartLock, is_own
from lorafuse.outdir.out_dir import Part

OUT = "out"
OLD = "old"
LAST = ("config.json", RECEIPT)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MAX_NAME_NBYTES = 160
_RUN_NBYTES = 4
_FOLDER = "-[0-9a-f]{8}-[0-9a-f]{8}"  # how the name of a hidden directory ends


@dataclass(frozen=True)
class StagingPlace:
    """An OUT_DIR (its real path, through symbolic links) and where it is staged: `inside`, or beside it; or
    where a `part` of its files is."""

    out_dir: Path
    inside: bool
    part: Part | None = None

    @classmethod
    def of(cls, out_dir: Path) -> "StagingPlace":
        real = Path(os.path.realpath(out_dir))
        return cls(real, real.is_dir() and (_is_mount(real) or not os.access(real.parent, os.W_OK)))

    @property
    def home(self) -> Path:
        """What holds the hidden directory."""
        return self.out_dir if self.inside else self.out_dir.parent

    @property
    def _prefix(self) -> str:
        return f"{self._prefix_of_all}.{self.part}" if self.part else self._prefix_of_all

    @property
    def _prefix_of_all(self) -> str:
        if self.inside:
            return ".lorafuse"
        name = os.fsencode(self.out_dir.name)
        if len(name) > _MAX_NAME_NBYTES:  # room for what is put before and after it
            name = name[:_MAX_NAME_NBYTES] + b"~" + hashlib.sha256(name).hexdigest()[:16].encode()
        return f".{os.fsdecode(name)}.lorafuse"

    @property
    def lock(self) -> Path:
        return self.home / f"{self._prefix}.lock"

    def run_lock(self, out_dir: Path) -> Lock | PartLock:
        """What a run for this OUT_DIR, which the user calls `out_dir`, or for this part of it holds."""
        if self.part:
            return PartLock(self.lock, replace(self, part=None).lock, out_dir, self.part.in_words)
        return Lock(self.lock, out_dir)

    def new_folder(self, plan_id: str) -> Path:
        """A name for a hidden directory that no other run has."""
        return self.home / f"{self._prefix}-{plan_id[:8]}-{secrets.token_hex(_RUN_NBYTES)}"

    def folders(self) -> list[Path]:
        """The hidden directories of runs for this OUT_DIR, or for this part of it."""
        pattern = re.compile(re.escape(self._prefix) + _FOLDER)
        return [self.home / name for name in sorted(self._names()) if pattern.fullmatch(name)]

    def parts(self) -> dict[Part, "StagingPlace"]:
        """Where runs have made parts of this OUT_DIR."""
        pattern = re.compile(re.escape(self._prefix_of_all) + r"\.([0-9]+of[0-9]+)" + _FOLDER)
        found = {Part.named(match[1]) for name in self._names() if (match := pattern.fullmatch(name))}
        return {part: replace(self, part=part) for part in sorted(found)}

    def _names(self) -> list[str]:
        return os.listdir(self.home) if self.home.is_dir() else []

    def own_folders(self) -> list[Path]:
        """The hidden directories that nobody but this user can have filled, so that what is in them may be
        used, and moved or removed."""
        return [folder for folder in self.folders() if _is_own_folder(folder)]

    def _foreign(self) -> Iterator[Path]:
        """What is in OUT_DIR and not there for staging; a new file system has lost+found."""
        prefix = re.escape(self._prefix_of_all)
        own = re.compile(rf"{prefix}(\.[0-9]+of[0-9]+)?(\.lock|{_FOLDER})|lost\+found")
        names = os.listdir(self.out_dir) if self.out_dir.is_dir() else []
        return (self.out_dir / name for name in names if not (self.inside and own.fullmatch(name)))

    @property
    def filled(self) -> bool:
        """Whether OUT_DIR has something in it."""
        return any(True for _ in self._foreign())

    def refuse_filled(self, name: str, *, overwrite: bool) -> None:
        """Raises OutDirError where something is in OUT_DIR, which the user calls `name`, that may not go."""
        if not overwrite and self.filled:
            raise OutDirError(
                f"{shown(name)}: exists and is not empty; --overwrite replaces it once the new one is "
                "complete."
            )

    def make_home(self) -> None:
        """Missing parents, each synced into its own."""
        missing = [path for path in (self.home, *self.home.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            fsync_dir(path.parent)

    def restore(self, folder: Path, moving: list[str]) -> None:
        """Undo what a commit that was cut off began: the old OUT_DIR gets its name again, what was moved goes
        back."""
        if (folder / OLD).is_dir() and not self.out_dir.exists():
            os.rename(folder / OLD, self.out_dir)
        if self.inside and (self.is_complete(folder) or not (folder / OUT).is_dir()):
            return
        for name in moving if self.inside else ():
            moved, staged = self.out_dir / name, folder / OUT / name
            if moved.exists() and not staged.exists():
                os.rename(moved, staged)
            elif moved.is_file() and os.path.samefile(moved, staged):  # half a rename, after a loss of power
                moved.unlink()

    def is_complete(self, folder: Path) -> bool:
        """Whether a commit of this directory got as far as OUT_DIR, and only has to be cleaned up after."""
        if not self.inside:
            return not (folder / OUT).is_dir()
        return (self.out_dir / LAST[-1]).exists() and not any((folder / OUT).glob("*"))

    def commit(self, folder: Path, *, overwrite: bool) -> None:
        """Give the staged directory its name. Raises OutDirError when another run was first."""
        try:
            if overwrite and self.filled:
                _exchange(folder, self.out_dir)
            else:
                os.rename(folder / OUT, self.out_dir)  # which replaces an empty directory, and no other
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise OutDirError(f"{shown(self.out_dir)}: another run has just made it.") from None

    def move_in(self, folder: Path) -> None:
        """The same where it is staged inside, file by file, in place of what is there."""
        for path in sorted(self._foreign(), key=lambda path: path.name not in LAST):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        names = os.listdir(folder / OUT)
        shards = [name for name in names if name.endswith(".safetensors")]
        others = [name for name in names if name not in (*shards, *LAST)]
        for group in (shards, others, *([name] for name in LAST)):
            for name in group:
                os.rename(folder / OUT / name, self.out_dir / name)
            fsync_dir(self.out_dir)
            fsync_dir(folder / OUT)


def other_name(folder: Path) -> Path:
    """Another name for a hidden directory, of the same plan and part, that no other run has."""
    return folder.with_name(folder.name[: -_RUN_NBYTES * 2] + secrets.token_hex(_RUN_NBYTES))


def _is_own_folder(folder: Path) -> bool:
    try:
        status = os.lstat(folder)
    except FileNotFoundError:  # another run has ended
        return False
    return stat.S_ISDIR(status.st_mode) and is_own(status)


def _is_mount(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # a bind mount of the same file system looks like any directory
        mounts = (
            Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        )
    except OSError:
        return False
    points = (
        re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4]) for line in mounts
    )
    return str(path) in points


def _exchange(folder: Path, old: Path) -> None:
    """Swap the staged directory and the old one, in one step where the kernel and file system can (Linux
    renameat2)."""
    new = folder / OUT
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(old))
    os.rename(old, folder / OLD)
    os.rename(new, old)
