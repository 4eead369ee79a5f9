"""Several files in the making at once: what one of them waits for holds up no other, and what goes wrong with
one ends the run as if it were alone."""

import errno
import os
import random
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest
from scenario import N_SHARDS, SHARD, content

import lorafuse
from lorafuse.errors import StorageError
from lorafuse.outdir.local_file import LocalOutFile
from lorafuse.outdir.staging import LocalOutDir

STAGES = {
    "opened": (LocalOutDir, "create"),
    "written": (LocalOutFile, "write"),
    "synced": (LocalOutFile, "finish"),
    "recorded": (LocalOutDir, "record"),
}
BEFORE_A_WORD_IS_SAID = 20  # seconds


@pytest.fixture
def nothing_stays():
    """No thread and no open file of a run. Those of a server of other tests may end meanwhile."""
    threads, files = {*threading.enumerate()}, open_files()
    yield
    assert not {*threading.enumerate()} - threads and not open_files() - files


def open_files():
    """What the descriptors of this process stand for."""
    found = Counter[str]()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # of the list itself
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_while_a_file_is(stage, number, inputs, clean, tmp_path, monkeypatch, nothing_stays):
    kind, name = STAGES[stage]
    real, n, lock = getattr(kind, name), [0], threading.Lock()

    def fail(self, *args):
        with lock:
            n[0] += 1
            now = n[0]
        if now == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, *args)

    out = tmp_path / "work/out"
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, fail)
        with pytest.raises(StorageError, match=r"writing failed: Input/output error\. Give the same"):
            lorafuse.convert(*inputs, out, max_shard_size=SHARD)
    assert not out.exists()
    lorafuse.convert(*inputs, out, max_shard_size=SHARD)
    assert content(out) == clean and os.listdir(tmp_path / "work") == ["out"]


@pytest.mark.parametrize("number", [2, 6, 11])
def test_an_interruption(number, inputs, clean, tmp_path, nothing_stays):
    """Files that have all their bytes are finished: they need not be made again."""
    told = []

    def interrupt(event):
        told.append(event)
        if len(told) == number:
            raise KeyboardInterrupt

    out, again = tmp_path / "work/out", []
    with pytest.raises(KeyboardInterrupt):
        lorafuse.convert(*inputs, out, max_shard_size=SHARD, on_event=interrupt)
    lorafuse.convert(*inputs, out, max_shard_size=SHARD, on_event=again.append)
    n_finished = sum(event["event"] == "shard" for event in told)
    n_resumed = sum(event["n_shards"] for event in again if event["event"] == "resumed")
    assert content(out) == clean and n_resumed >= n_finished


def test_the_next_files_are_made_while_one_is_synced(inputs, clean, tmp_path, monkeypatch):
    """The last file has its bytes before the first is on the disk."""
    last = threading.Event()
    create, finish, n = LocalOutDir.create, LocalOutFile.finish, [0]

    def count(self, file, nbytes):
        n[0] += 1
        if n[0] == N_SHARDS:
            last.set()
        return create(self, file, nbytes)

    def wait(self, nbytes):
        assert last.wait(BEFORE_A_WORD_IS_SAID)
        finish(self, nbytes)

    monkeypatch.setattr(LocalOutDir, "create", count)
    monkeypatch.setattr(LocalOutFile, "finish", wait)
    lorafuse.convert(*inputs, tmp_path / "out", max_shard_size=SHARD)
    assert content(tmp_path / "out") == clean


def test_few_files_wait_to_be_synced(inputs, clean, tmp_path, monkeypatch):
    """A disk that is slow gets no more of them."""
    monkeypatch.setattr("lorafuse.batching.one_pass.N_FINISHING", 1)
    create, record, n, most = LocalOutDir.create, LocalOutDir.record, [0], [0]

    def count(self, file, nbytes):
        n[0] += 1
        most[0] = max(most[0], n[0])
        return create(self, file, nbytes)

    def recorded(self, *args):
        time.sleep(0.05)
        n[0] -= 1
        record(self, *args)

    monkeypatch.setattr(LocalOutDir, "create", count)
    monkeypatch.setattr(LocalOutDir, "record", recorded)
    lorafuse.convert(*inputs, tmp_path / "out", max_shard_size=SHARD)
    assert content(tmp_path / "out") == clean and 2 <= most[0] <= 3


@pytest.mark.parametrize("seed", range(3))
def test_files_are_told_in_the_order_of_their_last_bytes(seed, inputs, tmp_path, monkeypatch):
    """Whichever is synced first; and all that is said comes from the thread that called."""
    rng, finish, orders = random.Random(seed), LocalOutFile.finish, []

    def slow(self, nbytes):
        time.sleep(rng.choice([0, 0.02, 0.05]))
        finish(self, nbytes)

    monkeypatch.setattr(LocalOutFile, "finish", slow)
    for name in ("a", "b"):
        events = []

        def hear(event, events=events):
            assert threading.current_thread() is threading.main_thread()
            events.append(event)

        lorafuse.convert(*inputs, tmp_path / name, max_shard_size=SHARD, on_event=hear)
        orders.append([event["file"] for event in events if event["event"] == "shard"])
    assert orders[0] == orders[1] and len(orders[0]) == N_SHARDS
