"""A batch whose OUT_ROOT is another kind of place makes the results that one into a directory does."""

import json

import pytest
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from faults import Killed
from scenario import Bucket, content

import lorafuse
from lorafuse.errors import OutDirError, UsageError
from lorafuse.files.folder import FileHash
from lorafuse.outdir.folder_file import FolderFile

ROOT = "memory://root"
SHARDS = {"max_shard_size": "2KB"}
NAMES = ["a", "b", "c"]


@pytest.fixture
def ckpt(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", n_shards=2)


@pytest.fixture
def jobs(tmp_path):
    """Adapters for one weight each, so that most files are the same in all results."""
    for i, name in enumerate(NAMES):
        tensors = {
            key: tensor * (i + 1)
            for key, tensor in adapter_tensors(checkpoint_tensors()).items()
            if "layers.0" in key and "q_proj" in key
        }
        write_adapter(tmp_path / "jobs" / name, tensors, target_modules=["q_proj"], layers_to_transform=[0])
    return tmp_path / "jobs"


def batch(*args, **options):
    return {state.name: state.state for state in lorafuse.batch(*args, **SHARDS | options)}


def result(store, name):
    """Every file, the receipt without times."""
    place = Bucket(store)
    place.out = f"{ROOT}/{name}"
    return place.content()


def assert_as_in_a_directory(store, ckpt, jobs, tmp_path):
    lorafuse.batch(ckpt, jobs, tmp_path / "local", **SHARDS)
    assert {name.split("/")[0] for name in store.below(ROOT)} == {*NAMES}, "nothing is hidden there"
    for name in NAMES:
        assert result(store, name) == content(tmp_path / "local" / name)


def test_the_results_are_those_of_a_directory(ckpt, jobs, object_store, tmp_path):
    """And the second call knows them again; a state says where its result is."""
    states = lorafuse.batch(ckpt, jobs, ROOT, **SHARDS)
    assert [(state.state, state.out_dir) for state in states] == [("done", f"{ROOT}/{n}") for n in NAMES]
    assert_as_in_a_directory(object_store, ckpt, jobs, tmp_path)
    before = dict(object_store.objects)
    assert batch(ckpt, jobs, f"{ROOT}/") == dict.fromkeys(NAMES, "skipped")
    assert object_store.objects == before


def test_files_that_no_adapter_changes_come_from_a_result(ckpt, jobs, object_store, tmp_path):
    """One that is there from an earlier call: it is hashed before its first use, and given if it is whole."""
    batch(ckpt, jobs, ROOT)
    for name in object_store.below(f"{ROOT}/b"):
        del object_store.objects[f"{ROOT}/b/{name}"]
    object_store.before = lambda n, name: calls.append(name)
    calls = []
    with object_store.watched():
        assert batch(ckpt, jobs, ROOT) == {"a": "skipped", "b": "done", "c": "skipped"}
    assert calls.count("create") == 1
    assert_as_in_a_directory(object_store, ckpt, jobs, tmp_path)


def test_a_file_that_is_not_what_its_receipt_says_is_not_taken(ckpt, jobs, object_store, tmp_path):
    batch(ckpt, jobs, ROOT)
    for name in object_store.below(f"{ROOT}/b"):
        del object_store.objects[f"{ROOT}/b/{name}"]
    for name in "ac":
        for file in object_store.below(f"{ROOT}/{name}"):
            if file.endswith(".safetensors"):
                data = object_store.objects[f"{ROOT}/{name}/{file}"]
                object_store.objects[f"{ROOT}/{name}/{file}"] = data[:-1] + bytes([data[-1] ^ 1])
    assert batch(ckpt, jobs, ROOT)["b"] == "done"
    lorafuse.convert(ckpt, jobs / "b", tmp_path / "alone", **SHARDS)
    assert result(object_store, "b") == content(tmp_path / "alone")


def test_what_is_there_and_is_something_else(ckpt, jobs, object_store):
    object_store.objects[f"{ROOT}/a/mine.txt"] = b"mine"
    states = lorafuse.batch(ckpt, jobs, ROOT, **SHARDS)
    assert [state.state for state in states] == ["failed", "done", "done"]
    assert str(states[0].error) == (
        f"{ROOT}/a: exists, but holds no lorafuse_receipt.json; overwrite=True replaces it once the new one "
        "is complete."
    )
    assert batch(ckpt, jobs, ROOT, overwrite=True) == {"a": "done", "b": "skipped", "c": "skipped"}
    assert f"{ROOT}/a/mine.txt" not in object_store.objects
    name = next(name for name in object_store.below(f"{ROOT}/c") if name.endswith(".safetensors"))
    object_store.objects[f"{ROOT}/c/{name}"] += b"x"
    (error,) = [state.error for state in lorafuse.batch(ckpt, jobs, ROOT, **SHARDS) if state.error]
    assert f"{name} is not the file that its receipt describes" in str(error)


def test_killed_before_any_call(ckpt, jobs, object_store, tmp_path):
    """Results are complete or not there, and the same call goes on."""
    calls = []
    object_store.before = lambda n, name: calls.append(name)
    with object_store.watched():
        batch(ckpt, jobs, ROOT)
    for number in range(1, len(calls) + 1, 5):
        object_store.objects.clear()
        object_store.kill_at(number)
        with pytest.raises(Killed), object_store.watched():
            batch(ckpt, jobs, ROOT)
        object_store.before = lambda n, name: None
        for name in NAMES:
            files = object_store.below(f"{ROOT}/{name}")
            assert "lorafuse_receipt.json" not in files or "config.json" in files
        assert {*batch(ckpt, jobs, ROOT).values()} <= {"done", "skipped"}
    assert_as_in_a_directory(object_store, ckpt, jobs, tmp_path)


def test_no_room(ckpt, jobs, object_store):
    """Of what the root has left, before the first byte."""
    object_store.capacity = 10
    with pytest.raises(Exception, match=r"^memory://root: 10.9 KB are needed for a, 10 bytes are free\.$"):
        batch(ckpt, jobs, ROOT)
    assert not object_store.objects


@pytest.mark.parametrize(("root", "says"), [
    ("memory://ckpt/merged", "is or lies inside the input memory://ckpt; choose another directory."),
    ("memory://ckpt", "is or lies inside the input memory://ckpt; choose another directory."),
    ("memory://jobs", "the result a would take the place of the input memory://jobs/a."),
])  # fmt: skip
def test_a_root_that_touches_an_input(root, says, ckpt, jobs, in_memory, object_store, tmp_path):
    urls = [in_memory(ckpt), in_memory(jobs)]
    lines = [
        {"adapter": f"{urls[1]}/{name}", "name": other} for name, other in zip("abc", "bca", strict=True)
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    before = dict(object_store.objects)
    with pytest.raises(OutDirError) as caught:
        batch(urls[0], tmp_path / "jobs.jsonl", root, overwrite=True)
    assert str(caught.value) == f"{root}: {says}"
    assert object_store.objects == before


def test_a_kind_that_is_not_known(ckpt, jobs):
    with pytest.raises(UsageError, match=r"^ftp://root: results cannot be written to ftp://\.$"):
        batch(ckpt, jobs, "ftp://root")


def test_a_file_of_a_folder(in_memory, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/x").write_bytes(bytes(range(256)) * 20)
    url = in_memory(tmp_path / "files")
    file = FolderFile(in_memory.at(url), "x")
    assert (file.local_path, b"".join(file.chunks())) == (None, bytes(range(256)) * 20)
    assert isinstance(file.hash(), FileHash) and file.hash().size == 5120
