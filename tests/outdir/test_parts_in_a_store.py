"""One result in an object store that several workers make; as test_parts.py has it for a directory. The store
is obstore's in memory, and every call that changes it may be the last."""

import json
import threading
from dataclasses import replace

import pytest
from click.testing import CliRunner
from faults import Killed
from scenario import N_SHARDS, SHARD, without_times

import lorafuse
from lorafuse import cli
from lorafuse.errors import HeldError, OutDirError, StorageError
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.outdir import cloud_lock
from lorafuse.outdir.clean import clean as remove_leftovers
from lorafuse.outdir.clean import left
from lorafuse.outdir.cloud_out_dir import run_lock
from lorafuse.outdir.out_dir import Left, Part

OUT = "memory:///folder/out"


@pytest.fixture
def call(inputs):
    """call(**options) → the files that the call made"""

    def call(**options):
        events = []
        lorafuse.convert(*inputs, OUT, on_event=events.append, **{"max_shard_size": SHARD} | options)
        return [event["file"] for event in events if event["event"] == "shard"]

    return call


def check(store, clean):
    assert without_times(store.files("folder/out")) == clean
    assert [name for name in store.files("") if not name.startswith("folder/out/")] == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_parts_in_any_order(order, store, call, clean):
    made = [file for index in order for file in call(index=index, of=3)]
    assert len(made) == len({*made}) == N_SHARDS and store.files("folder/out") == {}
    assert call(commit=True) == []
    check(store, clean)


def test_more_workers_than_files(store, call, clean):
    for index in range(9):
        call(index=index, of=9)
    call(commit=True)
    check(store, clean)


def test_one_that_is_overwritten(store, call, clean):
    """The old result stays until the commit."""
    store.inner.put("folder/out/config.json", b"old")
    with pytest.raises(OutDirError, match="exists and is not empty"):
        call(index=0, of=2)
    for index in (0, 1):
        call(index=index, of=2, overwrite=True)
    assert store.files("folder/out") == {"config.json": b"old"}
    call(commit=True, overwrite=True)
    check(store, clean)


def test_a_worker_killed_before_any_call(store, call, clean):
    """Run again, it makes what is missing, and nothing that others make."""
    call(index=0, of=2)
    calls, made = len(store.calls), set()
    for number in range(1, calls + 1):
        store.reset()
        store.kill_at = number
        with pytest.raises(Killed):
            call(index=0, of=2)
        store.alive()
        again = [file for index in (1, 0) for file in call(index=index, of=2)]
        assert len(again) == len({*again}) <= N_SHARDS and store.files("folder/out") == {}
        made.add(len(again))
        call(commit=True)
        check(store, clean)
    assert len(made) > 2


@pytest.mark.parametrize("then", ["commit", "worker, commit", "one run"])
def test_a_commit_killed_before_any_call(then, store, call, clean):
    """Nothing is made again, whatever comes next."""
    for index in range(3):
        call(index=index, of=3)
    made = store.files("")
    store.alive()
    call(commit=True)
    for number in range(1 + len(then) % 3, len(store.calls) + 1, 3):
        store.reset()
        for name, data in made.items():
            store.inner.put(name, data)
        _as_finished(store)
        store.kill_at = number
        with pytest.raises(Killed):
            call(commit=True)
        store.alive()
        complete = without_times(store.files("folder/out")) == clean
        if complete:
            remove_leftovers(OUT)
        else:
            if then == "worker, commit":
                assert call(index=1, of=3) == []
            assert call(commit=then != "one run") == []
        check(store, clean)


def _as_finished(store):
    """The ETags of a store in memory are numbers: what was put again has other ones."""
    for name, data in store.files("").items():
        if "/done/" in name:
            place, _, file = name.partition("/done/")
            line = data.splitlines(keepends=True)[0]
            e_tag = store.inner.head(f"{place}/out/{file}")["e_tag"]
            store.inner.put(name, line + json.dumps(e_tag).encode())


def test_a_commit_before_all_parts_are_made(store, call, clean):
    """Nothing is lost, and the message names the files."""
    with pytest.raises(StorageError, match=f"^{OUT}: 5 of 5 files of weights are not finished"):
        call(commit=True)
    made = call(index=1, of=2)
    with pytest.raises(StorageError) as caught:
        call(commit=True)
    lacking = sorted({file for file in clean if file.startswith("model-")} - {*made})
    assert str(caught.value) == (
        f"{OUT}: {len(lacking)} of {N_SHARDS} files of weights are not finished: {', '.join(lacking)}. "
        "Run the workers again that make them, then commit=True."
    )
    assert call(index=1, of=2) == []
    call(index=0, of=2)
    call(commit=True)
    check(store, clean)


def test_a_file_that_something_replaced(store, call, clean):
    """It is not committed, and its worker makes it again."""
    for index in (0, 1):
        call(index=index, of=2)
    (name, *_) = sorted(name for name in store.files("") if "part-0of2/" in name and "/out/" in name)
    file = name.rpartition("/")[2]
    store.inner.put(name, bytes(len(store.files("")[name])))
    with pytest.raises(StorageError, match=f"1 of {N_SHARDS} files of weights are not finished: {file}"):
        call(commit=True)
    assert call(index=0, of=2) == [file]
    call(commit=True)
    check(store, clean)


def test_workers_of_other_commands(store, call, clean):
    call(index=0, of=2)
    for options, says in (
        ({"index": 1, "of": 2, "adapter_scale": 0.5}, "part 0 of 2 is made of something else: adapter_scale"),
        ({"index": 1, "of": 3}, "is being made in 2 parts, not in 3"),
        ({"index": 0, "of": 2, "adapter_scale": 0.5}, "adapter_scale was 1.0, is 0.5"),
        ({"commit": True, "adapter_scale": 0.5}, "adapter_scale was 1.0, is 0.5"),
    ):
        with pytest.raises(OutDirError, match=says):
            call(**options)
    call(index=1, of=2)
    call(commit=True)
    check(store, clean)
    for index in (0, 1):
        assert call(index=index, of=2, overwrite=True, restart=True, adapter_scale=0.5)
    call(commit=True, overwrite=True, adapter_scale=0.5)
    assert without_times(store.files("folder/out")) != clean


def test_a_worker_that_is_killed_when_all_is_made(store, call, clean):
    """Its lock goes with the rest."""
    for index in (0, 1):
        call(index=index, of=2)
    store.inner.put("folder/.out.lorafuse/part-1of2/lock", b'{"run": "gone"}')
    call(commit=True)
    check(store, clean)


def test_one_run_takes_what_workers_have_made(store, call, clean):
    made = call(index=1, of=2)
    rest = call()
    assert sorted([*made, *rest]) == sorted(file for file in clean if file.startswith("model-"))[:N_SHARDS]
    check(store, clean)


def test_workers_after_one_run_that_was_killed(store, call, clean):
    """They make what it had not finished."""
    store.kill_at = 12
    with pytest.raises(Killed):
        call()
    finished = [piece.name.rpartition("/")[2] for piece in left(OUT) if piece.what == "finished"]
    store.alive()
    made = [file for index in (0, 1) for file in call(index=index, of=2)]
    assert 0 < len(finished) < N_SHARDS == len({*finished, *made}) == len(finished) + len(made)
    assert call(commit=True) == []
    check(store, clean)


def test_what_workers_left_is_told_and_removed(store, call):
    made = call(index=1, of=2)
    store.inner.put("folder/.out.lorafuse/part-1of2/a/out/model-00009.safetensors", b"12")
    pieces = left(OUT)
    assert sum(piece.nbytes for piece in pieces) == sum(map(len, store.files("").values())) > 0
    files = [(piece.what, piece.name.rpartition("/")[2]) for piece in pieces if "/out/" in piece.name]
    finished = [("finished", file) for file in sorted(made)]
    assert sorted(files) == [*finished, ("unfinished", "model-00009.safetensors")]
    assert {piece.what for piece in pieces if "/out/" not in piece.name} == {"journal"}
    assert all(piece.name.startswith("part-1of2/") and 0 <= piece.age_s < 60 for piece in pieces)
    said = json.loads(CliRunner().invoke(cli.lorafuse, ["clean", OUT, "--json"]).stdout)
    assert (said["out_dir"], said["removed"]) == (OUT, True)
    assert [Left(**piece) for piece in said["left"]] == [
        replace(piece, age_s=again["age_s"]) for piece, again in zip(pieces, said["left"], strict=True)
    ]
    assert store.files("") == {}


# ---- at the same time


@pytest.fixture
def alive(store, monkeypatch):
    """Runs that hold a lock are at work."""
    monkeypatch.setattr(cloud_lock, "_is_gone", lambda lock: False)


@pytest.fixture
def lock(store):
    """lock(run, part) → a lock, acquired"""
    locks = []

    def lock(run, part=None):
        made = run_lock(CloudPlace.at(OUT), run, part)
        made.acquire()
        locks.append(made)
        return made

    yield lock
    for made in locks:
        made.release()


@pytest.mark.usefixtures("alive")
def test_who_may_be_at_work_together(store, lock, call, clean):
    """Workers of different parts; neither two of one part, nor one run for all beside any of them."""
    first = lock("a", Part(0, 2))
    with pytest.raises(HeldError) as caught:
        call(index=0, of=2)
    assert str(caught.value).startswith(f"{OUT}: another run is making part 0 of 2; wait for it.")
    for options in ({}, {"commit": True}):
        with pytest.raises(HeldError, match="part 0 of 2"):
            call(**options)
    assert call(index=1, of=2)
    first.release()
    whole = lock("b")
    with pytest.raises(HeldError, match="another run is writing it"):
        call(index=0, of=2)
    whole.release()
    call(index=0, of=2)
    call(commit=True)
    check(store, clean)


@pytest.mark.usefixtures("alive")
def test_of_a_worker_and_a_commit_at_once_one_is_refused(store, lock):
    """Whoever takes its lock first: both take it before they look at the other."""
    for first, second in (((None,), (Part(0, 2),)), ((Part(0, 2),), (None,))):
        held = run_lock(CloudPlace.at(OUT), "a", *first)
        beside, refused = held._beside, []

        def meanwhile(beside=beside, second=second, refused=refused):
            with pytest.raises(HeldError):
                lock("b", *second)
            refused.append(True)
            return beside()

        held._beside = meanwhile
        held.acquire()
        held.release()
        assert refused


def test_a_run_that_was_only_stopped_makes_nothing_more(store, lock, monkeypatch):
    """Its lock had ended when the other kind of run began."""
    for first, second in ((Part(0, 2), None), (None, Part(0, 2))):
        stopped, other = lock("a", first), lock("b", second)
        with pytest.raises(OutDirError, match="another run took over what this one had begun"):
            stopped.renew()
        other.renew()
        other.release()


@pytest.mark.usefixtures("alive")
def test_a_lost_worker_is_waited_for(store, lock, monkeypatch):
    """Its machine is gone, and an engine starts it elsewhere: it waits until the lock ends, unless it is
    renewed."""
    part, waited = Part(0, 2), []
    monkeypatch.setattr(cloud_lock, "_is_here", lambda lock: False)
    monkeypatch.setattr(cloud_lock, "LEASE_S", 1)

    def look(seconds, renewed):
        waited.append(seconds)
        if renewed:
            first.renew()
        else:
            threading.Event().wait(0.3)

    first = lock("a", part)
    monkeypatch.setattr(cloud_lock.time, "sleep", lambda s: look(s, renewed=True))
    with pytest.raises(HeldError):
        lock("b", part)
    assert len(waited) == 1
    monkeypatch.setattr(cloud_lock.time, "sleep", lambda s: look(s, renewed=False))
    lock("c", part)
    assert len(waited) > 2
    with pytest.raises(OutDirError):
        first.renew()
