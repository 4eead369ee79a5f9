"""A batch that is cut off at any moment: every result is complete or not there, and the same call goes on
with the rest."""

import os
import shutil

import pytest
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from faults import Disk, Killed, Power
from scenario import content

import lorafuse
from lorafuse.batching import passes
from lorafuse.errors import OutDirError, StorageError
from lorafuse.outdir.local import left_nbytes

NAMES = ["a", "b", "c"]
SHARD = "2KB"
OPTIONS = {"max_shard_size": SHARD, "share": "hardlink"}


@pytest.fixture
def inputs(tmp_path):
    """A checkpoint, and three adapters for two layers of its three, so that much is common."""
    tensors = checkpoint_tensors(n_layers=3)
    for i, name in enumerate(NAMES):
        own = {k: t * (i + 1) for k, t in adapter_tensors(tensors).items() if "layers.2" not in k}
        write_adapter(tmp_path / "jobs" / name, own)
    return write_checkpoint(tmp_path / "ckpt", tensors), tmp_path / "jobs"


@pytest.fixture
def clean(inputs, tmp_path):
    """What single runs make."""
    for name in NAMES:
        lorafuse.convert(inputs[0], inputs[1] / name, tmp_path / "alone" / name, max_shard_size=SHARD)
    return {name: content(tmp_path / "alone" / name) for name in NAMES}


def call(inputs, out, **options):
    events = []
    states = lorafuse.batch(*inputs, out, on_event=events.append, **OPTIONS | options)
    return {state.name: state for state in states}, events


def shards_made(events):
    return [(event["job"], event["file"]) for event in events if event["event"] == "shard"]


def check(out, clean, names=NAMES):
    """These results are complete, of each other one nothing is to be seen."""
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == sorted(names)
    for name in names:
        assert content(out / name) == clean[name], name


def cut_off(inputs, out, n_shards, **options):
    """Interrupt a call after so many files. Returns those; others that had all their bytes are finished,
    too."""
    made = []

    def stop(event):
        if event["event"] == "shard":
            made.append((event["job"], event["file"]))
            if len(made) == n_shards:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorafuse.batch(*inputs, out, on_event=stop, **OPTIONS | options)
    return made


def test_only_what_is_missing_is_made(inputs, clean, tmp_path):
    """Wherever it is interrupted; what one made for all is taken from there."""
    out = tmp_path / "out"
    _, events = call(inputs, out)
    everything = shards_made(events)
    check(out, clean)
    assert len(everything) > 8
    for n_shards in range(1, len(everything)):
        shutil.rmtree(out)
        made = cut_off(inputs, out, n_shards)
        states, events = call(inputs, out)
        check(out, clean)
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
        again = shards_made(events)
        finished = {*everything} - {*again}
        assert {*again} <= {*everything} and len({*again}) == len(again) and {*made} <= finished
        resumed = {event["job"]: event["n_shards"] for event in events if event["event"] == "resumed"}
        assert sum(resumed.values()) == sum(job in resumed for job, _ in finished)
        assert {state.state for state in states.values()} <= {"done", "skipped"}
    equal = [path for path in (out / "a").iterdir() if path.stat().st_nlink == 3]
    assert len(equal) >= 3


@pytest.mark.parametrize("members", [1, 2, 32])
def test_killed_before_any_call(members, inputs, clean, tmp_path, monkeypatch):
    """Of those that change the file system; the next call may put its passes together in another way."""
    disk, out = Disk(monkeypatch), tmp_path / "out"
    for number in range(1, 1000, 5):
        shutil.rmtree(out, ignore_errors=True)
        disk.kill_at(number)
        monkeypatch.setattr(passes, "MAX_MEMBERS", members)
        try:
            with disk.watched():
                call(inputs, out)
            break
        except Killed:
            disk.dead = False
        there = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
        if out.exists():
            check(out, clean, there)
        monkeypatch.setattr(passes, "MAX_MEMBERS", 2)
        states, _ = call(inputs, out)
        check(out, clean)
        assert {name for name in NAMES if states[name].state == "skipped"} == {*there}
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert number > 120


def test_a_single_run_goes_on_with_a_job_and_the_reverse(inputs, clean, tmp_path):
    """It is the same work."""
    made = cut_off(inputs, tmp_path / "out", 4)
    events = []
    lorafuse.convert(
        inputs[0], inputs[1] / "a", tmp_path / "out" / "a", max_shard_size=SHARD, on_event=events.append
    )
    own = sum(job == "a" for job, _ in made)
    [resumed] = [event["n_shards"] for event in events if event["event"] == "resumed"]
    assert 0 < own <= resumed
    assert content(tmp_path / "out" / "a") == clean["a"]
    call(inputs, tmp_path / "out")
    check(tmp_path / "out", clean)

    def stop(event):
        if event["event"] == "shard":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorafuse.convert(
            inputs[0], inputs[1] / "b", tmp_path / "new" / "b", max_shard_size=SHARD, on_event=stop
        )
    _, events = call(inputs, tmp_path / "new")
    [resumed] = [event for event in events if event["event"] == "resumed"]
    assert resumed["job"] == "b" and resumed["n_shards"] >= 1
    check(tmp_path / "new", clean)


def test_other_settings_are_refused_for_each_job(inputs, clean, tmp_path):
    out = tmp_path / "out"
    made = cut_off(inputs, out, 6)
    states, _ = call(inputs, out, dtype="float32")
    begun = {name for name in NAMES if states[name].state == "failed"}
    assert made and {job for job, _ in made} <= begun
    for name in begun:
        assert isinstance(states[name].error, OutDirError)
        assert "dtype was auto, is float32. Give its command again to finish it, or restart=True" in str(
            states[name].error
        )
    states, _ = call(inputs, out, dtype="float32", restart=True)
    assert {state.state for state in states.values()} <= {"done", "skipped"}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_space_that_a_call_left_counts_as_free(inputs, clean, tmp_path, monkeypatch):
    """Its files are used or removed; one that a finished result has too is not freed."""
    out = tmp_path / "out"
    cut_off(inputs, out, 8)
    folders = [path for path in out.iterdir() if path.is_dir()]
    once = {
        path.stat().st_ino: path.stat().st_blocks * 512
        for one in folders
        for path in one.rglob("*")
        if path.is_file()
    }
    assert left_nbytes(str(out / name) for name in NAMES) == sum(once.values()) > 0
    kept = next(path for path in folders[0].rglob("*.safetensors"))
    os.link(kept, tmp_path / "elsewhere")
    assert left_nbytes(str(out / name) for name in NAMES) == sum(once.values()) - kept.stat().st_blocks * 512
    (tmp_path / "elsewhere").unlink()
    real = os.statvfs

    def full(path):
        found = list(real(path))
        found[4] = 0  # f_bavail
        return os.statvfs_result(found)

    # No byte is free, but what was left takes more blocks than all files have bytes.
    shutil.rmtree(out)
    _, events = call(inputs, out)
    shutil.rmtree(out)
    cut_off(inputs, out, len(shards_made(events)) - 1)
    monkeypatch.setattr(os, "statvfs", full)
    call(inputs, out)
    check(out, clean)
    shutil.rmtree(out)
    with pytest.raises(StorageError, match="KB are needed for"):
        call(inputs, out)


def test_the_power_goes_before_any_call(inputs, clean, tmp_path, monkeypatch):
    """What is there under a result's name is complete, whatever of the unsynced is lost; and the next call
    makes the rest."""
    disk, out, states = Disk(monkeypatch), tmp_path / "out", tmp_path / "states"
    out.mkdir()
    states.mkdir()
    power = Power(out, disk)

    def before(n, name):
        disk._watched = False
        if n % 3 == 0:
            power.lost(n, states / f"{n:03}")
        disk._watched = True

    disk.before = before
    with disk.watched():
        call(inputs, out)
    for seed in range(10):
        power.lost(seed, tmp_path / "after")
        check(tmp_path / "after", clean)  # what a call has reported stays
    assert len(list(states.iterdir())) > 40
    for state in sorted(states.iterdir()):
        there = [path.name for path in state.iterdir() if not path.name.startswith(".")]
        check(state, clean, there)
        call(inputs, state)
        check(state, clean)
        assert not [path for path in state.iterdir() if path.name.startswith(".")]
