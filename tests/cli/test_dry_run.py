"""What a dry run says beside its plan, and that it ends with 5 where the result does not fit."""

import os
import re
from types import SimpleNamespace

import pytest
from build import CONFIG, adapter_tensors, checkpoint_tensors, files_of, write_checkpoint, write_told_adapter
from click.testing import CliRunner

import lorafuse
from lorafuse import cli
from lorafuse.batching.answers import Speeds
from lorafuse.merge import probe
from lorafuse.outdir.probe import write_rate


@pytest.fixture
def inputs(tmp_path):
    return write_checkpoint(tmp_path / "ckpt"), write_told_adapter(tmp_path / "adapter"), tmp_path / "out"


def disk_of(monkeypatch, free):
    """A disk with so many free bytes, in blocks of one byte."""
    full = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1, f_files=0, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda path: full)


def on_disk(path):
    return sum(map(len, files_of(path).values()))


def run(*args):
    return CliRunner().invoke(cli.lorafuse, [str(arg) for arg in args])


def test_the_answers(inputs, tmp_path):
    """What is read, what changes, memory, disk and time; nothing is written."""
    before = files_of(tmp_path)
    plan = lorafuse.convert(*inputs, dry_run=True, memory_limit="200MB")
    assert [(entry["role"], entry["kind"]) for entry in plan["inputs"]] == [
        ("checkpoint", "llama: 21 weights in full precision"),
        ("adapter", "LORA of PEFT, 8 tensors"),
    ]
    changed = [f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("mlp.down_proj", "self_attn.q_proj")]
    assert plan["changed"] == changed
    kinds = {"model.layers.*.mlp.down_proj": 2, "model.layers.*.self_attn.q_proj": 2}
    assert (plan["changes"], plan["memory_nbytes"]) == (kinds, 200_000_000)
    assert plan["disk"]["free_nbytes"] > 0
    estimate = plan["estimate"]
    assert estimate["wall_s"] == max(estimate["compute_s"], estimate["write_s"]) > 0
    assert files_of(tmp_path) == before and not inputs[2].exists()
    lorafuse.convert(*inputs)
    assert on_disk(inputs[2]) <= plan["disk"]["needed_nbytes"] < on_disk(inputs[2]) + 300_000


def test_verbose_lists_what_changes(inputs):
    assert "model.layers.1.mlp.down_proj.weight" not in run("convert", "--dry-run", *inputs).output
    lines = run("convert", "--dry-run", "-v", *inputs).output.splitlines()
    assert "  model.layers.1.mlp.down_proj.weight" in lines
    assert "changes   4 of 21 weights: 2 mlp.down_proj, 2 self_attn.q_proj" in lines


def test_it_does_not_fit(inputs, monkeypatch):
    """The plan is printed, then exit code 5 says how much is missing."""
    needed = lorafuse.convert(*inputs, dry_run=True)["disk"]["needed_nbytes"]
    disk_of(monkeypatch, 0)
    with pytest.raises(lorafuse.StorageError, match=r"are needed and 0 bytes are free; it lacks"):
        lorafuse.convert(*inputs, dry_run=True)
    done = run("convert", "--dry-run", *inputs)
    assert done.exit_code == 5
    assert re.search(r"^disk      2\d\d KB needed, 0 bytes free$", done.output, re.M)
    assert done.output.splitlines()[-1].startswith(f"Error: {inputs[2]}: ")
    disk_of(monkeypatch, needed)
    assert run("convert", "--dry-run", *inputs).exit_code == 0


def test_a_batch_that_does_not_fit_in_sum(inputs, monkeypatch, tmp_path):
    """Two jobs fit alone, and not together; what they share counts once."""
    for name in ("one", "two"):
        write_told_adapter(tmp_path / "jobs" / name)
    args = ("batch", "--dry-run", "--max-shard-size", "3KB", inputs[0], tmp_path / "jobs", tmp_path / "root")
    disk_of(monkeypatch, 10**9)
    events = []
    lorafuse.batch(inputs[0], tmp_path / "jobs", tmp_path / "root", max_shard_size="3KB", dry_run=True,
                   on_event=events.append)  # fmt: skip
    alone = [event["disk"]["needed_nbytes"] for event in events if event["event"] == "plan"]
    total = events[-1]
    assert total["event"] == "total" and total["states"] == {"planned": 2}
    needed = total["disk"]["needed_nbytes"]
    assert max(alone) < needed < sum(alone)
    lorafuse.batch(inputs[0], tmp_path / "jobs", tmp_path / "root", max_shard_size="3KB")
    inodes = {p.stat().st_ino: p.stat().st_size for p in (tmp_path / "root").rglob("*") if p.is_file()}
    shared = sum(size for size in inodes.values())
    assert shared <= needed
    for path in (tmp_path / "root").iterdir():
        path.rename(tmp_path / f"made-{path.name}")
    disk_of(monkeypatch, needed - 1)
    done = run(*args)
    assert (done.exit_code, done.output.count("changes 4 of 21 weights")) == (5, 2)
    assert "are free; it lacks 1 byte." in done.output.splitlines()[-1]
    disk_of(monkeypatch, needed)
    assert run(*args).exit_code == 0


def test_the_time_is_that_of_the_slower_of_two():
    """By hand: 100 bytes that change at 10 a second and 300 others at 100 are computed in 13 s, and written
    at 20 a second in 20 s."""
    step = lambda nbytes, changes: SimpleNamespace(nbytes=nbytes, changes=changes)  # noqa: E731
    shards = [
        SimpleNamespace(steps=[step(60, True), step(300, False)]),
        SimpleNamespace(steps=[step(40, True)]),
    ]
    assert Speeds(10, 100, 20).estimate(shards) == {"wall_s": 20, "compute_s": 13, "write_s": 20}
    assert Speeds(10, 100, 1000).estimate(shards)["wall_s"] == 13
    assert Speeds(None, 100, 20).estimate(shards) is None
    assert Speeds(None, 100, 20).estimate([SimpleNamespace(steps=[step(300, False)])])["compute_s"] == 3


def test_the_probe_is_short(tmp_path, monkeypatch):
    """Of a weight that takes long it makes some tiles, and of a disk it leaves no file."""
    tensors = checkpoint_tensors(hidden=1024, n_layers=1)
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors, config=CONFIG | {"vocab_size": 2048})
    adapter = write_told_adapter(tmp_path / "adapter", adapter_tensors(tensors))
    made = []
    real = probe._Stopwatch.write

    def write(self, tensor, offset, data):
        self._began -= 0.05
        real(self, tensor, offset, data)
        made.append(len(data))

    monkeypatch.setattr(probe._Stopwatch, "write", write)
    before = files_of(tmp_path)
    plan = lorafuse.convert(ckpt, adapter, tmp_path / "out", dry_run=True)
    assert plan["estimate"]["compute_s"] > 0
    assert sum(made) < plan["nbytes"] and len(made) <= 8
    assert files_of(tmp_path) == before


def test_a_disk_that_does_not_tell(inputs, monkeypatch):
    assert write_rate("memory://x") is None

    def refused(path, flags, mode=0o777):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "open", refused)
    assert write_rate(str(inputs[2])) is None
