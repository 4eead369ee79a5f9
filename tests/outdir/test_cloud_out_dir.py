"""A run into an object store that ends at any moment; as test_resume.py has it for a directory. The store is
obstore's in memory, and every call that changes it is one of these moments.

The promise while a result gets its name is that of a directory that cannot be renamed: where there is a
config.json, everything is there but for the receipt.
"""

import json
from contextlib import nullcontext, suppress
from datetime import timedelta

import pytest
from faults import Killed
from scenario import N_SHARDS, SHARD, without_times

import lorafuse
from lorafuse.errors import HeldError, OutDirError, StorageError
from lorafuse.files import cloud_store
from lorafuse.files.cloud_errors import NoConditionsError
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.files.names import RECEIPT
from lorafuse.outdir import cloud_lock
from lorafuse.outdir.clean import clean as remove_leftovers
from lorafuse.outdir.cloud_lock import CloudLock
from lorafuse.outdir.kinds import kind_of

OUT = "memory:///out"
OLD = {"config.json": b"old", "model.safetensors": b"old", RECEIPT: b"old", "sub/mine.txt": b"old"}


class Work:
    """A store with an OUT_DIR to be, which may replace an old one."""

    def __init__(self, store, inputs, *, old):
        self.store, self._inputs, self.old = store, inputs, OLD if old else {}

    def reset(self):
        self.store.reset()
        for name, data in self.old.items():
            self.store.inner.put(f"out/{name}", data)

    def again(self, **options):
        return lorafuse.convert(*self._inputs, OUT, max_shard_size=SHARD, overwrite=bool(self.old), **options)

    def check_untouched(self, clean, *, moving):
        """As it was, or complete; while it was `moving`, a part without a config.json. Returns whether it is
        complete."""
        found = self.store.files("out")
        if found.get(RECEIPT, b"old") != b"old" and without_times(dict(found)) == clean:
            return True
        if not moving:
            assert found == self.old
        elif found.get("config.json", b"old") != b"old":
            assert found == {name: data for name, data in clean.items() if name != RECEIPT}
        return False

    def check_finished(self, clean):
        assert without_times(self.store.files("out")) == clean
        assert [name for name in self.store.files("") if not name.startswith("out/")] == []


@pytest.fixture(params=["new", "overwritten"])
def work(request, store, inputs):
    return Work(store, inputs, old=request.param == "overwritten")


def finish(work, clean, complete):
    """The same command makes what is missing; of a result that is complete it may say so. Returns how many
    shards it went on from."""
    events = []
    work.store.alive()
    with suppress(OutDirError) if complete and not work.old else nullcontext():
        work.again(on_event=events.append)
    work.check_finished(clean)
    return sum(event["n_shards"] for event in events if event["event"] == "resumed")


def calls_of(work):
    """The calls of a run that nothing happens to, and the first of its commit."""
    work.reset()
    work.again()
    calls = work.store.calls
    return calls, next(n for n, call in enumerate(calls, 1) if call.endswith("/moving"))


def test_killed_before_any_call(work, clean):
    calls, first = calls_of(work)
    resumed = set()
    for number in range(1, len(calls) + 1):
        work.reset()
        work.store.kill_at = number
        with pytest.raises(Killed):
            work.again()
        complete = work.check_untouched(clean, moving=number > first)
        resumed.add(finish(work, clean, complete))
    assert resumed >= {*range(N_SHARDS + 1)}


def test_killed_twice(work, clean):
    """The second time in the run that goes on from what the first has left."""
    calls, _ = calls_of(work)
    for number in range(len(calls) // 3, len(calls), 11):
        for second in range(2, 60, 9):
            work.reset()
            complete = False
            for at in (number, second):
                work.store.alive()
                work.store.kill_at = at
                refused = [OutDirError] if complete and not work.old else []
                with suppress(Killed, *refused):
                    work.again()
                complete = work.check_untouched(clean, moving=True)
            finish(work, clean, complete)


def test_an_error_in_any_call(work, clean):
    """It ends the run, but for those of mere cleaning up; a further run finishes."""
    calls, _ = calls_of(work)
    for number in range(1, len(calls) + 1):
        work.reset()
        work.store.fail_at = number
        failed = False
        try:
            work.again()
        except (OSError, StorageError):
            failed = True
        complete = work.check_untouched(clean, moving=bool(work.old))
        assert failed or complete
        finish(work, clean, complete)


def test_other_settings(store, inputs):
    work = Work(store, inputs, old=False)
    _, first = calls_of(work)
    work.reset()
    work.store.kill_at = first
    with pytest.raises(Killed):
        work.again()
    store.alive()
    with pytest.raises(
        OutDirError, match=r"^memory:///out: a run that was cut off has finished 5 files with"
    ):
        work.again(dtype="float16")
    work.again(dtype="float16", restart=True)
    assert [name for name in store.files("") if not name.startswith("out/")] == []


def test_a_finished_file_that_something_replaced(store, inputs, clean):
    """Is seen by its ETag, and made again."""
    work = Work(store, inputs, old=False)
    _, first = calls_of(work)
    work.reset()
    work.store.kill_at = first
    with pytest.raises(Killed):
        work.again()
    (name,) = [name for name in store.files("") if name.endswith("out/model-00002-of-00005.safetensors")]
    store.inner.put(name, bytes(len(store.files("")[name])))
    events = []
    store.alive()
    work.again(on_event=events.append)
    assert [event["n_shards"] for event in events if event["event"] == "resumed"] == [4]
    assert any("is made again" in event.get("message", "") for event in events)
    work.check_finished(clean)


def test_a_run_that_lost_its_lock(store, inputs, clean):
    """It was stopped for longer than its lease, and another run made the result: it makes nothing more."""
    work = Work(store, inputs, old=False)

    def stopped(event):
        if event["event"] == "shard" and not store.files("out"):
            work.again(restart=True)

    with pytest.raises(
        OutDirError, match=r"^memory:///out: another run took over what this one had begun\.$"
    ):
        lorafuse.convert(*inputs, OUT, max_shard_size=SHARD, dtype="float16", on_event=stopped)
    remove_leftovers(OUT)  # of a run without a lock, which leaves alone what may be in use
    work.check_finished(clean)


def test_a_lock_ends_by_the_clock_of_the_store(store, monkeypatch):
    """A run that is killed elsewhere holds it for its lease, whatever the clock of this machine."""
    monkeypatch.setattr(cloud_lock, "_is_gone", lambda lock: False)
    hidden = CloudPlace.at("memory:///.out.lorafuse")
    first, second = CloudLock(hidden, OUT, "a"), CloudLock(hidden, OUT, "b")
    first.acquire()
    with pytest.raises(HeldError) as caught:
        second.acquire()
    assert str(caught.value) == (
        f"{OUT}: another run is writing it; wait for it, or choose another place. (The lock of a run that "
        "was killed on another machine ends after 90 seconds.)"
    )
    later = CloudPlace.head
    monkeypatch.setattr(
        CloudPlace,
        "head",
        lambda self, name: (meta := later(self, name))._replace(
            modified=meta.modified + timedelta(seconds=91 if name.startswith("clock") else 0)
        ),
    )
    second.acquire()
    with pytest.raises(OutDirError):
        first.renew()
    assert not first.is_held and second.is_held
    first.release()
    second.renew()
    second.release()
    assert store.files("") == {}


def test_a_store_without_conditions(store, inputs, clean, monkeypatch):
    """There is no lock then, and that is said."""

    def refuse(self, *args):
        raise NoConditionsError

    monkeypatch.setattr(CloudPlace, "_put_if", refuse)
    events, work = [], Work(store, inputs, old=False)
    work.again(on_event=events.append)
    assert {
        "event": "warning",
        "message": f"{OUT}: the store has no locks; let one run at a time write it.",
    } in (events)
    work.check_finished(clean)


def test_a_copy_that_the_store_cannot_make(store, inputs, clean, monkeypatch):
    """A file of more than 5 GiB passes through this machine."""
    monkeypatch.setattr(cloud_store, "LARGEST_COPY_NBYTES", 1000)
    monkeypatch.setattr(cloud_store, "COPIED_NBYTES", 300)
    work = Work(store, inputs, old=False)
    work.again()
    assert sum(call.startswith("write out/") for call in store.calls) > 10
    work.check_finished(clean)


def test_what_is_left_over(store, inputs):
    work = Work(store, inputs, old=False)
    kind = kind_of(OUT)
    assert kind.left_nbytes([OUT]) == 0
    _, first = calls_of(work)
    work.reset()
    work.store.kill_at = first
    with pytest.raises(Killed):
        work.again()
    store.alive()
    left = store.files(".out.lorafuse")
    assert kind.left_nbytes([OUT]) == sum(map(len, left.values()))
    done = [json.loads(data.splitlines()[0]) for name, data in left.items() if "/done/" in name]
    assert {entry["finished"]["written"]["file"] for entry in done} == {
        name.rpartition("/")[2] for name in left if "/out/model-" in name
    } - {"model.safetensors.index.json"}
