"""A hash that begins while torch is imported, and the one that goes on from it."""

import ctypes
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lorafuse.cli import cmd_batch, cmd_convert, cmd_verify
from lorafuse.files import early_hashing
from lorafuse.files.early_hashing import begun_hash, hashing_meanwhile
from lorafuse.files.folder import FileHash
from lorafuse.files.hashing import hash_file
from lorafuse.files.local_folder import LocalFile, LocalFolder

NAME = "model.safetensors"


def hash_of(data: bytes) -> FileHash:
    return FileHash(len(data), hashlib.sha256(data).hexdigest())


def wait_for_hash(folder: Path, *names: str) -> None:
    """Until the thread has these files behind it."""
    deadline = time.monotonic() + 10
    while not all(str(folder / name) in early_hashing._BEGUN for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where reads of local files began."""
    read, starts = LocalFile.read_into, []
    monkeypatch.setattr(
        LocalFile, "read_into", lambda self, start, into: (starts.append(start), read(self, start, into))[1]
    )
    return starts


@given(st.binary(max_size=100), st.integers(1, 30), st.integers(0, 12))
def test_a_hash_that_was_begun_is_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, piece: int, n_pieces: int
) -> None:
    """Wherever it was stopped: the hash is that of the file, no byte is read twice, and all are told of."""
    folder, stop, starts, told = tmp_path_factory.mktemp("base"), Event(), [], []
    (folder / NAME).write_bytes(data)
    read = LocalFile.read_into

    def read_some(self: LocalFile, start: int, into: memoryview) -> int:
        starts.append(start)
        if len(starts) == n_pieces:
            stop.set()
        return read(self, start, into)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_hashing, "READ_NBYTES", piece)
        patch.setattr(LocalFile, "read_into", read_some)
        if n_pieces:
            early_hashing._hash(str(folder), stop)
        stopped_at = min(n_pieces * piece, len(data))
        del starts[:]
        assert hash_file(LocalFolder(folder), NAME, told.append) == hash_of(data)
        assert starts[0] == stopped_at
        assert sum(told) == len(data) and 0 not in told


def test_all_files_of_weights_are_hashed(tmp_path: Path, starts: list[int]) -> None:
    """While the context lasts; `hash_file` then reads nothing but that there is no more."""
    shards = {f"model-0000{n}-of-00003.safetensors": os.urandom(1000 * n) for n in (1, 2, 3)}
    for name, data in shards.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "other.bin").write_bytes(b"other")
    with hashing_meanwhile(str(tmp_path)):
        wait_for_hash(tmp_path, *shards)
    assert str(tmp_path / "other.bin") not in early_hashing._BEGUN
    del starts[:]
    for name, data in shards.items():
        assert hash_file(LocalFolder(tmp_path), name) == hash_of(data)
    assert starts == [1000, 2000, 3000]


def test_a_file_that_is_another_one_now_is_hashed_from_the_start(tmp_path: Path) -> None:
    """Written to in place, with its size and its mtime as they were; and replaced."""
    path = tmp_path / NAME
    path.write_bytes(b"a" * 100)
    for replace in (False, True):
        with hashing_meanwhile(str(tmp_path)):
            wait_for_hash(tmp_path, NAME)
        before, data = path.stat(), os.urandom(100)
        time.sleep(0.02)  # a tick of the clock that stamps files
        if replace:
            path.rename(tmp_path / "was")
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert hash_file(LocalFolder(tmp_path), NAME) == hash_of(data)


def test_what_was_begun_is_given_once(tmp_path: Path) -> None:
    """Two who hash the same file never share a digest."""
    (tmp_path / NAME).write_bytes(b"abc")
    with hashing_meanwhile(str(tmp_path)):
        wait_for_hash(tmp_path, NAME)
    facts = LocalFolder(tmp_path).facts(NAME)
    assert [begun_hash(str(tmp_path / NAME), facts).nbytes for _ in range(2)] == [3, 0]


def test_the_context_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is still to be hashed."""
    monkeypatch.setattr(early_hashing, "READ_NBYTES", 1)
    for n in range(20):
        (tmp_path / f"model-{n}.safetensors").write_bytes(bytes(1 << 20))
    began = time.monotonic()
    with hashing_meanwhile(str(tmp_path)):
        pass
    assert time.monotonic() - began < 1
    assert hash_file(LocalFolder(tmp_path), "model-0.safetensors") == hash_of(bytes(1 << 20))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", ["", "no such directory", "org/model@main", "s3://bucket/base", "S3://bucket"]
)
def test_what_is_no_directory_is_left_to_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No message, no thread that died."""
    monkeypatch.chdir(tmp_path)
    with hashing_meanwhile(name):
        pass


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["FIFO", "link"])
def test_what_cannot_be_read_is_left_to_others(put: Callable[[Path], object], tmp_path: Path) -> None:
    """A FIFO is not waited for, nor a link that leads nowhere; the file before it is hashed."""
    (tmp_path / "model-1.safetensors").write_bytes(b"abc")
    put(tmp_path / "model-2.safetensors")
    with hashing_meanwhile(str(tmp_path)):
        wait_for_hash(tmp_path, "model-1.safetensors")
        time.sleep(0.05)  # and the other one is come to
    assert hash_file(LocalFolder(tmp_path), "model-1.safetensors") == hash_of(b"abc")


@pytest.mark.parametrize(
    ("command", "words", "hashed"),
    [
        (cmd_convert, ("base", "adapter", "out"), "base"),
        (cmd_convert, ("base", "adapter", "out", "--dry-run"), ""),
        (cmd_convert, ("base", "adapter", "out", "--index", "0", "--of", "2"), ""),
        (cmd_batch, ("base", "jobs", "out"), "base"),
        (cmd_batch, ("base", "jobs", "out", "--dry-run"), ""),
        (cmd_verify, ("out",), "out"),
    ],
)
def test_commands_begin_with_what_they_will_hash(
    command, words: tuple[str, ...], hashed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what a dry run or a worker reads nothing of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs" / "a").mkdir(parents=True)
    (tmp_path / "jobs" / "a" / "adapter_config.json").write_text("{}")
    names: list[str] = []

    def recorded(name: str):
        names.append(name)
        return hashing_meanwhile(name)

    monkeypatch.setattr(command, "hashing_meanwhile", recorded)
    run = {cmd_convert: "convert", cmd_batch: "batch", cmd_verify: "verify"}[command]
    CliRunner().invoke(getattr(command, run), words)
    assert names == [hashed]


def test_other_threads_do_not_get_its_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is out, `start` of a thread that had it would wait without end."""
    sizes: list[int] = []
    hashes = early_hashing._hash

    def recorded(name: str, stop: Event) -> None:
        sizes.append(stack_nbytes())
        hashes(name, stop)

    monkeypatch.setattr(early_hashing, "_hash", recorded)
    before = threading.stack_size()
    with hashing_meanwhile(str(tmp_path)):
        pass
    assert sizes == [early_hashing.STACK_NBYTES] and threading.stack_size() == before


def stack_nbytes() -> int:
    """How large the calling thread's stack is."""
    libc, attributes, nbytes = ctypes.CDLL(None), ctypes.create_string_buffer(256), ctypes.c_size_t()
    libc.pthread_self.restype = ctypes.c_void_p
    libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attributes)
    libc.pthread_attr_getstacksize(attributes, ctypes.byref(nbytes))
    libc.pthread_attr_destroy(attributes)
    return nbytes.value
