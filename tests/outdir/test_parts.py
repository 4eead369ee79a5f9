"""One result that several workers make: each some of its files, in any order, cut off at any moment; what is
committed is byte for byte what one run makes. The workers of the tests are calls in this process, but where
they have to be at work at the same time."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from build import files_of
from click.testing import CliRunner
from faults import Disk, Killed
from scenario import N_SHARDS, SHARD, Work, content

import lorafuse
from lorafuse import cli
from lorafuse.errors import HeldError, OutDirError, StorageError, UsageError
from lorafuse.outdir.clean import left
from lorafuse.planning.parts import divided
from lorafuse.planning.plan import PlannedShard

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lorafuse.__file__).parents[1])}


@pytest.fixture
def out(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "out"


def call(inputs, out, **options):
    """Returns the files that the call made."""
    events = []
    lorafuse.convert(*inputs, out, on_event=events.append, **{"max_shard_size": SHARD} | options)
    return [event["file"] for event in events if event["event"] == "shard"]


def beside(out):
    return sorted(path.name for path in out.parent.iterdir())


# ---- who makes what


class Sized(PlannedShard):
    def __init__(self, file, nbytes):
        super().__init__(file, [])
        self.size = nbytes

    nbytes = property(lambda self: self.size)


@pytest.mark.parametrize("of", [1, 2, 3, 7, 40])
def test_every_file_falls_to_one_worker_and_sizes_are_close(of):
    sizes = [(i * 7919) % 50 + 1 for i in range(29)]
    shards = [Sized(f"{i:02}", nbytes) for i, nbytes in enumerate(sizes)]
    parts = divided(shards, of)
    assert len(parts) == of
    assert sorted(shard.file for part in parts for shard in part) == [shard.file for shard in shards]
    loads = [sum(shard.nbytes for shard in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes)
    assert divided(list(reversed(shards)), of) == parts


# ---- the same bytes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_parts_in_any_order(order, inputs, clean, out):
    made = [file for index in order for file in call(inputs, out, index=index, of=3)]
    assert len(made) == len({*made}) == N_SHARDS and not out.exists()
    assert call(inputs, out, commit=True) == []
    assert content(out) == clean and beside(out) == ["out"]


@pytest.mark.parametrize("of", [1, 5, 9])
def test_more_workers_than_files(of, inputs, clean, out):
    """Some have nothing to do."""
    for index in range(of):
        call(inputs, out, index=index, of=of)
    call(inputs, out, commit=True)
    assert content(out) == clean and beside(out) == ["out"]


CASES = {
    "nf4, dense": ("nf4_dq", {}, {}),
    "nf4, light": ("nf4_dq", {}, {"format": "light"}),
    "int8, base": ("int8", {}, {"format": "base"}),
    "anew, nf4": ("bf16", {}, {"format": "nf4"}),
    "anew, w4a16": ("bf16", {}, {"format": "w4a16"}),
    "as trained": ("bf16", {}, {"base_quant": "nf4"}),
    "tied, both sides": ("bf16_tied", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "DoRA": ("nf4_dq", {"use_dora": True}, {}),
    "VeRA-like shares": ("bf16", {"target_modules": "all-linear", "r": 8}, {"dtype": "float32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_models_of_many_kinds(case, base, adapter, tmp_path):
    kind, settings, options = CASES[case]
    inputs, options = (base(kind), adapter(kind, **settings)), options | {"max_shard_size": "30KB"}
    call(inputs, tmp_path / "alone", **options)
    for index in (1, 0):
        assert call(inputs, tmp_path / "out", index=index, of=2, **options)
    call(inputs, tmp_path / "out", commit=True, **options)
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_a_mount_point_and_one_that_is_overwritten(inputs, clean, tmp_path, monkeypatch):
    for way in ("inside", "exchange"):
        work = Work(way, inputs, tmp_path / way, monkeypatch)
        for index in (0, 1):
            work.again(index=index, of=2)
            assert not work.check_untouched(clean) if way == "exchange" else beside(work.out) == ["out"]
        work.again(commit=True)
        work.check_finished(clean)
        monkeypatch.undo()


def test_of_a_base_on_the_hub_and_onto_it(hub, inputs, clean, tmp_path):
    """Each worker fetches what it needs; the commit pushes all."""
    hub.add("org/base", inputs[0])
    for index in (1, 0):
        assert call(("org/base", inputs[1]), tmp_path / "out", index=index, of=2, stream=True)
    call(("org/base", inputs[1]), tmp_path / "out", commit=True, push_to_hub="me/merged")
    weights = {name for name in clean if name.startswith("model-")}
    found = content(tmp_path / "out")
    assert {name: found[name] for name in weights} == {name: clean[name] for name in weights}
    pushed = hub.repos["me/merged"]
    there = files_of(pushed.path(pushed.refs["main"]))
    assert {name: there[name] for name in weights} == {name: clean[name] for name in weights}


def test_a_directory_by_its_url(inputs, clean, out):
    for index in (0, 1):
        assert call(inputs, f"file://{out}", index=index, of=2)
    assert call(inputs, out, commit=True) == []
    assert content(out) == clean and beside(out) == ["out"]


# ---- cut off


def test_a_worker_killed_before_any_call(inputs, clean, out, monkeypatch):
    """Run again, it makes what is missing, and nothing that others make."""
    disk = Disk(monkeypatch)
    for number in range(1, 1000, 3):
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        disk.kill_at(number)
        try:
            with disk.watched():
                call(inputs, out, index=0, of=2)
            break
        except Killed:
            disk.dead = False
        n_made = sum(len(call(inputs, out, index=index, of=2)) for index in (0, 1))
        assert n_made <= N_SHARDS and not out.exists()
        call(inputs, out, commit=True)
        assert content(out) == clean and beside(out) == ["out"]
    assert number > 20


@pytest.mark.parametrize("then", ["commit", "worker, commit", "one run"])
def test_a_commit_killed_before_any_call(then, inputs, clean, out, tmp_path, monkeypatch):
    """Nothing is made again, whatever comes next."""
    disk, made = Disk(monkeypatch), tmp_path / "made"
    for index in (0, 1, 2):
        call(inputs, out, index=index, of=3)
    shutil.copytree(out.parent, made)
    for number in range(1 + len(then) % 3, 1000, 3):
        shutil.rmtree(out.parent)
        shutil.copytree(made, out.parent)
        disk.kill_at(number)
        try:
            with disk.watched():
                call(inputs, out, commit=True)
            break
        except Killed:
            disk.dead = False
        if not out.exists():
            if then == "worker, commit":
                assert call(inputs, out, index=1, of=3) == []
            assert call(inputs, out, commit=then != "one run") == []
        assert content(out) == clean
    assert number > 30


def test_one_run_takes_what_workers_have_made(inputs, clean, out):
    made = call(inputs, out, index=1, of=2)
    rest = call(inputs, out)
    assert sorted([*made, *rest]) == sorted(file for file in clean if file.startswith("model-"))[:N_SHARDS]
    assert content(out) == clean and beside(out) == ["out"]


def test_what_workers_left_is_told_and_removed(inputs, out):
    made = call(inputs, out, index=1, of=2)
    (folder,) = out.parent.glob(".out.lorafuse.1of2-*")
    (folder / "out/model-9.safetensors.part").write_bytes(b"12")
    (folder / "base").mkdir()
    (folder / "base/model.safetensors").write_bytes(b"12")
    told = sorted((piece.what, piece.name) for piece in left(str(out)))
    assert told == [
        ("base", f"{folder.name}/base/model.safetensors"),
        *(("finished", f"{folder.name}/out/{file}") for file in sorted(made)),
        ("journal", f"{folder.name}/journal.jsonl"),
        ("unfinished", f"{folder.name}/out/model-9.safetensors.part"),
    ]
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 7300,) * 2)
    said = CliRunner().invoke(cli.lorafuse, ["clean", str(out)]).output.splitlines()
    assert len(said) == len(told) + 1 and all(line.endswith("  (2 hours ago)") for line in said[:-1])
    assert beside(out) == []


# ---- refused


def refused(error, inputs, out, **options):
    with pytest.raises(error) as caught:
        call(inputs, out, **options)
    return str(caught.value)


def test_a_commit_before_all_parts_are_made(inputs, clean, out):
    """Nothing is lost, and the message names the files."""
    assert "5 of 5 files" in refused(StorageError, inputs, out, commit=True)
    made = call(inputs, out, index=1, of=2)
    message = refused(StorageError, inputs, out, commit=True)
    lacking = sorted({file for file in clean if file.startswith("model-")} - {*made})
    assert f"{N_SHARDS - len(made)} of {N_SHARDS} files" in message and lacking[0] in message
    assert not out.exists() and call(inputs, out, index=1, of=2) == []
    call(inputs, out, index=0, of=2)
    call(inputs, out, commit=True)
    assert content(out) == clean


def test_a_file_that_was_damaged(inputs, clean, out):
    """It is not committed, and its worker makes it again."""
    for index in (0, 1):
        call(inputs, out, index=index, of=2)
    (first, *_) = sorted(out.parent.glob(".out.lorafuse.0of2-*/out/*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    assert first.name in refused(StorageError, inputs, out, commit=True)
    assert call(inputs, out, index=0, of=2) == [first.name]
    call(inputs, out, commit=True)
    assert content(out) == clean


def test_workers_of_other_commands(inputs, clean, out):
    call(inputs, out, index=0, of=2)
    assert "adapter_scale was 1.0, is 0.5" in refused(
        OutDirError, inputs, out, index=1, of=2, adapter_scale=0.5
    )
    assert "in 2 parts, not in 3" in refused(OutDirError, inputs, out, index=1, of=3)
    assert "adapter_scale" in refused(OutDirError, inputs, out, index=0, of=2, adapter_scale=0.5)
    assert "adapter_scale" in refused(OutDirError, inputs, out, commit=True, adapter_scale=0.5)
    call(inputs, out, index=1, of=2)
    call(inputs, out, commit=True)
    assert content(out) == clean


def test_an_adapter_that_changed_between_the_workers(inputs, out):
    call(inputs, out, index=0, of=2)
    config = inputs[1] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 4}))
    assert "adapter_config.json changed" in refused(OutDirError, inputs, out, index=1, of=2)
    for index in (0, 1):
        call(inputs, out, index=index, of=2, restart=True)
    call(inputs, out, commit=True)
    lorafuse.verify(out, ckpt=inputs[0], adapters=[inputs[1]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"index": 0}, "go together"),
        ({"of": 2}, "go together"),
        ({"index": 2, "of": 2}, "expected 0 to 1"),
        ({"index": -1, "of": 2}, "expected 0 to 1"),
        ({"index": 0, "of": 0}, "at least 1"),
        ({"index": 0, "of": True}, "a whole number"),
        ({"index": 0, "of": 2, "commit": True}, "without index and of"),
        ({"commit": True, "restart": True}, "restart=True discards"),
        ({"index": 0, "of": 2, "card": True}, "give them with commit"),
        ({"index": 0, "of": 2, "push_to_hub": "me/merged"}, "give them with commit"),
    ],
)
def test_options_that_contradict_each_other(options, words, inputs, out):
    assert words in refused(UsageError, inputs, out, **options)
    assert beside(out) == []


@pytest.mark.usefixtures("object_store")
def test_a_place_that_workers_cannot_share(inputs):
    for options in ({"index": 0, "of": 2}, {"commit": True}):
        assert "memory://" in refused(UsageError, inputs, "memory://out", **options)


HOLD = """
import sys, time, lorafuse
def wait(event):
    if event["event"] == "progress":  # before its file is finished
        print("at work", flush=True)
        time.sleep(60)
lorafuse.convert(*sys.argv[1:4], max_shard_size=sys.argv[4], on_event=wait, **eval(sys.argv[5]))
"""


@pytest.fixture
def at_work(inputs, out):
    """at_work(**options): a process that holds what a call with these options holds."""
    processes = []

    def begin(**options):
        command = [sys.executable, "-c", HOLD, *map(str, inputs), str(out), SHARD, repr(options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        processes.append(process)
        assert process.stdout.readline() == "at work\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_workers_never_make_the_same_part(inputs, clean, out, at_work):
    """Others may be at work beside; one run alone, and a commit, may not."""
    worker = at_work(index=0, of=2)
    assert "another run is making part 0 of 2" in refused(HeldError, inputs, out, index=0, of=2)
    refused(HeldError, inputs, out, commit=True)
    refused(HeldError, inputs, out)
    assert call(inputs, out, index=1, of=2)
    worker.kill()
    worker.wait()
    refused(StorageError, inputs, out, commit=True)
    call(inputs, out, index=0, of=2)
    call(inputs, out, commit=True)
    assert content(out) == clean and beside(out) == ["out"]


def test_no_worker_begins_beside_one_run(inputs, out, at_work):
    at_work()
    refused(HeldError, inputs, out, index=0, of=2)


def test_workers_at_the_same_time(inputs, clean, out):
    command = [sys.executable, "-m", "lorafuse", "convert", "-q", *map(str, inputs), str(out)]
    command += ["--max-shard-size", SHARD, "--of", "2", "--index"]
    workers = [subprocess.Popen([*command, str(index)], env=ENVIRONMENT) for index in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    call(inputs, out, commit=True)
    assert content(out) == clean


def test_what_a_worker_says(inputs, out):
    """Its plan is that of its part; a dry run shows all parts."""
    events = []
    part = lorafuse.convert(*inputs, out, max_shard_size=SHARD, index=1, of=2, on_event=events.append)
    (plan,) = [event for event in events if event["event"] == "plan"]
    made = [event["file"] for event in events if event["event"] == "shard"]
    assert plan["part"] == {"index": 1, "of": 2} and [shard["file"] for shard in plan["shards"]] == sorted(
        made
    )
    assert sum(event["nbytes"] for event in events if event["event"] == "progress") == plan["nbytes"]
    assert (part["n_shards"], part["nbytes"]) == (len(made), plan["nbytes"]) and events[-1] == part
    planned = lorafuse.convert(*inputs, out, max_shard_size=SHARD, of=2, dry_run=True)
    assert planned["parts"][1] == {"files": sorted(made), "nbytes": plan["nbytes"]}
    assert len(planned["shards"]) == N_SHARDS
