"""Folders of every kind behave alike: what is in them, what their files are called, how they are read."""

import errno
import io
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from build import write_adapter, write_checkpoint

import lorafuse
from lorafuse.errors import AdapterError, CheckpointError
from lorafuse.files.cloud_url import SCHEMES
from lorafuse.files.folder import read_fully, stream
from lorafuse.files.folders import FOLDERS, folder_and_file, has_scheme, open_folder
from lorafuse.files.hashing import hash_file
from lorafuse.files.local_folder import AHEAD_NBYTES, LocalFolder
from lorafuse.files.safetensors_file import Shard

FILES = {
    "a.txt": b"abcdefgh" * 1000,
    "b.txt": b"",
    "c.json": b"{}",
    "sub/a.txt": b"sub",
    "sub/deep/x.txt": b"deep",
    "other/b.txt": b"b",
}


@pytest.fixture(params=["local", "memory"])
def named(request, in_memory, tmp_path):
    """The name of a folder that holds FILES."""
    for name, data in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    return str(tmp_path / "folder") if request.param == "local" else in_memory(tmp_path / "folder")


@pytest.fixture
def folder(named):
    return open_folder(named)


def test_labels(named, folder):
    """A file's label is the folder's name and its own, as a path would be spelled."""
    assert str(folder) == str(open_folder(f"{named}/")) == named
    assert folder / "a.txt" == folder / "./a.txt" == f"{named}/a.txt"
    assert folder.sub_folder("sub") / "a.txt" == f"{named}/sub/a.txt"
    assert folder.address == (os.path.realpath(named) if folder.local_path else named)


def test_what_is_there(named, folder):
    assert folder.is_there() and folder.sub_folder("sub").is_there()
    assert not open_folder(f"{named}x").is_there() and not folder.sub_folder("nothing").is_there()
    assert [folder.exists(name) for name in ("a.txt", "sub", "sub/a.txt", "x", "sub/x", "a.tx")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["a.txt", "b.txt", "c.json"]),
        ("*.txt", ["a.txt", "b.txt"]),
        ("c.json", ["c.json"]),
        ("x.json", []),
        ("*/a.txt", ["sub/a.txt"]),
        ("sub/*.txt", ["sub/a.txt"]),
        ("*/*.txt", ["other/b.txt", "sub/a.txt"]),
    ],
)
def test_names(folder, pattern, names):
    """A * matches no slash, and folders are no files."""
    assert folder.names(pattern) == names


def test_sub_folders(folder):
    assert folder.sub_folders() == ["other", "sub"] and folder.sub_folder("sub").sub_folders() == ["deep"]


def test_a_file(folder):
    with closing(folder.open("a.txt")) as file:
        assert file.facts == folder.facts("a.txt") and file.facts.nbytes == 8000
        buffer = bytearray(7)
        assert file.read_into(3, buffer) == 7 and buffer == b"defghab"
        assert file.read_into(7998, buffer) == 2 and buffer[:2] == b"gh"
        assert file.read_into(8000, buffer) == 0 == file.read_into(9000, buffer)
        file.will_need(0, 8000)
        assert read_fully(file, 0, 8000) == FILES["a.txt"] == read_fully(file, 0, 9000)
        assert read_fully(file, 7999, 0) == b"" and read_fully(file, 7999, 5) == b"h"


def test_the_kernel_is_asked_once_for_many_short_reads(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, nbytes, advice: asked.append((start, nbytes)))
    with closing(LocalFolder(tmp_path).open("x")) as file:
        for start in (0, 1000, AHEAD_NBYTES - 1000, AHEAD_NBYTES - 999, 500, 2 * AHEAD_NBYTES):
            file.will_need(start, 1000)
        file.will_need(0, 3 * AHEAD_NBYTES)
    n = AHEAD_NBYTES
    assert asked == [(0, n), (n - 999, n), (500, n), (2 * n, n), (0, 3 * n)]


def test_a_file_that_is_not_there(folder):
    for ask in (folder.facts, folder.open):
        with pytest.raises(FileNotFoundError) as caught:
            ask("sub/x")
        assert caught.value.filename == folder / "sub/x" and caught.value.strerror == os.strerror(
            errno.ENOENT
        )


def test_an_identity_changes_with_the_file(named, folder, in_memory):
    before = folder.facts("a.txt")
    assert folder.facts("a.txt") == before
    if folder.local_path:
        Path(named, "a.txt").write_bytes(b"other")
    else:
        in_memory.store[folder / "a.txt"] = b"other"
    assert folder.facts("a.txt").identity != before.identity


def test_a_stream(folder):
    """The calls that zipfile, pickle and torch make."""
    data = FILES["a.txt"]
    with stream(folder.open("a.txt")) as f:
        assert f.read(5) == data[:5] and f.tell() == 5
        assert f.seek(-3, io.SEEK_END) == 7997 and f.read() == data[-3:]
        assert f.seek(10) == 10 and f.seek(5, io.SEEK_CUR) == 15 and f.read(2) == data[15:17]
        assert f.readline() == data[17:] and f.read(1) == b""
        f.seek(0)
        with pytest.raises(OSError) as caught:
            f.seek(-1)
        assert caught.value.errno == errno.EINVAL
    assert f.closed


def test_a_hash(folder):
    heard = []
    assert hash_file(folder, "a.txt", heard.append).size == 8000 == sum(heard)
    assert hash_file(folder, "b.txt").sha256 == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


def test_a_file_by_its_name(named, monkeypatch):
    """Of a file that a user names, the folder and the name in it."""
    folder, name = folder_and_file(f"{named}/sub/a.txt")
    assert (str(folder), name) == (f"{named}/sub", "a.txt") and folder.facts(name).nbytes == 3


def test_a_local_file_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [
        str(folder / name) for folder, name in map(folder_and_file, ("x", "./x", "/x", "a/x", "a//x"))
    ] == [
        "x",
        "x",
        "/x",
        "a/x",
        "a/x",
    ]


def test_schemes(in_memory):
    """Only a known scheme makes a URL of a name: others may be directories."""
    assert set(FOLDERS) == {"", *SCHEMES} and "memory" in SCHEMES
    assert has_scheme("memory://x") and not any(
        map(has_scheme, ("x", "memory:/x", "ftp://x", "://x", "/a://b"))
    )
    assert str(open_folder("ftp://x")) == "ftp:/x"


def test_what_is_not_there_is_said_as_of_a_directory(tmp_path, in_memory):
    """The adapter is looked at first."""
    lora = write_adapter(tmp_path / "lora")
    for kind, adapter in ((AdapterError, "memory://nothing"), (CheckpointError, lora)):
        with pytest.raises(kind) as caught:
            lorafuse.convert("memory://nothing", adapter, "out")
        assert str(caught.value) == "memory://nothing: no such directory."


def test_a_tensor_is_read_in_pieces(tmp_path, in_memory):
    """A file that gives a few bytes at a time gives all of them."""
    weight = torch.arange(5000, dtype=torch.float32)
    url = in_memory(write_checkpoint(tmp_path / "ckpt", {"w": weight}))
    shard = Shard(open_folder(url), "model.safetensors")
    buffer = bytearray(4 * 5000)
    shard.read_into(shard.tensors["w"], 0, buffer)
    assert buffer == weight.numpy().tobytes()
