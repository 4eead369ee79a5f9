"""A run into memory, a second kind of OUT_DIR, that ends at any moment; as test_resume.py has it for a
directory. Every call that changes the store is one of these moments.

The promise while a result gets its name is that of a directory that cannot be renamed: where there is a
config.json, everything is there but for the receipt.
"""

import errno
import os
from contextlib import nullcontext, suppress

import pytest
from faults import Killed
from scenario import N_SHARDS, SHARD, Bucket

import lorafuse
from lorafuse.errors import HeldError, OutDirError, StorageError
from lorafuse.files.names import RECEIPT
from lorafuse.outdir.kinds import kind_of

OLD = {"config.json": b"old", "model.safetensors": b"old", RECEIPT: b"old", "sub/mine.txt": b"old"}
OUT, HIDDEN = "memory://out", "memory://.out.lorafuse"


class Work:
    """A store with an OUT_DIR to be, which may replace an old one."""

    def __init__(self, store, inputs, *, old):
        self.store, self.place, self._inputs, self.old = store, Bucket(store), inputs, OLD if old else {}

    def reset(self):
        self.store.objects.clear()
        self.store.objects.update({f"{OUT}/{name}": data for name, data in self.old.items()})

    def again(self, **options):
        return lorafuse.convert(*self._inputs, OUT, max_shard_size=SHARD, overwrite=bool(self.old), **options)

    def check_untouched(self, clean, *, moving):
        """As it was, or complete; while it was `moving`, a part without a config.json. Returns whether it is
        complete."""
        files = self.place.content() if self.store.objects.get(f"{OUT}/{RECEIPT}") != b"old" else {}
        if files == clean:
            return True
        found = {name: bytes(self.store.objects[f"{OUT}/{name}"]) for name in self.store.below(OUT)}
        if not moving:
            assert found == self.old
        elif found.get("config.json", b"old") != b"old":
            assert found == {name: data for name, data in clean.items() if name != RECEIPT}
        return False

    def check_finished(self, clean):
        assert self.place.top() == ["out"]
        assert self.place.content() == clean


@pytest.fixture(params=["new", "overwritten"])
def work(request, object_store, inputs):
    return Work(object_store, inputs, old=request.param == "overwritten")


def finish(work, clean, complete):
    """The same command makes what is missing; of a result that is complete it may say so. Returns how many
    shards it went on from."""
    events = []
    with suppress(OutDirError) if complete and not work.old else nullcontext():
        work.again(on_event=events.append)
    work.check_finished(clean)
    return sum(event["n_shards"] for event in events if event["event"] == "resumed")


def calls_of(work):
    """The calls of a run that nothing happens to."""
    calls = []
    work.reset()
    work.store.before = lambda n, name: calls.append(name)
    with work.store.watched():
        work.again()
    work.store.before = lambda n, name: None
    return calls


def test_killed_before_any_call(work, clean):
    calls, resumed = calls_of(work), set()
    assert {*calls} >= {"put new", "create", "write", "finish", "put", "record", "commit", "delete"}
    first = calls.index("commit") - (len(OLD) if work.old else 0)
    for number in range(1, len(calls) + 1):
        work.reset()
        work.store.kill_at(number)
        with pytest.raises(Killed), work.store.watched():
            work.again()
        work.store.before = lambda n, name: None
        complete = work.check_untouched(clean, moving=number > first)
        resumed.add(finish(work, clean, complete))
    assert resumed == {*range(N_SHARDS + 1)}


def test_killed_twice(work, clean):
    """The second time in the run that goes on from what the first has left."""
    calls = calls_of(work)
    for number in range(len(calls) // 3, len(calls), 7):
        for second in range(1, 60, 5):
            work.reset()
            complete = False
            for at in (number, second):
                work.store.kill_at(at)
                refused = [OutDirError] if complete and not work.old else []
                with suppress(Killed, *refused), work.store.watched():
                    work.again()
                complete = work.check_untouched(clean, moving=True)
            work.store.before = lambda n, name: None
            finish(work, clean, complete)


def test_an_error_in_any_call(work, clean):
    """It ends the run, but for those of mere cleaning up; a further run finishes."""
    calls, codes = calls_of(work), [errno.ENOSPC, errno.EIO]
    resumed = set()
    for number in range(1, len(calls) + 1):
        work.reset()
        work.store.fail_at(number, codes[number % 2])
        failed = False
        with work.store.watched():
            try:
                work.again()
            except (OSError, StorageError):
                failed = True
        work.store.before = lambda n, name: None
        assert not work.store.leases
        complete = work.check_untouched(clean, moving=bool(work.old))
        assert failed or complete
        resumed.add(finish(work, clean, complete))
    assert resumed >= {*range(N_SHARDS + 1)}


@pytest.mark.parametrize(("code", "says"), [
    (errno.ENOSPC, r"No space left on device; \d+ bytes are still to be written\. Give"),
    (errno.EIO, r"writing failed: Input/output error\. Give"),
])  # fmt: skip
def test_what_a_failed_write_says(code, says, object_store, inputs):
    def before(n, name):
        if name == "write":
            raise OSError(code, os.strerror(code))

    object_store.before = before
    with pytest.raises(StorageError, match=rf"^memory://\.out\.lorafuse/out: {says}"), object_store.watched():
        lorafuse.convert(*inputs, OUT, max_shard_size=SHARD)
    assert not object_store.objects, "nothing was finished, and nothing is left"


def test_no_room(object_store, inputs):
    """Asked before the first byte; nothing is left."""
    object_store.capacity = 9000
    with pytest.raises(
        StorageError, match=r"^memory://\.out\.lorafuse/out: \d+ bytes are needed and \d+ are"
    ):
        lorafuse.convert(*inputs, OUT, max_shard_size=SHARD)
    assert not object_store.objects


def test_one_run_at_a_time(object_store, inputs, clean):
    """The second ends with the words that it has for a directory, and disturbs nothing."""
    said = []

    def second(event):
        if event["event"] == "shard":
            with pytest.raises(HeldError) as caught:
                lorafuse.convert(*inputs, OUT, max_shard_size=SHARD)
            said.append(str(caught.value))

    lorafuse.convert(*inputs, OUT, max_shard_size=SHARD, on_event=second)
    text = f"{OUT}: another run is writing it; wait for it, or choose another directory."
    assert said == [text] * N_SHARDS
    Work(object_store, inputs, old=False).check_finished(clean)


def test_a_lock_of_a_run_that_is_no_more(object_store, inputs, clean):
    object_store.objects[f"{HIDDEN}/lock"] = b"whose lease has ended"
    lorafuse.convert(*inputs, OUT, max_shard_size=SHARD)
    Work(object_store, inputs, old=False).check_finished(clean)


def test_filled_meanwhile(object_store, inputs):
    """What another program put there during the run stays."""

    def put(event):
        object_store.objects[f"{OUT}/mine.txt"] = b"mine"

    with pytest.raises(OutDirError, match=r"^memory://out: exists and is not empty; overwrite=True"):
        lorafuse.convert(*inputs, OUT, max_shard_size=SHARD, on_event=put)
    assert object_store.objects == {f"{OUT}/mine.txt": b"mine"}


def test_clean_up_and_what_is_left(object_store, inputs, clean):
    """A run that was killed after its last file only has to be cleaned up after."""
    kind, work = kind_of(OUT), Work(object_store, inputs, old=False)
    calls = calls_of(work)
    last = len(calls) - calls[::-1].index("commit")  # the call of the receipt
    work.reset()
    object_store.kill_at(last + 2)
    with pytest.raises(Killed), object_store.watched():
        work.again()
    object_store.before = lambda n, name: None
    staged = work.place.staged()
    assert kind.left_nbytes([OUT, "memory://other"]) == sum(map(len, staged.values())) > 0
    kind.clean_up(OUT)
    work.check_finished(clean)
    kind.clean_up(OUT)
    assert kind.left_nbytes([OUT]) == 0
