"""A run that ends at any moment leaves OUT_DIR as it was, or complete; and the same command then makes what
an uninterrupted one does.

"Any moment" is every call that changes the file system, one after the other (faults.py): killed before it,
failing in it, or the power gone. Results are compared byte by byte with a run that nothing happened to.
"""

import errno
import json
import os
import re
import shutil
from contextlib import nullcontext, suppress
from threading import Lock

import pytest
import torch
from build import write_adapter, write_checkpoint
from faults import Disk, Killed, Power
from safetensors.torch import load, load_file, save_file
from scenario import N_SHARDS, SHARD, WAYS, Bucket, Directory, Work, content

import lorafuse
from lorafuse.errors import CheckpointError, OutDirError, StorageError
from lorafuse.merge import workers as merge
from lorafuse.outdir import output
from lorafuse.outdir.staging import LocalOutDir


def finish(work, clean, complete):
    """What the same command makes of what is left: of a result that is complete it may say so. Returns how
    many shards it made."""
    events = []
    with suppress(OutDirError) if complete else nullcontext():
        work.again(on_event=events.append)
    work.check_finished(clean)
    return len(made(events))


@pytest.mark.parametrize("way", WAYS)
def test_killed_before_any_call(way, inputs, clean, tmp_path, monkeypatch):
    work, disk = Work(way, inputs, tmp_path / "work", monkeypatch), Disk(monkeypatch)
    resumed = []
    for number in range(1, 1000):
        if way != "beside" and number < 50 and number % 4:  # ways differ in their last calls
            continue
        work.reset()
        disk.kill_at(number)
        try:
            with disk.watched():
                work.again()
            break
        except Killed:
            disk.dead = False
        complete = work.check_untouched(clean)
        journals = list(work.path.rglob("journal.jsonl"))
        resumed.append(
            sum(line.startswith('{"finished"') for path in journals for line in path.read_text().splitlines())
        )
        finish(work, clean, complete)
    assert number > 60 and ({*range(N_SHARDS + 1)} <= {*resumed} or way != "beside")
    work.check_finished(clean)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shift", [0, 2])
def test_an_error_in_any_call(way, shift, inputs, clean, tmp_path, monkeypatch):
    """Ends with exit 5, and a further run finishes; errors of mere cleaning up do not show."""
    codes = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS]
    work, disk = Work(way, inputs, tmp_path / "work", monkeypatch), Disk(monkeypatch)
    for number in range(1 + shift // 2, 1000, 2):
        if way != "beside" and number < 50 and number % 5:
            continue
        work.reset()
        disk.fail_at(number, codes[(number + shift) % 4])
        failed = False
        with disk.watched():
            try:
                work.again()
            except (OSError, StorageError):
                failed = True
        if disk.n_calls < number:
            break
        complete = work.check_untouched(clean)
        assert failed or complete
        finish(work, clean, complete)
    assert number > 60


@pytest.mark.parametrize("way", ["beside", "inside"])
def test_the_power_goes_before_any_call(way, inputs, clean, tmp_path, monkeypatch):
    """Promise: never a part of a result under OUT_DIR's name, and the next run is right whatever is left; and
    what a run reported as done stays."""
    work, disk = Work(way, inputs, tmp_path / "work", monkeypatch), Disk(monkeypatch)
    power = Power(work.path, disk)
    states = tmp_path / "states"
    states.mkdir()
    real_rename, real_record, recorded = disk.real["rename"], LocalOutDir.record, []

    def record(*args):
        real_record(*args)
        recorded.append(args)

    def before(n, name):
        disk._watched = False
        for seed in range(2):
            power.lost(100 * n + seed, states / f"{n:03}-{seed}-{len(recorded)}")
        disk._watched = True

    disk.before = before
    with monkeypatch.context() as patch, disk.watched():
        patch.setattr(LocalOutDir, "record", record)
        work.again()
    for seed in range(20):
        power.lost(seed, tmp_path / "after")
        found = content(tmp_path / "after" / "out")
        assert found == clean
    for state in sorted(states.iterdir()):
        shutil.rmtree(work.path)
        real_rename(state, work.path)
        uncommitted = any(work.path.rglob(".*lorafuse-*/out")) and not any(work.out.glob("*"))
        n_made = finish(work, clean, work.check_untouched(clean))
        assert not uncommitted or n_made <= N_SHARDS - int(state.name[-1])


def test_short_writes(inputs, clean, tmp_path, monkeypatch):
    """A write may take less than it is given."""
    work, disk = Work("beside", inputs, tmp_path / "work", monkeypatch), Disk(monkeypatch)
    disk.max_write = 61
    work.again()
    work.check_finished(clean)


def test_a_write_that_lies_is_noticed(inputs, clean, tmp_path, monkeypatch):
    """One that says more than it did."""
    real_write = os.pwrite

    def write(fd, data, at):
        return real_write(fd, data[:-1], at) + 1 if len(data) > 400 else real_write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(StorageError, match=r"said that \d+ bytes were written at byte \d+, and not all"):
        lorafuse.convert(*inputs, tmp_path / "out", max_shard_size=SHARD)
    assert not (tmp_path / "out").exists()


# ---- resuming


class Stop(KeyboardInterrupt):
    pass


@pytest.fixture(params=["a directory", "memory"])
def place(request, tmp_path):
    """Where OUT_DIR lies: either kind keeps the same promises, with the same texts."""
    if request.param == "memory":
        return Bucket(request.getfixturevalue("object_store"))
    return Directory(tmp_path / "work")


in_a_directory = pytest.mark.parametrize("place", ["a directory"], indirect=True)


@pytest.fixture
def stopped(inputs, place, monkeypatch):
    """stopped(n) interrupts a run for OUT_DIR after n shards, and returns the names of these."""

    def stop(n_shards, adapter=inputs[1], **options):
        real_finish, n, lock = output.Output._finish, [0], Lock()

        def finish(self, shard, writer):
            with lock:
                n[0] += 1
                if n[0] <= n_shards:
                    written = real_finish(self, shard, writer)
                if n[0] >= n_shards:
                    raise Stop
                return written

        with monkeypatch.context() as patch:
            patch.setattr(output.Output, "_finish", finish)
            with pytest.raises(Stop):
                lorafuse.convert(inputs[0], adapter, place.out, max_shard_size=SHARD, **options)
        (hidden,) = place.top()
        assert hidden.startswith(".out.lorafuse") and len(place.staged()) == n_shards
        return sorted(place.staged())

    return stop


@pytest.fixture
def again(inputs, place):
    """again(…options) gives the command again and returns its events."""

    def run(adapter=inputs[1], **options):
        events = []
        lorafuse.convert(
            inputs[0],
            adapter,
            place.out,
            on_event=events.append,
            **{"max_shard_size": SHARD} | options,
        )
        assert place.top() == ["out"]
        return events

    return run


def made(events):
    return [event["file"] for event in events if event["event"] == "shard"]


def warned(events):
    return [event["message"] for event in events if event["event"] == "warning"]


@pytest.mark.parametrize("n_shards", range(1, N_SHARDS + 1))
def test_only_what_is_missing_is_made(n_shards, inputs, clean, stopped, again, place):
    """And the receipt has the measures of what the first run made."""
    finished = {*stopped(n_shards)}
    events = again(memory_limit="200MB")  # which changes no byte
    assert {"event": "resumed", "n_shards": n_shards}.items() <= next(
        e for e in events if e["event"] == "resumed"
    ).items()
    assert (
        len(finished) == n_shards
        and {*made(events)} == {n for n in clean if n.endswith(".safetensors")} - finished
    )
    assert sum(e["nbytes"] for e in events if e["event"] in ("resumed", "progress")) == events[0]["nbytes"]
    assert place.content() == clean and not warned(events)


def made_again(file, clean, again, place):
    """Only a file that was finished, and is not what it was, is made again beside what is missing."""
    events = again()
    assert warned(events) == [
        f"{file}: is not what was written before the run was cut off; it is made again."
    ]
    assert len(made(events)) == N_SHARDS - 2 and place.content() == clean


@pytest.mark.parametrize("damage", ["flipped", "longer", "missing"])
def test_a_finished_shard_is_hashed_again(damage, clean, stopped, again, place):
    file = stopped(3)[0]
    data = place.staged()[file]
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    place.damage(f"out/{file}", {"flipped": flipped, "longer": data + b"\0", "missing": None}[damage])
    made_again(file, clean, again, place)


@in_a_directory
@pytest.mark.parametrize("damage", ["not a file", "a link"])
def test_a_finished_shard_is_a_file(damage, clean, stopped, again, place, tmp_path):
    file = stopped(3)[0]
    place.damage(f"out/{file}", None)
    (path,) = (folder / "out" / file for folder in (tmp_path / "work").iterdir())
    path.mkdir() if damage == "not a file" else path.symlink_to("/dev/zero")
    made_again(file, clean, again, place)


@pytest.mark.parametrize("damage", ["empty", "missing", "no JSON", "another kind", "half a line"])
def test_what_the_journal_does_not_say_does_not_exist(damage, clean, stopped, again, place):
    stopped(3)
    text = place.journal()
    kept = {"another kind": 0, "half a line": 2}.get(damage)
    damaged = {"empty": b"", "no JSON": b"\xff\n" + text, "another kind": b"[]\n" + text, "missing": None}
    place.damage("journal.jsonl", damaged.get(damage, text[:-3]))
    assert len(made(again())) == N_SHARDS - (kept or 0)
    assert place.content() == clean


def test_other_settings_are_refused_and_nothing_is_lost(inputs, clean, stopped, again, place, tmp_path):
    """The message has both; --restart discards, the old command goes on."""
    stopped(2)
    with pytest.raises(OutDirError) as caught:
        again(dtype="float32", allow_nonfinite=True)
    assert str(caught.value) == (
        f"{place.out}: a run that was cut off has finished 2 files with other settings: dtype "
        "was auto, is float32; allow_nonfinite was False, is True. Give its command again to finish it, or "
        "restart=True to discard that work."
    )
    assert len(place.staged()) == 2
    other = shutil.copytree(inputs[1], tmp_path / "other")
    with pytest.raises(OutDirError, match=rf"adapter 1 was {inputs[1]}, is {other}\. Give its command"):
        again(adapter=other)
    assert len(made(again())) == N_SHARDS - 2 and place.content() == clean


def test_restart_discards(inputs, clean, stopped, again, place):
    stopped(2)
    events = again(restart=True)
    assert len(made(events)) == N_SHARDS and not warned(events) and place.content() == clean
    place.clear()
    stopped(2)
    again(restart=True, dtype="float32")
    files = place.content()
    weights = load(files[min(name for name in files if name.endswith(".safetensors"))])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_other_settings_do_not_matter_when_nothing_was_finished(inputs, stopped, again, place):
    stopped(1)
    place.damage("journal.jsonl", place.journal().splitlines(keepends=True)[0])
    assert not warned(again(dtype="float32"))


def change_adapter(inputs):
    """Other values of the same shapes, in a file of the same size, time and inode."""
    file = inputs[1] / "adapter_model.safetensors"
    before = file.stat()
    data = bytearray(file.read_bytes())
    save_file({k: v * 2 for k, v in load_file(file).items()}, inputs[1] / "new")
    data[:] = (inputs[1] / "new").read_bytes()
    (inputs[1] / "new").unlink()
    with open(file, "r+b") as f:
        f.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    return file


def touch_checkpoint(inputs):
    file = inputs[0] / "model.safetensors"
    os.utime(file, ns=(1, 1))
    return file


def replace_checkpoint(inputs):
    file = inputs[0] / "model.safetensors"
    stat = file.stat()
    shutil.copy(file, inputs[0] / "new")
    os.utime(inputs[0] / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.rename(inputs[0] / "new", file)
    return file


def change_config(inputs):
    file = inputs[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5}))
    return file


@pytest.mark.parametrize("change", [change_adapter, touch_checkpoint, replace_checkpoint, change_config])
def test_changed_inputs_start_over(change, inputs, stopped, again, place, tmp_path):
    """Work on them is stale; the result is that of the new inputs."""
    stopped(3)
    file = change(inputs)
    events = again()
    assert warned(events) == [
        f"{place.out}: a run that was cut off is not resumed, since {file} changed; starting over."
    ]
    lorafuse.convert(*inputs, tmp_path / "fresh", max_shard_size=SHARD)
    assert len(made(events)) == N_SHARDS and place.content() == content(tmp_path / "fresh")


def test_another_version_starts_over(stopped, again, clean, monkeypatch, place):
    stopped(3)
    monkeypatch.setattr("lorafuse.inputs.unchanged.__version__", "9")
    message = (
        "a run that was cut off is not resumed, since another version of lorafuse or torch began it; "
        "starting over."
    )
    events = again()
    assert warned(events) == [f"{place.out}: {message}"] and len(made(events)) == N_SHARDS


@pytest.mark.parametrize("error", [CheckpointError("x"), OutDirError("x"), KeyError("a bug")])
def test_other_errors_leave_nothing(error, stopped, inputs, place, monkeypatch):
    """Not even what an earlier run had finished: the next one would end the same way."""
    stopped(3)

    def fail(*args, **kw):
        raise error

    monkeypatch.setattr("lorafuse.batching.one_pass.merge", fail)
    with pytest.raises(type(error)):
        lorafuse.convert(*inputs, place.out, max_shard_size=SHARD)
    assert place.top() == []


# ---- inputs that change meanwhile


@pytest.mark.parametrize("change", [touch_checkpoint, replace_checkpoint, change_config, "remove", "adapter"])
def test_an_input_that_changes_during_the_run_is_refused(change, inputs, place, tmp_path, monkeypatch):
    """Exit 3 with its name, and nothing is left."""
    real_finish, done = output.Output.finish, []

    def finish(self):
        real_finish(self)
        if change == "remove":
            file = inputs[0] / "model.safetensors"
            file.unlink()
        elif change == "adapter":
            file = inputs[1] / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes())
        else:
            file = change(inputs)
        done.append(file)

    monkeypatch.setattr(output.Output, "finish", finish)
    (tmp_path / "work").mkdir()
    with pytest.raises((CheckpointError, FileNotFoundError)) as caught:
        lorafuse.convert(*inputs, place.out, max_shard_size=SHARD)
    if change != "remove":
        assert (
            str(caught.value)
            == f"{done[0]}: changed during the run, which may have read some of both; run it again."
        )
    assert place.top() == []


# ---- the bytes


@pytest.mark.parametrize("memory_limit", ["40MB", "60MB", "1GB"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_bytes_depend_on_nothing_else(memory_limit, n_threads, tmp_path, monkeypatch):
    """Not on the memory limit, the number of threads, nor on where a run was cut off."""
    torch.manual_seed(0)
    big = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(700, 1100).bfloat16() for i in range(3)}
    ckpt = write_checkpoint(tmp_path / "ckpt", big)
    factors = {}
    for name in big:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {
            f"{module}.lora_A.weight": torch.randn(4, 1100) * 0.01,
            f"{module}.lora_B.weight": torch.randn(700, 4) * 0.01,
        }
    adapter = write_adapter(tmp_path / "adapter", factors)
    lorafuse.convert(ckpt, adapter, tmp_path / "clean", max_shard_size="2MB")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_threads)))
    tiles, n = merge.TileWorkers.tiles, [0]

    def interrupted(self, outputs):
        for tile in tiles(self, outputs):
            yield tile
            n[0] += 1
            if n[0] == 4:
                raise Stop

    monkeypatch.setattr(merge.TileWorkers, "tiles", interrupted)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        lorafuse.convert(ckpt, adapter, out, max_shard_size="2MB", memory_limit=memory_limit)
    events = []
    lorafuse.convert(
        ckpt, adapter, out, max_shard_size="2MB", memory_limit=memory_limit, on_event=events.append
    )
    assert any(event["event"] == "resumed" for event in events)
    assert content(out) == content(tmp_path / "clean")


def test_a_killed_process(inputs, clean, tmp_path):
    """The real thing once: SIGKILL in the middle, and the lock goes with the process."""
    import signal
    import subprocess
    import sys

    code = (
        "import os, signal, sys, threading, lorafuse\nfrom lorafuse.outdir import output\n"
        "real, n, lock = output.Output._finish, [], threading.Lock()\n"
        "def finish(self, shard, writer):\n  with lock:\n    written = real(self, shard, writer)\n"
        "    n.append(1)\n    if len(n) == 3: os.kill(os.getpid(), signal.SIGKILL)\n    return written\n"
        f"output.Output._finish = finish\nlorafuse.convert(*sys.argv[1:], max_shard_size={SHARD!r})"
    )
    work = tmp_path / "work"
    work.mkdir()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(lorafuse.__file__))])}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, inputs), str(work / "out")], env=env, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    names = sorted(p.name for p in work.iterdir())
    assert (
        len(names) == 2
        and names[1] == ".out.lorafuse.lock"
        and re.fullmatch(r"\.out\.lorafuse-[0-9a-f]{8}-[0-9a-f]{8}", names[0])
    )
    events = []
    lorafuse.convert(*inputs, work / "out", max_shard_size=SHARD, on_event=events.append)
    assert len(made(events)) == N_SHARDS - 3 and content(work / "out") == clean
    assert [p.name for p in work.iterdir()] == ["out"]
