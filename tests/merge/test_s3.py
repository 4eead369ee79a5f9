"""Checkpoints, adapters and results in an object store: a real S3 server on this machine, and between it and
lorafuse what a network does."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from build import adapter_tensors, checkpoint_tensors, files_of, write_adapter, write_checkpoint
from click.testing import CliRunner
from disturbing_proxy import SLOW_DOWN, every, times
from large_pair import nf4, write_pair
from processes import beyond_torch
from scenario import SHARD, content, without_times

import lorafuse
from lorafuse import cli
from lorafuse.errors import (
    CheckpointError,
    HeldError,
    LorafuseError,
    OutDirError,
    StorageError,
    UsageError,
    sized,
)
from lorafuse.files.names import RECEIPT

OUT = "s3://models/merged"


def merged(inputs, **options):
    return lorafuse.convert(*inputs, OUT, max_shard_size=SHARD, **options)


def check(s3, clean):
    """The result is complete, and nothing else is left."""
    found = without_times(s3.files(OUT))
    assert found.keys() == clean.keys()
    assert {name: data for name, data in found.items() if name != RECEIPT} == {
        name: data for name, data in clean.items() if name != RECEIPT
    }
    assert json.loads(found[RECEIPT])["outputs"] == json.loads(clean[RECEIPT])["outputs"]
    assert not [key for key in s3.keys("models") if ".lorafuse" in key]
    assert s3.uploads("models") == []


def test_from_s3_to_s3(s3, inputs, clean, tmp_path):
    """Each end by itself, and both; the result is an input of everything that looks at results."""
    urls = [s3.upload(path, "models") for path in inputs]
    lorafuse.convert(*urls, tmp_path / "local", max_shard_size=SHARD)
    weights = [name for name in clean if name.endswith((".safetensors", ".json")) and name != RECEIPT]
    assert weights and all(files_of(tmp_path / "local")[name] == clean[name] for name in weights)
    receipt = merged(urls)
    check(s3, clean)
    assert {entry["path"].rpartition("/")[0] for entry in receipt["inputs"]} == {*urls}
    assert "hush" not in json.dumps(receipt)
    lorafuse.verify(OUT, ckpt=urls[0], adapters=[urls[1]])
    assert lorafuse.inspect(OUT)["kind"] == "merged"
    assert "<html" in lorafuse.report(OUT)
    with pytest.raises(OutDirError, match=rf"^{OUT}: exists and is not empty; overwrite=True"):
        merged(inputs)
    merged(inputs, overwrite=True)
    check(s3, clean)


def test_a_dry_run_writes_nothing(s3, inputs):
    urls = [s3.upload(path, "models") for path in inputs]
    before = s3.keys("models")
    plan = merged(urls, dry_run=True)
    assert plan["disk"]["free_nbytes"] is None and s3.keys("models") == before
    assert {method for method, _ in s3.log} <= {"GET", "HEAD"}


def test_a_damaged_result(s3, inputs):
    merged(inputs)
    name = "model-00002-of-00005.safetensors"
    data = bytearray(s3.files(OUT)[name])
    data[-1] ^= 1
    s3.client.put_object(Bucket="models", Key=f"merged/{name}", Body=bytes(data))
    with pytest.raises(LorafuseError, match=f"^{OUT}/{name}") as caught:
        lorafuse.verify(OUT)
    assert caught.value.exit_code == 8


DISTURBED = {
    "throttled": [every(3, (503, SLOW_DOWN))],
    "cut off": [times(2, "cut", "PUT"), times(2, "cut", "GET"), times(2, "cut", "HEAD")],
    "answers lost": [times(2, "lost", "PUT", "/done/"), times(1, "lost", "PUT", "/out/")],
    "half an answer": [times(2, "short", "GET", "model")],
    "errors of the server": [times(3, (500, b""), "PUT"), times(2, (502, b""), "GET")],
    "the lock's answer lost": [times(1, "lost", "PUT", "/lock")],
    "the commit's copies": [times(3, (503, SLOW_DOWN), "PUT", "/merged/model")],
}


@pytest.mark.parametrize("kind", DISTURBED)
def test_what_passes_is_tried_again(kind, s3, inputs, clean):
    urls = [s3.upload(path, "models") for path in inputs]
    with s3.disturbed(*DISTURBED[kind]):
        merged(urls)
    check(s3, clean)


def test_an_error_that_stays_is_said_and_resumed(s3, inputs, clean):
    """What is finished stays, and the same command goes on."""
    file = "model-00004-of-00005.safetensors"
    with s3.disturbed(times(99, (503, SLOW_DOWN), "PUT", f"/out/{file}")), pytest.raises(StorageError) as e:
        merged(inputs)
    assert str(e.value).endswith(f"/out/{file}: the store answered 503 SlowDown, 4 times; try again later.")
    assert s3.files(OUT) == {}
    n_done = sum("/done/" in key for key in s3.keys("models"))
    assert n_done > 0
    events = []
    merged(inputs, on_event=events.append)
    assert [event["n_shards"] for event in events if event["event"] == "resumed"] == [n_done]
    check(s3, clean)


def xml(code, message="no"):
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


REFUSED = [
    (
        (403, xml("AccessDenied")),
        "the store refuses access (AccessDenied); your credentials lack a permission",
    ),
    ((403, xml("InvalidAccessKeyId")), "the store does not know the access key"),
    ((403, xml("SignatureDoesNotMatch")), "the secret key is not that of the access key"),
    (
        (403, xml("RequestTimeTooSkewed")),
        "this machine's clock is off by more than the store allows; set it",
    ),
    ((400, xml("ExpiredToken")), "the credentials have expired"),
    ((301, xml("PermanentRedirect")), "the bucket is in another region; set AWS_REGION to it"),
    (
        (400, xml("AuthorizationHeaderMalformed", "the region 'a' is wrong; expecting 'eu-west-1'")),
        "the bucket is in another region (eu-west-1); set AWS_REGION to it",
    ),
]


@pytest.mark.parametrize(("answer", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(answer, says, s3, inputs):
    with s3.disturbed(times(99, answer)), pytest.raises(StorageError) as caught:
        merged(inputs)
    assert str(caught.value).endswith(f": {says}.")
    assert "hush" not in str(caught.value) and caught.value.exit_code == 5
    assert s3.keys("models") == []


def test_a_bucket_that_is_not_there(s3, inputs):
    for names in ((*inputs, "s3://nowhere/out"), ("s3://nowhere/base", inputs[1], "out")):
        with pytest.raises(StorageError) as caught:
            lorafuse.convert(*names)
        assert str(caught.value) == "s3://nowhere: there is no such bucket."
    assert not Path("out").exists()


def test_a_folder_that_is_not_there(s3, inputs):
    with pytest.raises(CheckpointError) as caught:
        lorafuse.convert("s3://models/nothing", inputs[1], OUT)
    assert str(caught.value) == "s3://models/nothing: no such directory."


def test_an_endpoint_that_is_down(s3, inputs, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError) as caught:
        merged(inputs)
    assert str(caught.value).startswith(
        "s3://models/.merged.lorafuse: the store at http://127.0.0.1:9 cannot be reached, or the connection "
        "broke: "
    )


@pytest.mark.parametrize("url", ["s3://me:hush@models/x", "s3://models/x?token=hush", "s3://models/x#hush"])
def test_a_url_with_credentials(url, inputs):
    with pytest.raises(UsageError) as caught:
        lorafuse.convert(*inputs, url)
    assert str(caught.value) == (
        "s3://models/x: the URL of an object store may hold no user, query or fragment; credentials are "
        "found where the cloud's own tools find them."
    )


def test_a_push_from_a_store(s3, inputs, tmp_path):
    """It says what to do instead, before anything is read."""
    says = (
        "push_to_hub sends files of this machine, not objects of a store. Give a directory instead; or leave "
        "push_to_hub out, copy the result here when it is complete, and send it with `hf upload`."
    )
    with pytest.raises(UsageError) as caught:
        merged(inputs, push_to_hub="me/merged")
    assert str(caught.value) == f"{OUT}: {says}" and caught.value.exit_code == 2
    write_adapter(tmp_path / "jobs/a", adapter_tensors(checkpoint_tensors()))
    with pytest.raises(UsageError) as caught:
        lorafuse.batch(inputs[0], tmp_path / "jobs", OUT, push_to_hub="me/{name}")
    assert str(caught.value) == f"{OUT}: {says}"
    assert s3.keys("models") == []


def test_without_obstore(s3, inputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UsageError) as caught:
        merged(inputs)
    assert str(caught.value) == "s3://models: object storage needs `pip install 'lorafuse[cloud]'`."


def test_a_result_around_an_input(s3, inputs):
    url = s3.upload(inputs[0], "models")
    other_name = url.replace("s3://", "s3a://")
    for out, ckpt in itertools.product((url, f"{url}/merged", "s3://models"), (url, other_name)):
        with pytest.raises(OutDirError) as caught:
            lorafuse.convert(ckpt, inputs[1], out, overwrite=True)
        assert str(caught.value) == (
            f"{out}: is, contains or lies inside the input {url}; choose another place."
        )


def test_an_input_that_changes(s3, inputs):
    """It is seen by its ETag, with the next request or at the end."""
    ckpt = s3.upload(inputs[0], "models")
    name = sorted(path.name for path in inputs[0].glob("*.safetensors"))[0]

    def touch(event):
        if event["event"] == "plan":
            data = bytearray((inputs[0] / name).read_bytes())
            data[-1] ^= 1
            s3.client.put_object(Bucket="models", Key=f"ckpt/{name}", Body=bytes(data))

    with pytest.raises(CheckpointError) as caught:
        lorafuse.convert(ckpt, inputs[1], OUT, on_event=touch)
    assert str(caught.value) == (
        f"{ckpt}/{name}: changed during the run, which may have read some of both; run it again."
    )
    assert s3.files(OUT) == {} and not [key for key in s3.keys("models") if "lorafuse" in key]


RUN = f"import sys, lorafuse; lorafuse.convert(*sys.argv[1:], max_shard_size={SHARD!r})"


def started(inputs, s3):
    return subprocess.Popen([sys.executable, "-c", RUN, *map(str, inputs), OUT], env=os.environ)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


def test_a_store_without_conditions(s3, inputs, clean):
    """It answers 501 to a call that makes an object only if it is not there."""
    events = []
    with s3.disturbed(times(99, (501, xml("NotImplemented")), "PUT", "/lock")):
        merged(inputs, on_event=events.append)
    assert [event["message"] for event in events if event["event"] == "warning"] == [
        f"{OUT}: the store has no locks; let one run at a time write it."
    ]
    check(s3, clean)


def test_killed_and_resumed(s3, inputs, clean):
    """A run that is killed holds its lock no longer, on this machine."""
    with s3.disturbed(times(99, 30.0, "PUT", "/out/model-00003")):
        process = started(inputs, s3)
        wait_for(lambda: any("/out/model-00003" in path for _, path in s3.log), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert s3.files(OUT) == {}
    n_done = sum("/done/" in key for key in s3.keys("models"))
    assert n_done > 0
    events = []
    merged(inputs, on_event=events.append)
    assert [event["n_shards"] for event in events if event["event"] == "resumed"] == [n_done]
    check(s3, clean)


def test_interrupted(s3, inputs, clean):
    """By Ctrl-C: the lock is gone, and the same command goes on."""
    with s3.disturbed(times(1, 2.0, "PUT", "/out/model-00003")):
        command = [*map(str, inputs), OUT, "--max-shard-size", SHARD]
        process = subprocess.Popen([sys.executable, "-m", "lorafuse", "convert", "-q", *command])
        wait_for(lambda: any("/out/model-00003" in path for _, path in s3.log), process)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    left = s3.keys("models")
    assert any("/done/" in key for key in left) and not [key for key in left if key.endswith("/lock")]
    merged(inputs)
    check(s3, clean)


def test_two_runs_at_once(s3, inputs, clean):
    """One has the lock; of the other nothing is left."""
    with s3.disturbed(times(1, 2.0, "PUT", "/out/model-00001")):
        process = started(inputs, s3)
        wait_for(lambda: any("/out/model-00001" in path for _, path in s3.log), process)
        with pytest.raises(HeldError) as caught:
            merged(inputs)
        assert str(caught.value).startswith(f"{OUT}: another run is writing it; wait for it, or choose")
        assert process.wait() == 0
    check(s3, clean)


def test_what_a_killed_run_leaves_is_removed(s3, inputs):
    """By `lorafuse clean`, from a prompt; a result that is there stays."""
    merged(inputs)
    before = s3.files(OUT)
    with s3.disturbed(times(99, 30.0, "PUT", "/out/model-00003")):
        command = [*map(str, inputs), OUT, "--max-shard-size", SHARD, "--overwrite"]
        process = subprocess.Popen([sys.executable, "-m", "lorafuse", "convert", "-q", *command])
        wait_for(lambda: any("/out/model-00003" in path for _, path in s3.log[-1:]), process)
        process.kill()
        process.wait()
    left = sum(len(data) for data in s3.files("s3://models/.merged.lorafuse").values())
    for option, says in (
        (["--dry-run"], f"{sized(left)} of earlier runs are left"),
        ([], f"{sized(left)} of earlier runs are removed"),
        ([], "nothing is left of earlier runs"),
    ):
        said = CliRunner().invoke(cli.lorafuse, ["clean", OUT, *option]).output.splitlines()
        assert said[-1] == f"{OUT}: {says}."
        kinds = [line.split()[0] for line in said[:-1]]
        assert bool(kinds) == (says[0] != "n") and {*kinds} <= {"finished", "journal", "lock"}
        locks = [line for line in said if line.startswith("  lock ")]
        assert all(f", process {process.pid} of this machine, which has ended)" in line for line in locks)
        assert len(locks) == bool(kinds)
    assert s3.files(OUT) == before and not [key for key in s3.keys("models") if "lorafuse/" in key]


@pytest.fixture
def jobs(tmp_path):
    """Adapters for one weight each, so that most files are the same in all results."""
    for i, name in enumerate("ab"):
        tensors = {
            key: tensor * (i + 1)
            for key, tensor in adapter_tensors(checkpoint_tensors()).items()
            if "layers.0" in key and "q_proj" in key
        }
        write_adapter(tmp_path / "jobs" / name, tensors, target_modules=["q_proj"], layers_to_transform=[0])
    return tmp_path / "jobs"


def test_a_batch(s3, jobs, tmp_path):
    """All of it lies in the store. Results are seen by their receipts; the store copies common files."""
    ckpt = write_checkpoint(tmp_path / "ckpt", n_shards=2)
    lorafuse.batch(ckpt, jobs, tmp_path / "local", max_shard_size="2KB")
    base, listed, root = s3.upload(ckpt, "models"), s3.upload(jobs, "models"), "s3://models/root"
    s3.client.put_object(Bucket="models", Key="jobs/logs/log.txt", Body=b"")
    lines = "".join(json.dumps({"adapter": f"jobs/{name}"}) + "\n" for name in "ab")
    s3.client.put_object(Bucket="models", Key="jobs.jsonl", Body=lines.encode())

    events = []
    states = lorafuse.batch(base, listed, root, max_shard_size="2KB", on_event=events.append)
    assert [(state.name, state.state, state.out_dir) for state in states] == [
        (name, "done", f"{root}/{name}") for name in "ab"
    ]
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert f"{listed}/logs: holds no adapter, and is left out." in warnings
    for name in "ab":
        expected, found = content(tmp_path / "local" / name), without_times(s3.files(f"{root}/{name}"))
        weights = [file for file in expected if file.endswith(".safetensors")]
        assert len(weights) > 5 and all(found[file] == expected[file] for file in weights)
        assert found.keys() == expected.keys()
    assert not [key for key in s3.keys("models") if ".lorafuse" in key]

    again = lorafuse.batch(base, "s3://models/jobs.jsonl", f"{root}/", max_shard_size="2KB")
    assert [state.state for state in again] == ["skipped", "skipped"]
    with pytest.raises(StorageError, match=r"cannot be a hardlink: object stores have copies"):
        lorafuse.batch(base, listed, "s3://models/linked", max_shard_size="2KB", share="hardlink")


def test_memory(s3, tmp_path):
    """From a store to a store within 100 MB beyond `import torch`: a matrix of 17 M elements, whose file has
    many parts."""
    rows, cols, w = 512, 32768, "model.layers.0.mlp.up_proj.weight"
    for path in write_pair(tmp_path, w, (rows, cols), 16, nf4(w, rows, cols)):
        s3.upload(path, "models")
    beyond = beyond_torch("convert", "-q", "s3://models/ckpt", "s3://models/lora", OUT)
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"
    assert sum("partNumber" in path for method, path in s3.log if method == "PUT") > 5
    assert s3.uploads("models") == []


def test_several_workers(s3, inputs, clean):
    """Of two with the same index the second is refused, and so is a commit; the others go on. A worker that
    is killed makes, run again, what is missing of its part. A commit that fails is repeated."""

    def files_made(**options):
        events = []
        merged(inputs, on_event=events.append, **options)
        return [event["file"] for event in events if event["event"] == "shard"]

    run = f"import sys, lorafuse; lorafuse.convert(*sys.argv[1:], max_shard_size={SHARD!r}, index=0, of=2)"
    with s3.disturbed(times(99, 60.0, "PUT", "/out/model-00005")):
        worker = subprocess.Popen([sys.executable, "-c", run, *map(str, inputs), OUT], env=os.environ)
        wait_for(lambda: any("/out/model-00005" in path for _, path in s3.log), worker)
        for options in ({"index": 0, "of": 2}, {"commit": True}, {}):
            with pytest.raises(HeldError, match=f"^{OUT}: another run is making part 0 of 2; wait for it"):
                merged(inputs, **options)
        s3.faults.append(every(4, (503, SLOW_DOWN)))
        assert len(files_made(index=1, of=2)) == 3
        worker.kill()
        worker.wait()
    with pytest.raises(StorageError, match=r"1 of 5 files of weights are not finished: model-00005"):
        merged(inputs, commit=True)
    assert files_made(index=0, of=2) == ["model-00005-of-00005.safetensors"] and s3.files(OUT) == {}
    refused = times(99, (503, SLOW_DOWN), "PUT", "/merged/model-00003")
    with s3.disturbed(refused), pytest.raises(StorageError, match=r"model-00003\S*: the store answered 503"):
        merged(inputs, commit=True)
    assert s3.files(OUT) == {}
    assert files_made(index=0, of=2) == [] and files_made(commit=True) == []
    check(s3, clean)
