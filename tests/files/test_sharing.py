"""Files that no adapter changes are written once: reflinks, hard links or copies, and never of anything but
equal contents."""

import errno
import fcntl
import json
import os
import shutil
import stat

import pytest
import torch
from build import adapter_tensors, checkpoint_tensors, files_of, write_adapter, write_checkpoint

from lorafuse import batch
from lorafuse.errors import StorageError
from lorafuse.files import sharing
from lorafuse.files.sharing import share_file

SHARDS = {"max_shard_size": "1KB"}


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "source").write_bytes(b"weights")
    return tmp_path / "source", tmp_path / "target"


@pytest.fixture
def ckpt(tmp_path):
    return write_checkpoint(tmp_path / "ckpt", checkpoint_tensors(torch.float32))


@pytest.fixture
def jobs(tmp_path):
    """a and b change the same weight, c another one."""
    tensors = adapter_tensors(checkpoint_tensors())
    for name, layer in {"a": 0, "b": 0, "c": 1}.items():
        own = {
            k: t * (2 + ord(name)) for k, t in tensors.items() if f"layers.{layer}." in k and "q_proj" in k
        }
        write_adapter(tmp_path / "jobs" / name, own, target_modules=["q_proj"], layers_to_transform=[layer])
    return tmp_path / "jobs"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def no_reflinks(monkeypatch, code=errno.EOPNOTSUPP):
    def refuse(fd, request, *args):
        assert request == sharing.FICLONE
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)


def no_links(monkeypatch, code):
    def refuse(source, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)


def shared_files(first, second):
    """Names of both whose contents are equal, and those that are one file."""
    names = {p.name for p in first.glob("*.safetensors")} & {p.name for p in second.glob("*.safetensors")}
    equal = {name for name in names if (first / name).read_bytes() == (second / name).read_bytes()}
    return equal, {name for name in equal if (first / name).samefile(second / name)}


# ---- one file


def test_a_reflink_is_asked_for_first(pair, monkeypatch):
    def clone(write, request, read):
        os.write(write, os.pread(read, 100, 0))
        asked.append(request)

    asked = []
    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert share_file(*pair, "auto") == "reflink"
    assert asked == [0x40049409]
    assert pair[1].read_bytes() == b"weights" and not pair[1].samefile(pair[0])


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV])
def test_then_a_hard_link(code, pair, monkeypatch):
    no_reflinks(monkeypatch, code)
    assert share_file(*pair, "auto") == "hardlink"
    assert pair[1].samefile(pair[0])
    assert not stat.S_IMODE(pair[0].stat().st_mode) & 0o222
    assert sorted(path.name for path in pair[0].parent.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EIO, errno.ESTALE])
def test_then_a_copy(code, pair, monkeypatch):
    no_reflinks(monkeypatch)
    no_links(monkeypatch, code)
    assert share_file(*pair, "auto") == "copy"
    assert pair[1].read_bytes() == b"weights" and not pair[1].samefile(pair[0])
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(pair[1].stat().st_mode) == 0o666 & ~umask


def test_a_link_that_stays_writable_is_none(pair, monkeypatch):
    """Of another user's file."""
    no_reflinks(monkeypatch)

    def refuse(path, mode):
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(os, "chmod", refuse)
    assert share_file(*pair, "auto") == "copy"
    assert not pair[1].samefile(pair[0])


@pytest.mark.parametrize("how", ["reflink", "hardlink"])
def test_what_is_asked_for_and_cannot_be_done(how, pair, monkeypatch):
    no_reflinks(monkeypatch)
    no_links(monkeypatch, errno.EPERM)
    with pytest.raises(
        StorageError, match=f"cannot be a {how} of .*; --share auto takes what the file system can do"
    ):
        share_file(*pair, how)
    assert not pair[1].exists()


@pytest.mark.parametrize("how", ["auto", "copy"])
def test_other_errors_pass_through(how, pair, monkeypatch):
    no_reflinks(monkeypatch, errno.EIO if how == "auto" else errno.EOPNOTSUPP)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="Input/output error" if how == "auto" else "No space left"):
        share_file(*pair, how)
    assert [path.name for path in pair[0].parent.iterdir()] == ["source"]


def test_a_link_that_fails_where_one_was_asked_for(pair, monkeypatch):
    """EIO is no answer to what the file system can do: it passes through."""
    no_links(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        share_file(*pair, "hardlink")


def test_a_target_that_is_there_is_not_replaced(pair, monkeypatch):
    no_reflinks(monkeypatch)
    pair[1].write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        share_file(*pair, "auto")
    assert pair[1].read_bytes() == b"mine"


# ---- results


def test_equal_files_of_a_pass_are_one(ckpt, jobs, out, monkeypatch):
    no_reflinks(monkeypatch)
    batch(ckpt, jobs, out, **SHARDS)
    equal, one = shared_files(out / "a", out / "b")
    assert equal == one and len(equal) > 15
    inputs = {path.stat().st_ino for path in ckpt.iterdir()}
    for path in out.rglob("*"):
        if path.suffix == ".safetensors":
            assert path.stat().st_ino not in inputs
            assert bool(path.stat().st_mode & 0o222) == (path.stat().st_nlink == 1)
        elif path.is_file():
            assert path.stat().st_nlink == 1 and path.stat().st_mode & 0o200
    for name in "abc":
        receipt = json.loads((out / name / "lorafuse_receipt.json").read_text())
        assert [e["file"] for e in receipt["outputs"] if e["file"].endswith(".safetensors")] == sorted(
            p.name for p in (out / name).glob("*.safetensors")
        )


def test_a_common_file_is_made_once(ckpt, jobs, out, monkeypatch):
    """What is written for three jobs is hardly more than for one; the bytes do not depend on how they are
    shared."""
    no_reflinks(monkeypatch)
    written = 0
    write = os.write

    def count(fd, data):
        nonlocal written
        written += len(data)
        return write(fd, data)

    monkeypatch.setattr(os, "write", count)
    sizes = {}
    for how in ("auto", "copy"):
        written = 0
        batch(ckpt, jobs, out / how, share=how, **SHARDS)
        sizes[how] = written
    whole = sum(path.stat().st_size for path in (out / "copy" / "a").glob("*.safetensors"))
    # c's layout differs from that of a and b.
    assert sizes["auto"] < 2.3 * whole
    for file, data in files_of(out / "copy").items():
        assert file.endswith("receipt.json") or files_of(out / "auto")[file] == data
    assert shared_files(out / "copy" / "a", out / "copy" / "b")[1] == set()


def test_a_later_pass_and_a_later_call_share_too(ckpt, jobs, out, monkeypatch):
    from lorafuse.batching import passes

    no_reflinks(monkeypatch)
    monkeypatch.setattr(passes, "MAX_MEMBERS", 1)
    batch(ckpt, jobs, out, index=0, of=3, **SHARDS)
    batch(ckpt, jobs, out, index=1, of=3, **SHARDS)
    equal, one = shared_files(out / "a", out / "b")
    assert equal == one and len(equal) > 15


@pytest.mark.parametrize("what", ["bytes", "receipt", "checkpoint", "removed"])
def test_a_file_that_is_not_what_its_receipt_says_is_not_shared(what, ckpt, jobs, out, tmp_path, monkeypatch):
    no_reflinks(monkeypatch)
    batch(ckpt, jobs, tmp_path / "right", **SHARDS)
    batch(ckpt, jobs, out, index=0, of=3, **SHARDS)
    receipt = out / "a" / "lorafuse_receipt.json"
    if what == "receipt":
        receipt.write_text("{")
    elif what == "checkpoint":
        found = json.loads(receipt.read_text())
        found["inputs"][0]["sha256"] = "0"
        receipt.write_text(json.dumps(found))
    else:
        for path in (out / "a").glob("*.safetensors"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.chmod(0o644)
            path.write_bytes(data) if what == "bytes" else path.unlink()
    batch(ckpt, jobs, out, index=1, of=3, **SHARDS)
    assert shared_files(out / "a", out / "b")[1] == set()
    for path in (tmp_path / "right" / "b").glob("*.safetensors"):
        assert (out / "b" / path.name).read_bytes() == path.read_bytes()


def test_another_dtype_or_a_copied_layer_is_not_equal(ckpt, jobs, out, tmp_path, monkeypatch):
    """Weights of the same name that come from other layers, or are rounded, have files of their own."""
    no_reflinks(monkeypatch)
    own = {
        k: t for k, t in adapter_tensors(checkpoint_tensors()).items() if "layers.0." in k and "q_proj" in k
    }
    write_adapter(
        jobs / "copies",
        own,
        target_modules=["q_proj"],
        layers_to_transform=[0],
        layer_replication=[[0, 1], [0, 1]],
    )
    lines = [{"adapter": f"jobs/{name}", "name": name} for name in ("a", "copies")]
    lines += [{"adapter": "jobs/a", "name": "half", "dtype": "float16"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for share in range(3):  # each finds what the one before left
        assert [
            state.error for state in batch(ckpt, tmp_path / "list.jsonl", out, index=share, of=3, **SHARDS)
        ] == [None]
    from oracle import read_tensors

    base = checkpoint_tensors(torch.float32)
    copies, half = read_tensors(out / "copies"), read_tensors(out / "half")
    for name, tensor in copies.items():
        if "q_proj" not in name:
            assert torch.equal(tensor, base[name.replace("layers.1", "layers.0")]), name
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
