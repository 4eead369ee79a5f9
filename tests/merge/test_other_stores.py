"""Object stores that are no S3: Azure by Microsoft's emulator, where it is installed, and Google's requests,
translated for the S3 server of test_s3.py. What differs between stores is what is tested: the lock by their
conditions, ETags, uploads in parts, copies, lists, and what their errors say."""

import os
import signal
import subprocess
import sys
import time
from urllib.parse import unquote

import pytest
from build import files_of
from disturbing_proxy import every, times, told_soon
from scenario import SHARD, without_times

import lorafuse
from lorafuse.errors import HeldError, OutDirError, StorageError
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.outdir.clean import clean as remove_leftovers
from lorafuse.outdir.clean import left


class Store:
    """A server, and where a result in it is made."""

    def __init__(self, server):
        self.server, self.out, self.seen = server, f"{server.scheme}://models/merged", server.store()

    def upload(self, path):
        for name, data in files_of(path).items():
            self.seen.put(f"{path.name}/{name}", data)
        return f"{self.server.scheme}://models/{path.name}"

    def names(self):
        return [entry["path"] for page in self.seen.list() for entry in page]

    def files(self, prefix="merged/"):
        return {
            key.removeprefix(prefix): bytes(self.seen.get(key).bytes())
            for key in self.names()
            if key.startswith(prefix)
        }

    def check(self, clean):
        assert without_times(self.files()).keys() == clean.keys()
        weights = [name for name in clean if name.endswith(".safetensors")]
        assert all(self.files()[name] == clean[name] for name in weights)
        assert not [key for key in self.names() if ".lorafuse" in key]


@pytest.fixture(params=["gs", pytest.param("az", marks=pytest.mark.clouds)])
def store(request, s3, other_stores, monkeypatch):
    store = Store(other_stores(request.param))
    for key in store.names():
        store.seen.delete(key)
    store.server.log.clear()
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    for name, value in store.server.settings().items():
        monkeypatch.setenv(name, value)
    with told_soon(monkeypatch):
        yield store


@pytest.fixture
def merged(store, inputs):
    """merged(**options) → the files that the call made, and how many it went on after"""

    def merged(*names, **options):
        events = []
        lorafuse.convert(
            *(names or inputs), store.out, max_shard_size=SHARD, on_event=events.append, **options
        )
        files = [event["file"] for event in events if event["event"] == "shard"]
        return files, sum(event["n_shards"] for event in events if event["event"] == "resumed")

    return merged


def test_from_a_store_to_itself(store, inputs, clean, merged):
    """While it is busy. The result is an input of what looks at results, and is overwritten."""
    urls = [store.upload(path) for path in inputs]
    with store.server.disturbed(every(5, (503, b""))):
        merged(*urls)
    store.check(clean)
    lorafuse.verify(store.out, ckpt=urls[0], adapters=[urls[1]])
    assert lorafuse.inspect(store.out)["kind"] == "merged"
    with pytest.raises(OutDirError, match="exists and is not empty"):
        merged()
    merged(overwrite=True)
    store.check(clean)


def test_a_file_of_many_parts(store):
    """Nothing shows before it is complete, and nothing after an error."""
    place, data = CloudPlace.at(f"{store.server.scheme}://models/x"), os.urandom(11 << 20)
    with place.writer("large", 5 << 20) as writer:
        for start in range(0, len(data), 3 << 20):
            writer.write(data[start : start + (3 << 20)])
        assert store.files("x/") == {}
    assert store.files("x/") == {"large": data}
    with pytest.raises(ZeroDivisionError), place.writer("given up", 5 << 20) as writer:
        writer.write(data)
        raise ZeroDivisionError
    place.copy("large", place, "copied", len(data))
    assert store.files("x/") == {"large": data, "copied": data}
    assert bytes(place.get_range("copied", 5 << 20, (5 << 20) + 9)) == data[5 << 20 : (5 << 20) + 9]


def test_an_object_that_is_made_or_replaced_under_a_condition(store):
    place = CloudPlace.at(f"{store.server.scheme}://models/x")
    first = place.put_new("lock", b"1")
    assert first and place.put_new("lock", b"2") is None
    second = place.replace("lock", b"3", first)
    assert second and place.replace("lock", b"4", first) is None
    assert place.get("lock")[0] == b"3" and place.get("lock")[1].tag == second
    place.delete(["lock", "lock"])
    assert place.replace("lock", b"5", second) is None


def started(inputs, store, **options):
    run = f"import sys, lorafuse; lorafuse.convert(*sys.argv[1:], max_shard_size={SHARD!r}, **{options})"
    return subprocess.Popen([sys.executable, "-c", run, *map(str, inputs), store.out], env=os.environ)


def asked_for(store, part, process):
    while not any(part in unquote(path) for _, path in store.server.log):
        assert process.poll() is None
        time.sleep(0.01)


def held(part):
    return lambda method, path: 60.0 if method == "PUT" and part in unquote(path) else None


def test_two_runs_of_which_the_first_is_killed(store, inputs, clean, merged):
    """The lock keeps the second out; then that goes on after what is finished, unless it is removed."""
    with store.server.disturbed(held("/out/model-00004")):
        process = started(inputs, store)
        asked_for(store, "/out/model-00004", process)
        with pytest.raises(HeldError, match=f"^{store.out}: another run is writing it"):
            merged()
        process.send_signal(signal.SIGKILL)
        process.wait()
    pieces = left(store.out)
    n_done = sum(piece.what == "finished" for piece in pieces)
    (lock,) = [piece for piece in pieces if piece.what == "lock"]
    assert n_done >= 2 and lock.holder == f"process {process.pid} of this machine, which has ended"
    assert store.files() == {} and merged()[1] == n_done
    store.check(clean)
    remove_leftovers(store.out)
    store.check(clean)


def test_several_workers(store, clean, merged):
    made = [file for index in (1, 0) for file in merged(index=index, of=2)[0]]
    assert len({*made}) == 5
    pieces = left(store.out)
    assert sorted(piece.name.rpartition("/")[2] for piece in pieces if piece.what == "finished") == sorted(
        made
    )
    assert merged(index=0, of=2)[0] == [] and merged(commit=True)[0] == []
    store.check(clean)


def test_what_is_left_is_removed(store, merged):
    merged(index=0, of=2)
    assert store.names()
    remove_leftovers(store.out)
    assert store.names() == []


def test_an_error_that_stays(store, merged):
    with store.server.disturbed(times(99, (503, b""), "PUT")), pytest.raises(StorageError) as caught:
        merged()
    assert str(caught.value).endswith("/lock: the store answered 503, 4 times; try again later.")
    assert caught.value.exit_code == 5 and store.names() == []


def test_access_that_is_refused(store, merged):
    with store.server.disturbed(times(99, (403, b""))), pytest.raises(StorageError) as caught:
        merged()
    assert str(caught.value).endswith(": the store refuses access (403); your credentials lack a permission.")


# ---- what only Azure has

SECRET = "aHVzaGh1c2g="
SIGNATURE = {"AZURE_STORAGE_SAS_KEY": f"sv=2021-08-06&se=2020-01-01&sr=c&sp=r&sig={SECRET}"}
AZURE = {
    "another key": ({"AZURE_STORAGE_ACCOUNT_KEY": SECRET}, "the store refuses access (AuthorizationFailure)"),
    "a signature": (SIGNATURE, "the store refuses access"),
    "no key": ({}, "no credentials were found"),
    "nobody there": (SIGNATURE | {"AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:9/x"}, "cannot be reached"),
}


@pytest.mark.parametrize("case", AZURE)
@pytest.mark.parametrize("store", ["az"], indirect=True)
@pytest.mark.clouds
def test_what_azure_refuses(case, store, merged, monkeypatch):
    """Neither keys nor signatures are in what is said."""
    settings, says = AZURE[case]
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError) as caught:
        merged()
    assert says in str(caught.value) and caught.value.exit_code == 5
    assert SECRET not in str(caught.value) and SECRET.rstrip("=") not in str(caught.value)


@pytest.mark.parametrize("store", ["az"], indirect=True)
@pytest.mark.clouds
def test_a_container_that_is_not_there(store, inputs):
    for names in ((*inputs, "az://nowhere/out"), ("az://nowhere/base", inputs[1], "out")):
        with pytest.raises(StorageError) as caught:
            lorafuse.convert(*names)
        assert str(caught.value) == "az://nowhere: there is no such bucket."
