"""`lorafuse batch`: every result is what a single run makes, in as few passes as fit, whatever happens to one
of the jobs."""

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from build import adapter_tensors, checkpoint_tensors, files_of, write_adapter, write_checkpoint
from models import LINEARS

import lorafuse
from lorafuse.batching import passes
from lorafuse.codecs import open_weights
from lorafuse.codecs.bnb4 import FourBitSources
from lorafuse.errors import AdapterError, CheckpointError, OutDirError, ResultError, StorageError, UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_file import Shard
from lorafuse.inputs import hashes
from lorafuse.inputs import unchanged as inputs
from lorafuse.outdir.staging import LocalOutDir
from lorafuse.patches.lowrank import LowRank
from lorafuse.planning.memory import RUNTIME_NBYTES

RECEIPT = "lorafuse_receipt.json"
KINDS = {
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "plain": {"target_modules": LINEARS},
    "rank8": {"target_modules": ["down_proj"], "r": 8, "use_rslora": True},
}
SHARDS = {"max_shard_size": "20KB"}


class Runner:
    """Calls lorafuse.batch and keeps its events."""

    def __call__(self, *args, **options):
        self.events = []
        self.states = lorafuse.batch(*args, on_event=self.events.append, **options)
        return {state.name: state.state for state in self.states}

    @property
    def passes(self):
        return [event["jobs"] for event in self.events if event["event"] == "pass"]

    def error(self, name):
        return next(state.error for state in self.states if state.name == name)


@pytest.fixture
def run():
    return Runner()


@pytest.fixture
def ckpt(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", n_shards=2)


@pytest.fixture
def jobs(tmp_path):
    """Four adapters for one weight each, all of them the same one."""
    for i, name in enumerate("abcd"):
        tensors = {
            k: t * (i + 1)
            for k, t in adapter_tensors(checkpoint_tensors()).items()
            if "layers.0" in k and "q_proj" in k
        }
        write_adapter(tmp_path / "jobs" / name, tensors, target_modules=["q_proj"], layers_to_transform=[0])
    return tmp_path / "jobs"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def contents(out_dir):
    """All files, the receipt without what differs from run to run."""
    files = files_of(out_dir)
    receipt = json.loads(files[RECEIPT])
    return files | {RECEIPT: {k: v for k, v in receipt.items() if k not in ("timing", "peak_rss", "tool")}}


def assert_as_alone(ckpt, jobs, out, alone, names, **options):
    """Each result has the bytes of a single run."""
    for name in names:
        lorafuse.convert(ckpt, jobs / name, alone / name, **options)
        assert contents(out / name) == contents(alone / name), name


def assert_nothing_hidden(out):
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


# ---- equality


@pytest.mark.parametrize(("kind", "dtype"), [("nf4_dq", "auto"), ("bf16", "float16"), ("int8", "auto")])
def test_each_result_is_that_of_a_single_run(kind, dtype, base, adapter, run, out, tmp_path):
    for name, settings in KINDS.items():
        adapter(kind, name=f"jobs/{name}", **settings)
    assert run(base(kind), tmp_path / "jobs", out, dtype=dtype, **SHARDS) == dict.fromkeys(KINDS, "done")
    assert run.passes == [sorted(KINDS)]
    assert_as_alone(base(kind), tmp_path / "jobs", out, tmp_path / "alone", KINDS, dtype=dtype, **SHARDS)
    assert_nothing_hidden(out)


@pytest.mark.parametrize("quant", [{"base_quant": "nf4"}, {"base_quant": "int8", "quant_skip": ("mlp",)}])
def test_a_base_as_training_saw_it(quant, base, adapter, run, out, tmp_path, monkeypatch):
    """Quantized once for all, as in a single run; another quantization is another result."""
    for name in ("dora", "plain"):
        adapter("bf16", name=f"jobs/{name}", **KINDS[name])
    assert run(base("bf16"), tmp_path / "jobs", out, **quant, **SHARDS) == {"dora": "done", "plain": "done"}
    assert_as_alone(
        base("bf16"), tmp_path / "jobs", out, tmp_path / "alone", ("dora", "plain"), **quant, **SHARDS
    )
    assert run(base("bf16"), tmp_path / "jobs", out, **quant, **SHARDS) == {
        "dora": "skipped",
        "plain": "skipped",
    }
    assert run(base("bf16"), tmp_path / "jobs", out, **SHARDS) == {"dora": "failed", "plain": "failed"}


def test_scale_and_dtype_of_a_job(ckpt, jobs, run, out, tmp_path):
    """Those of a line take the place of the call's; relative paths start at the file."""
    lines = [
        {"adapter": "jobs/a", "name": "as-called"},
        {"adapter": str(jobs / "a"), "name": "own", "scale": -2, "dtype": "float32"},
        {"adapter": "jobs/a", "name": "half", "scale": 0.5},
    ]
    (tmp_path / "list.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    run(ckpt, tmp_path / "list.jsonl", out, dtype="float16", adapter_scale=3.0)
    assert len(run.passes) == 1
    for name, dtype, scale in (
        ("as-called", "float16", 3.0),
        ("own", "float32", -2.0),
        ("half", "float16", 0.5),
    ):
        lorafuse.convert(ckpt, jobs / "a", tmp_path / name, dtype=dtype, adapter_scale=scale)
        assert contents(out / name) == contents(tmp_path / name)


# ---- how many jobs a pass takes


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_size_of_a_pass_changes_a_byte(most, ckpt, jobs, run, out, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "MAX_MEMBERS", most)
    run(ckpt, jobs, out, max_shard_size="1KB")
    assert [len(names) for names in run.passes] == {1: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1]}[most]
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "abcd", max_shard_size="1KB")


def test_the_memory_limit_decides(ckpt, jobs, run, out, tmp_path):
    """Each job costs memory: with every step down of the limit a pass takes fewer, and at last none."""
    sizes = {}
    least = RUNTIME_NBYTES // 1000
    for limit in range(least + 5000, least, -80):
        run(ckpt, jobs, out, memory_limit=f"{limit}KB", dry_run=True)
        sizes[limit] = max(map(len, run.passes), default=0)
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert {4, 2, 1, 0} <= {*sizes.values()}
    two = max(limit for limit, size in sizes.items() if size == 2)
    assert set(run(ckpt, jobs, out, memory_limit=f"{two}KB").values()) == {"done"}
    assert [len(names) for names in run.passes] == [2, 2]
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "abcd")
    n_open = len(os.listdir("/proc/self/fd"))
    none = max(limit for limit, size in sizes.items() if size == 0)  # enough for a run alone
    run(ckpt, jobs, tmp_path / "none", memory_limit=f"{none}KB")
    assert len(os.listdir("/proc/self/fd")) == n_open
    assert {type(state.error) for state in run.states} == {UsageError}


def test_more_jobs_must_be_worth_the_workers_that_they_cost():
    """The speed of a pass falls when the memory of one job more was that of half the workers."""
    fast, slow = SimpleNamespace(n_workers=4), SimpleNamespace(n_workers=2)
    assert passes.speed(slow, 3) < passes.speed(fast, 2) < passes.speed(fast, 3)


def test_progress_reaches_what_the_pass_said(ckpt, jobs, run, out, tmp_path):
    """Also where another process finishes a result, right after, with files that these jobs need."""
    (tmp_path / "others").mkdir()
    (jobs / "d").rename(tmp_path / "others/d")
    run(ckpt, tmp_path / "others", tmp_path / "before", max_shard_size="4KB")
    events = []

    def on_event(event):
        events.append(event)
        if event["event"] == "pass":
            shutil.copytree(tmp_path / "before/d", out / "d")

    lorafuse.batch(ckpt, jobs, out, on_event=on_event, max_shard_size="4KB")
    (said,) = (event["nbytes"] for event in events if event["event"] == "pass")
    assert sum(event["nbytes"] for event in events if event["event"] == "progress") == said
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "abc", max_shard_size="4KB")


def test_open_files_decide(ckpt, jobs, run, out):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd")) + 2  # of the checkpoint
    room = passes.SPARE_FILES + 2 * (passes.MEMBER_FILES + 1) + 1
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + room, hard))
        assert set(run(ckpt, jobs, out, max_shard_size="1KB").values()) == {"done"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(names) for names in run.passes] == [2, 2]


def test_the_disk_decides(ckpt, jobs, run, out, monkeypatch):
    run(ckpt, jobs, out, dry_run=True)
    nbytes = next(event["nbytes"] for event in run.events if event["event"] == "plan")
    free = 3 * nbytes
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1, f_files=0)
    )
    run(ckpt, jobs, out)
    assert run.passes == [["a", "b", "c"], ["d"]]
    free = nbytes - 1
    with pytest.raises(StorageError, match=r"KB are needed for a, .* KB are free"):
        run(ckpt, jobs, out.with_name("full"))
    assert not out.with_name("full").exists()


def test_a_job_that_waits_for_the_next_pass_is_announced_once(ckpt, jobs, run, out, monkeypatch):
    for name in "abcd":
        (jobs / name).rename(jobs / "inner")
        (jobs / name).mkdir()
        (jobs / "inner").rename(jobs / name / "inner")
    run(ckpt, jobs, out, dry_run=True)
    free = 3 * next(event["nbytes"] for event in run.events if event["event"] == "plan")
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1, f_files=0)
    )
    run(ckpt, jobs, out)
    assert run.passes == [["a", "b", "c"], ["d"]]
    for kind in ("warning", "plan"):
        assert [event["job"] for event in run.events if event["event"] == kind] == list("abcd")


def test_the_checkpoint_is_hashed_once_and_weights_decoded_once_a_pass(
    base, adapter, run, out, tmp_path, monkeypatch
):
    for name, settings in KINDS.items():
        adapter("nf4_dq", name=f"jobs/{name}", **settings)
    paths, n_decoded = [], 0
    hash_file, decode = hashes.checked_hash, FourBitSources.decode_and_keep

    def count(self, raw, box, arena):
        nonlocal n_decoded
        n_decoded += box.numel
        return decode(self, raw, box, arena)

    for module in (hashes, inputs):
        monkeypatch.setattr(
            module,
            "checked_hash",
            lambda folder, name, *go_on: paths.append(Path(folder / name)) or hash_file(folder, name, *go_on),
        )
    monkeypatch.setattr(FourBitSources, "decode_and_keep", count)
    monkeypatch.setattr(passes, "MAX_MEMBERS", 2)
    run(base("nf4_dq"), tmp_path / "jobs", out, **SHARDS)
    assert len(run.passes) == 2
    # Each job looks at the small config.json of the checkpoint too, to know it again.
    hashed = [path for path in paths if out not in path.parents and path != base("nf4_dq") / "config.json"]
    assert sorted(hashed) == sorted({*hashed}) and len(hashed) == 2 + 4 * 2
    assert paths.count(base("nf4_dq") / "config.json") == 1 + 4
    sizes = torch.tensor(
        [
            s.spec.numel
            for s in open_weights(Checkpoint(LocalFolder(base("nf4_dq")))).values()
            if isinstance(s, FourBitSources)
        ]
    )
    # DoRA reads its weights once more, for their norms.
    assert sizes.sum() < n_decoded <= 2 * sizes.sum() + 2 * 64 * 64


# ---- a job that fails


def test_an_adapter_that_cannot_be_planned(ckpt, jobs, run, out, tmp_path):
    (jobs / "b" / "adapter_config.json").write_text("{}")
    (jobs / "empty").mkdir()
    (jobs / ".hidden").mkdir()
    (jobs / "a-file").write_text("")
    states = run(ckpt, jobs, out)
    assert states == {"a": "done", "b": "failed", "c": "done", "d": "done", "empty": "failed"}
    assert isinstance(run.error("b"), AdapterError) and "has no peft_type" in str(run.error("b"))
    assert "is no PEFT adapter" in str(run.error("empty"))
    assert sorted(path.name for path in out.iterdir()) == ["a", "c", "d"]
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "acd")


@pytest.mark.parametrize(
    "error", [AdapterError("no good"), RuntimeError("\x1bno good")], ids=["own", "unforeseen"]
)
@pytest.mark.parametrize("where", ["prepare", "apply"])
@pytest.mark.parametrize("victim", ["a", "c"])
def test_an_adapter_that_fails_in_the_loop(where, victim, error, ckpt, jobs, run, out, tmp_path, monkeypatch):
    """The first one makes what all have in common; it is made nevertheless."""
    lines = [
        {"adapter": str(jobs / name), "name": name} | ({"scale": 7.0} if name == victim else {})
        for name in "abcd"
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    work = getattr(LowRank, where)

    def refuse(self, *args):
        if self.scale == 7.0 * 2:
            raise error
        return work(self, *args)

    monkeypatch.setattr(LowRank, where, refuse)
    states = run(ckpt, tmp_path / "list.jsonl", out, max_shard_size="1KB")
    assert states == {name: "failed" if name == victim else "done" for name in "abcd"}
    unforeseen = "RuntimeError: \\x1bno good. Nobody foresaw this error: please report it."
    assert str(run.error(victim)) == ("no good" if isinstance(error, AdapterError) else unforeseen)
    assert len(run.passes) == 1
    assert not (out / victim).exists()
    assert_nothing_hidden(out)
    monkeypatch.undo()
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", set("abcd") - {victim}, max_shard_size="1KB")


def test_a_sum_that_overflows(ckpt, jobs, run, out):
    tensors = {
        k: t * 1e4
        for k, t in adapter_tensors(checkpoint_tensors()).items()
        if "layers.0" in k and "q_proj" in k
    }
    write_adapter(jobs / "huge", tensors, target_modules=["q_proj"], layers_to_transform=[0])
    states = run(ckpt, jobs, out, dtype="float16", max_shard_size="1KB")
    assert [name for name, state in states.items() if state == "failed"] == ["huge"]
    assert isinstance(run.error("huge"), ResultError)


def test_a_weight_that_overflows_where_it_is_not_replaced(jobs, run, out, tmp_path):
    """It fails the jobs that take it from the base; one that waited for another file of theirs is made in a
    further pass."""
    tensors = checkpoint_tensors(torch.float32)
    tensors["model.layers.0.input_layernorm.weight"][0] = 1e30
    ckpt = write_checkpoint(tmp_path / "wide", tensors)
    kept = {k: t for k, t in adapter_tensors(tensors).items() if "layers.0" in k and "q_proj" in k}
    kept["base_model.model.model.layers.0.input_layernorm.weight"] = torch.ones(16)
    write_adapter(
        jobs / "z",
        kept,
        target_modules=["q_proj"],
        layers_to_transform=[0],
        modules_to_save=["input_layernorm"],
    )
    states = run(ckpt, jobs, out, dtype="float16", max_shard_size="1KB")
    assert states == dict.fromkeys("abcd", "failed") | {"z": "done"}
    assert {type(run.error(name)) for name in "abcd"} == {ResultError}
    assert run.passes[-1] == ["z"]
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "z", dtype="float16", max_shard_size="1KB")


@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_a_read_error(whose, ckpt, jobs, run, out, tmp_path, monkeypatch):
    """Of an adapter, it ends its job; of the base, the call, but what is finished stays."""
    whole = {
        f"base_model.model.{k}": t for k, t in checkpoint_tensors().items() if k.endswith("lm_head.weight")
    }
    write_adapter(jobs / "z", whole, target_modules=[], modules_to_save=["lm_head"])
    monkeypatch.setattr(passes, "MAX_MEMBERS", 4)
    read = Shard.read_into
    n_reads = 0

    def fail(self, info, start, buffer):
        nonlocal n_reads
        n_reads += Path(self.label).parent == ckpt
        if (
            Path(self.label).parent == jobs / "z"
            if whose == "adapter"
            else (out / "d").exists() and Path(self.label).parent == ckpt
        ):
            raise StorageError("no such block")
        read(self, info, start, buffer)

    monkeypatch.setattr(Shard, "read_into", fail)
    if whose == "base":
        with pytest.raises(StorageError, match="no such block"):
            run(ckpt, jobs, out)
    else:
        assert run(ckpt, jobs, out) == dict.fromkeys("abcd", "done") | {"z": "failed"}
    assert sorted(path.name for path in out.iterdir()) == list("abcd")


def test_a_full_disk_ends_the_call(ckpt, jobs, run, out, monkeypatch):
    monkeypatch.setattr(passes, "MAX_MEMBERS", 2)
    write = os.pwrite

    def full(fd, data, at):
        if (out / "b").exists() and os.readlink(f"/proc/self/fd/{fd}").endswith(".part"):
            monkeypatch.setattr(
                os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096, f_blocks=1, f_files=0)
            )
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError) as caught:
        run(ckpt, jobs, out)
    message, missing = str(caught.value), int(re.search(r"full; (\d+) bytes", str(caught.value))[1])
    way_on = "Give the same command again when that is mended."
    assert message == f"{out}: the file system is full; {missing} bytes more than it has are needed. {way_on}"
    files = [path.stat().st_size for name in "ab" for path in (out / name).iterdir()]
    assert sum(files) < missing < sum(files) + 600_000
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == ["a", "b"]
    monkeypatch.undo()
    assert run(ckpt, jobs, out) == {"a": "skipped", "b": "skipped", "c": "done", "d": "done"}


def test_a_tokenizer_that_leads_out_of_its_directory(ckpt, jobs, run, out, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (jobs / "b" / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert run(ckpt, jobs, out) == {"a": "done", "b": "failed", "c": "done", "d": "done"}
    assert isinstance(run.error("b"), CheckpointError) and "outside its directory" in str(run.error("b"))


# ---- a second call


def test_a_second_call_makes_only_what_is_missing(ckpt, jobs, run, out, tmp_path, monkeypatch):
    run(ckpt, jobs, out, max_shard_size="1KB")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "/b" not in str(path)}
    for path in (out / "b").iterdir():
        path.unlink()
    (out / "b").rmdir()
    states = run(ckpt, jobs, out, max_shard_size="1KB")
    assert states == {"a": "skipped", "b": "done", "c": "skipped", "d": "skipped"}
    assert run.passes == [["b"]]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "abcd", max_shard_size="1KB")
    # Its common files are those of the others, not of the checkpoint.
    files = {path.name for path in (out / "a").glob("*.safetensors")}
    same = {name for name in files if (out / "a" / name).samefile(out / "b" / name)}
    assert len(files - same) == 1
    assert set(run(ckpt, jobs, out, max_shard_size="1KB").values()) == {"skipped"} and run.passes == []


def test_a_result_of_something_else_is_not_taken_for_it(ckpt, jobs, run, out, tmp_path):
    run(ckpt, jobs, out)
    write_adapter(tmp_path / "other", {k: t * 2 for k, t in adapter_tensors(checkpoint_tensors()).items()})
    os.replace(tmp_path / "other" / "adapter_model.safetensors", jobs / "a" / "adapter_model.safetensors")
    os.truncate(out / "b" / "model.safetensors", 100)
    (out / "c" / RECEIPT).unlink()
    receipt = json.loads((out / "d" / RECEIPT).read_text())
    (out / "d" / RECEIPT).write_text(json.dumps(receipt | {"tool": receipt["tool"] | {"version": "0"}}))
    before = files_of(out)
    assert run(ckpt, jobs, out) == dict.fromkeys("abcd", "failed")
    assert {type(state.error) for state in run.states} == {OutDirError}
    reasons = {
        "a": "the receipt names another adapter, or the adapter has changed since",
        "b": "model.safetensors is not the file that its receipt describes",
        "c": "holds no lorafuse_receipt.json",
        "d": "another version of lorafuse made it",
    }
    for name, reason in reasons.items():
        assert (
            str(run.error(name))
            == f"{out / name}: exists, but {reason}; overwrite=True replaces it once the new one is complete."
        )
    assert files_of(out) == before
    os.truncate(jobs / "a" / "adapter_config.json", 0)  # an adapter that is broken now costs no result
    assert run(ckpt, jobs, out, overwrite=True) == {"a": "failed", "b": "done", "c": "done", "d": "done"}
    assert (out / "a" / "model.safetensors").read_bytes() == before["a/model.safetensors"]
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "bcd")


def test_other_settings_or_another_checkpoint(ckpt, jobs, run, out, tmp_path):
    run(ckpt, jobs, out)
    run(ckpt, jobs, out, dtype="float16", adapter_scale=2.0)
    assert "exists, but was made with other settings (adapter_scale, dtype); overwrite=True" in str(
        run.error("a")
    )
    other = write_checkpoint(
        tmp_path / "other", {k: t + 1 for k, t in checkpoint_tensors().items()}, n_shards=2
    )
    run(other, jobs, out)
    assert "the receipt names another checkpoint, or it has changed since" in str(run.error("a"))
    assert run(ckpt, jobs, out, overwrite=True) == dict.fromkeys("abcd", "skipped")


def test_an_interrupted_call_keeps_what_is_finished(ckpt, jobs, run, out, monkeypatch):
    monkeypatch.setattr(passes, "MAX_MEMBERS", 2)

    prepare = LowRank.prepare

    def interrupt(self, *args):
        if (out / "a").exists():
            raise KeyboardInterrupt
        prepare(self, *args)

    monkeypatch.setattr(LowRank, "prepare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(ckpt, jobs, out)
    monkeypatch.undo()
    assert run(ckpt, jobs, out) == {"a": "skipped", "b": "skipped", "c": "done", "d": "done"}


# ---- the list and the places


def test_shares_are_made_apart(ckpt, jobs, run, out):
    """Three workers: each job is done by one of them, none twice."""
    names = [list(run(ckpt, jobs, out, index=i, of=3)) for i in range(3)]
    assert names == [["a", "d"], ["b"], ["c"]]
    assert run(ckpt, jobs, out, index=4, of=9) == {}
    assert set(run(ckpt, jobs, out).values()) == {"skipped"}


def test_results_never_take_the_place_of_inputs(ckpt, jobs, run, tmp_path):
    before = files_of(tmp_path)
    with pytest.raises(OutDirError, match="the result a would take the place of the input"):
        run(ckpt, jobs, jobs, overwrite=True)
    for inside in (ckpt, ckpt / "deep" / "er"):
        with pytest.raises(OutDirError, match="is or lies inside the input"):
            run(ckpt, jobs, inside, overwrite=True)
    (tmp_path / "list.jsonl").write_text(json.dumps({"adapter": "jobs/a", "name": "ckpt"}))
    with pytest.raises(OutDirError, match="the result ckpt would take the place of the input"):
        run(ckpt, tmp_path / "list.jsonl", tmp_path, overwrite=True)
    (tmp_path / "list.jsonl").unlink()
    with pytest.raises(OutDirError, match="exists and is not a directory"):
        run(ckpt, jobs, ckpt / "config.json")
    assert files_of(tmp_path) == before


def test_results_may_lie_beside_the_checkpoint(ckpt, jobs, run, tmp_path):
    assert set(run(ckpt, jobs, tmp_path).values()) == {"done"}


def test_a_bad_checkpoint_ends_the_call(ckpt, jobs, run, out):
    (ckpt / "config.json").unlink()
    with pytest.raises(CheckpointError):
        run(ckpt, jobs, out)
    assert not out.exists()


def test_a_dry_run_writes_nothing(ckpt, jobs, run, out, tmp_path):
    (jobs / "b" / "adapter_config.json").write_text("{}")
    before = files_of(tmp_path)
    assert run(ckpt, jobs, out, dry_run=True) == {
        "a": "planned",
        "b": "failed",
        "c": "planned",
        "d": "planned",
    }
    assert files_of(tmp_path) == before and not out.exists()


# ---- values


def test_an_adapter_that_is_not_finite_fails_alone(run, ckpt, jobs, out):
    """While planning, before a pass is put together."""
    tensors = {
        k: t * float("nan")
        for k, t in adapter_tensors(checkpoint_tensors()).items()
        if "layers.0" in k and "q_proj" in k
    }
    shutil.rmtree(jobs / "b")
    write_adapter(jobs / "b", tensors, target_modules=["q_proj"], layers_to_transform=[0])
    assert run(ckpt, jobs, out) == {"a": "done", "b": "failed", "c": "done", "d": "done"}
    assert isinstance(run.error("b"), AdapterError) and "values of" in str(run.error("b"))
    assert run.passes == [["a", "c", "d"]]
    assert_nothing_hidden(out)


def test_values_of_the_base_that_are_not_finite(run, jobs, out, tmp_path):
    """Every job whose weights have them fails, unless they may be there."""
    tensors = checkpoint_tensors()
    tensors["model.layers.0.self_attn.q_proj.weight"][1, 2] = torch.inf
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors)
    assert run(ckpt, jobs, out) == dict.fromkeys("abcd", "failed")
    assert run.error("a").exit_code == 3
    assert str(run.error("a")).startswith(
        "model.layers.0.self_attn.q_proj.weight: 1 of 256 values are not finite in the base;"
    )
    assert run(ckpt, jobs, out, allow_nonfinite=True) == dict.fromkeys("abcd", "done")
    assert_as_alone(ckpt, jobs, out, tmp_path / "alone", "abcd", allow_nonfinite=True)


def test_a_result_that_another_call_is_writing_is_left_to_it(run, ckpt, jobs, out):
    with LocalOutDir(out / "c", "0" * 64):
        assert run(ckpt, jobs, out) == {"a": "done", "b": "done", "c": "failed", "d": "done"}
    assert run.error("c").exit_code == 6
    assert run(ckpt, jobs, out) == {"a": "skipped", "b": "skipped", "c": "done", "d": "skipped"}
