"""The inputs' hashes are taken beside the merge, and no further ahead of it than the page cache may hold."""

import hashlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFile, LocalFolder
from lorafuse.files.stores import read_all
from lorafuse.inputs import hashes
from lorafuse.inputs.hashes import InputHashes

MIB = 1 << 20
CONTENT = bytes(range(256)) * (5 * MIB // 256)


class Reads:
    """Bytes that were read for the hash."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, read_into = 0, LocalFile.read_into

        def counted(file: LocalFile, start: int, buffer: memoryview) -> int:
            n = read_into(file, start, buffer)
            self.n += n
            return n

        monkeypatch.setattr(LocalFile, "read_into", counted)

    def reach(self, n: int) -> bool:
        """Whether so many are read within seconds."""
        until = time.monotonic() + 10
        while self.n < n and time.monotonic() < until:
            time.sleep(0.001)
        return self.n >= n


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    monkeypatch.setattr(hashes, "AHEAD_NBYTES", MIB)
    return Reads(monkeypatch)


@pytest.fixture
def ckpt(tmp_path: Path) -> SimpleNamespace:
    """A checkpoint of one file, of which the merge has read nothing."""
    (tmp_path / "x.safetensors").write_bytes(CONTENT)
    shard = SimpleNamespace(name="x.safetensors")
    return SimpleNamespace(folder=LocalFolder(tmp_path), config_files=[], shards=[shard], nbytes_read=0)


def test_the_hash_stays_close_to_what_the_merge_has_read(reads: Reads, ckpt: SimpleNamespace) -> None:
    with InputHashes(ckpt, "base", []) as taken:
        assert reads.reach(2 * MIB)
        time.sleep(0.05)
        assert reads.n == 2 * MIB  # a piece more than it may be ahead
        ckpt.nbytes_read = 2 * MIB
        assert reads.reach(4 * MIB)
        time.sleep(0.05)
        assert reads.n == 4 * MIB
        [entry] = taken.result()  # of a merge that reads no more
    assert entry["sha256"] == hashlib.sha256(CONTENT).hexdigest() and entry["size"] == len(CONTENT)


def test_a_merge_that_failed_does_not_wait_for_the_hash(reads: Reads, ckpt: SimpleNamespace) -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), InputHashes(ckpt, "base", []):
        assert reads.reach(2 * MIB)
        raise ZeroDivisionError
    assert time.monotonic() - began < 10 and reads.n < len(CONTENT)


def test_a_checkpoint_counts_what_is_read_of_it() -> None:
    ckpt = Checkpoint(LocalFolder(Path("fixtures/llama-nf4")))
    before = ckpt.nbytes_read
    for name in ckpt.tensors:
        read_all(ckpt, name)
    assert ckpt.nbytes_read - before == sum(info.spec.nbytes for info in ckpt.tensors.values())
    ckpt.close()
