"""A file system that fails, in this process: every call of `os` that changes something is counted, and the
Nth one ends the process (for all that is on disk), fails, or is what a loss of power comes before.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

import pytest

import lorafuse
from lorafuse.outdir import commit, staging

CALLS = ("write", "pwrite", "fsync", "rename", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """The process is no more."""


class Disk:
    """Counts calls while it is `watched`. `before` is called with each call's number and name, and may
    raise."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int, str], None] = lambda n, name: None
    ) -> None:
        self.n_calls, self.dead, self.before = 0, False, before
        self.max_write = 1 << 40
        self._watched = False
        self._lock = RLock()  # files are written and finished by several threads
        self._fds: set[int] = set()
        self.real = {name: getattr(os, name) for name in (*CALLS, "open", "close")}
        self.real["fsync"] = os.fstat  # fails like it, and need not wait: `Power` says what is on the disk
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name))
        monkeypatch.setattr(os, "open", self._open)
        monkeypatch.setattr(os, "close", self._close)
        monkeypatch.setattr(staging, "open", self._builtin_open, raising=False)
        exchange = commit._exchange
        monkeypatch.setattr(commit, "_exchange", lambda *args: self._step("exchange", exchange, *args))

    def _step(self, name, call, *args, **kw):
        with self._lock:
            if self._watched:
                if self.dead:
                    raise Killed
                self.n_calls += 1
                self.before(self.n_calls, name)
            return call(*args, **kw)

    def _wrapped(self, name):
        if name.endswith("write"):
            return lambda fd, data, *at: self._step(
                name, self.real[name], fd, memoryview(data)[: self.max_write], *at
            )
        return lambda *args, **kw: self._step(name, self.real[name], *args, **kw)

    def _open(self, path, flags, *args, **kw):
        if not flags & os.O_CREAT:
            fd = self.real["open"](path, flags, *args, **kw)
            if flags & os.O_RDWR:  # a lock that was there already
                self._fds.add(fd)
            return fd
        fd = self._step("open", self.real["open"], path, flags, *args, **kw)
        self._fds.add(fd)
        return fd

    def _builtin_open(self, path, mode="r", **kw):
        return self._step("open", open, path, mode, **kw) if "w" in mode else open(path, mode, **kw)

    def _close(self, fd):
        self._fds.discard(fd)
        self.real["close"](fd)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Afterwards the kernel closes what a killed process had open, and with that lets go of its lock."""
        self.n_calls, self._watched, self.dead = 0, True, False
        try:
            yield
        finally:
            self._watched = False
            if self.dead:
                for fd in self._fds:
                    self.real["close"](fd)
            self._fds.clear()

    def kill_at(self, number: int) -> None:
        """End the process before call `number`, from which on nothing it does reaches the disk."""

        def before(n: int, name: str) -> None:
            if n == number:
                self.dead = True
                raise Killed

        self.before = before

    def fail_at(self, number: int, code: int) -> None:
        """Call `number` fails, those after it do not."""

        def before(n: int, name: str) -> None:
            if n == number:
                raise OSError(code, os.strerror(code))

        self.before = before


class Power:
    """What is on a disk, under `root`, when the power goes: what was synced, and of the rest a random part.

    File contents and each entry of a directory are taken for themselves, so that what was renamed may be
    there under both names, or none, which is harsher than a journaling file system is; only a directory is
    never in two places.
    """

    def __init__(self, root: Path, disk: Disk) -> None:
        self.root, self._disk = root, disk
        self._files: dict[int, bytes] = {}  # by inode
        self._folders: dict[int, dict[str, int]] = {}
        self._fsync = disk.real["fsync"]
        disk.real["fsync"] = self._synced
        self._remember(root)

    def _remember(self, folder: Path) -> None:
        self._folders[folder.stat().st_ino] = {p.name: p.stat().st_ino for p in folder.iterdir()}
        for path in folder.iterdir():
            if path.is_dir():
                self._remember(path)
            else:
                self._files[path.stat().st_ino] = path.read_bytes()

    def _synced(self, fd: int) -> None:
        self._fsync(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if self.root not in (path, *path.parents):
            return
        if path.is_dir():
            self._folders[path.stat().st_ino] = {p.name: p.stat().st_ino for p in path.iterdir()}
        else:
            self._files[path.stat().st_ino] = path.read_bytes()

    def lost(self, seed: int, target: Path) -> None:
        """Build in `target` what is left."""
        rng = random.Random(seed)
        now_files, now_folders = {}, {}
        for folder, _, names in os.walk(self.root):
            path = Path(folder)
            now_folders[path.stat().st_ino] = {p.name: p.stat().st_ino for p in path.iterdir()}
            now_files |= {(path / name).stat().st_ino: (path / name).read_bytes() for name in names}
        shutil.rmtree(target, ignore_errors=True)
        self._built: dict[int, Path] = {}
        self._build(self.root.stat().st_ino, target, now_folders, now_files, rng)

    def _build(self, inode: int, path: Path, now_folders, now_files, rng) -> None:
        if inode not in now_folders and inode not in self._folders:
            if inode in self._built:
                os.link(self._built[inode], path)
            else:
                path.write_bytes(self._content(inode, now_files, rng))
            self._built.setdefault(inode, path)
            return
        if inode in self._built:
            return
        self._built[inode] = path
        path.mkdir()
        before, after = self._folders.get(inode, {}), now_folders.get(inode, {})
        for name in sorted(before.keys() | after.keys()):
            entry = before.get(name) if rng.random() < 0.5 else after.get(name)
            if entry is not None:
                self._build(entry, path / name, now_folders, now_files, rng)

    def _content(self, inode: int, now_files, rng) -> bytes:
        """What was synced; of what was appended since, nothing, all, or a part, perhaps with zeros for the
        rest."""
        synced = self._files.get(inode, b"")
        now = now_files.get(inode, synced)
        if not now.startswith(synced):
            return rng.choice([synced, now, b""])
        torn = now[: rng.randrange(len(synced), len(now) + 1)]
        return rng.choice([synced, now, torn, torn + b"\0" * (len(now) - len(torn))])


def run_with_mount(mount: str, *argv: str | Path, namespace: str = "-rm", timeout: float = 180) -> str:
    """Run what follows "--" in `argv` where the shell command `mount` mounted something; "$1" … in that are
    what precedes it.

    Returns what it printed. Skips the test where mounting is not allowed: in a `namespace` "-rm" users may
    mount a tmpfs, in "-m" root may mount anything.
    """
    taken, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    script = f'{mount} || exit 99; shift {len(taken)}; exec "$@"'
    env = os.environ | {"PYTHONPATH": f"{Path(lorafuse.__file__).parents[1]}:{Path(__file__).parent}"}
    try:
        done = subprocess.run(
            ["unshare", namespace, "bash", "-c", script, "bash", *taken, *command],
            env=env, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout
