"""No space: said before the first byte where it can be known, and otherwise with what is missing; and the
same command goes on."""

import errno
import os
import resource
import sys
from types import SimpleNamespace

import fill_disk
import pytest
from build import files_of, write_adapter, write_checkpoint
from faults import run_with_mount
from scenario import five_shards, uninterrupted

import lorafuse
from lorafuse.errors import StorageError
from lorafuse.files.names import RECEIPT

SHARD = 1400


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "work").mkdir()
    return write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "adapter")


@pytest.fixture
def disk(monkeypatch):
    """A file system that says it is large; attributes change what it says."""
    said = SimpleNamespace(f_blocks=10**6, f_bavail=10**6, f_frsize=4096, f_files=10**6, f_favail=10**6)
    monkeypatch.setattr(os, "statvfs", lambda path: said)
    return said


def refused(inputs, out, **options):
    with pytest.raises(StorageError) as caught:
        lorafuse.convert(*inputs, out, max_shard_size=SHARD, **options)
    assert not out.exists()
    return str(caught.value).partition("/out: ")[2]


def test_too_few_bytes_are_said_before_the_first(inputs, disk, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.batching.one_pass.merge", lambda *args, **kw: pytest.fail("has begun"))
    disk.f_bavail = 40
    message = refused(inputs, tmp_path / "work/out")
    needed = int(message.split()[0])
    assert message == (
        f"{needed} bytes are needed and 163840 are free; {needed - 163840} are missing. Give the same "
        "command again when that is mended."
    )
    assert [*(tmp_path / "work").iterdir()] == []


def test_what_is_said_to_be_needed_is_enough(inputs, disk, tmp_path):
    """The blocks of all files fit, and not many times."""
    disk.f_bavail = 1
    needed = int(refused(inputs, tmp_path / "work/out").split()[0])
    disk.f_bavail = 10**6
    lorafuse.convert(*inputs, tmp_path / "work/out", max_shard_size=SHARD)
    blocks = sum(-(-len(data) // 4096) * 4096 for data in files_of(tmp_path / "work/out").values())
    assert blocks <= needed <= blocks + 300_000


def test_too_few_inodes(inputs, disk, tmp_path):
    disk.f_favail = 10
    message = refused(inputs, tmp_path / "work/out")
    assert message == "18 files are to be made, and the file system has room for 10."


@pytest.mark.parametrize("nothing", ["f_files", "f_blocks"])
def test_a_file_system_without_that_limit(nothing, inputs, disk, tmp_path):
    """Says 0 of 0."""
    setattr(disk, nothing, 0)
    setattr(disk, {"f_files": "f_favail", "f_blocks": "f_bavail"}[nothing], 0)
    lorafuse.convert(*inputs, tmp_path / "work/out", max_shard_size=SHARD)


def test_a_limit_of_file_sizes(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 1000))
    message = refused(inputs, tmp_path / "work/out")
    assert message.endswith(
        " bytes is to be made, and this process may make them of 1000 (ulimit -f); raise that, or lower "
        "max_shard_size."
    )
    assert [*(tmp_path / "work").iterdir()] == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_fills_up_meanwhile(code, inputs, disk, tmp_path, monkeypatch):
    """The message has what is missing; what is finished stays, what is not makes room; and the next run needs
    less."""
    real_write, n = os.pwrite, [0]

    def write(fd, data, at):
        n[0] += ".part" in os.readlink(f"/proc/self/fd/{fd}")
        if n[0] > 12:
            disk.f_bavail = 3
            raise OSError(code, os.strerror(code))
        return real_write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", write)
    message = refused(inputs, tmp_path / "work/out")
    (folder,) = (tmp_path / "work").iterdir()
    kept = [p.name for p in (folder / "out").iterdir()]
    assert kept and not any(name.endswith(".part") for name in kept)
    end = (
        f"Give the same command again when that is mended; it goes on after the {len(kept)} files that are "
        "finished."
    )
    if code == errno.ENOSPC:
        missing = int(message.removeprefix("the file system is full; ").split()[0])
        assert message == f"the file system is full; {missing} bytes more than it has are needed. {end}"
    elif code == errno.EIO:
        assert message == f"writing failed: Input/output error. {end}"
    else:
        assert message.startswith(f"{os.strerror(code)}; ") and message.endswith(
            f" bytes are still to be written. {end}"
        )
    monkeypatch.setattr(os, "pwrite", real_write)
    first = int(refused(inputs, tmp_path / "work/out").split()[0])
    disk.f_bavail = 10**6
    lorafuse.convert(*inputs, tmp_path / "work/out", max_shard_size=SHARD)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["out"]
    total = sum(
        -(-len(data) // 4096) * 4096
        for name, data in files_of(tmp_path / "work/out").items()
        if "safetensors" in name
    )
    assert first < total + 300_000 - 4096 * len(kept)


def test_no_room_for_the_journal(inputs, tmp_path, monkeypatch):
    """Writes do not say where they fail."""
    real_write = os.write

    def write(fd, data):
        if "journal" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left") as caught:
        lorafuse.convert(*inputs, tmp_path / "work/out")
    assert caught.value.filename == str(tmp_path / "work/out")
    assert [*(tmp_path / "work").iterdir()] == []


def test_a_really_full_file_system(inputs, tmp_path):
    """A tmpfs of its own, as small as no result, then one that a stranger fills while the run writes."""
    lorafuse.convert(*inputs, tmp_path / "clean", max_shard_size=SHARD)
    code = """
import os, sys, time, lorafuse
from lorafuse.outdir.staging import LocalOutDir
args, work = sys.argv[1:3], sys.argv[3]
def run():
    try:
        lorafuse.convert(*args, work + "/out", max_shard_size=1400)
    except lorafuse.errors.StorageError as e:
        assert not os.path.exists(work + "/out"), e
        return str(e)
assert "are missing" in run() and os.listdir(work) == []
os.system(f"mount -o remount,size=600k {work}")
real_create, real_record, created, recorded = LocalOutDir.create, LocalOutDir.record, [], []
def record(self, *args):
    real_record(self, *args)
    recorded.append(1)
def create(self, file, nbytes):
    created.append(1)
    if len(created) == 5:
        while len(recorded) < 3: time.sleep(0.01)
        with open(work + "/filler", "wb", buffering=0) as f:
            try:
                while f.write(b"x" * 4096): pass
            except OSError: pass
    return real_create(self, file, nbytes)
LocalOutDir.create, LocalOutDir.record = create, record
assert "bytes more than it has are needed" in (said := run()), said
os.unlink(work + "/filler")
assert "3 files" in said and run() is None and os.listdir(work) == ["out"]
os.system(f"cp -r {work}/out {sys.argv[4]}")
"""
    work, copy = tmp_path / "work", tmp_path / "copy"
    run_with_mount(
        'mount -t tmpfs -o size=100k x "$1"', work, "--", sys.executable, "-c", code, *inputs, work, copy
    )
    found, clean = files_of(copy), files_of(tmp_path / "clean")
    assert {k: v for k, v in found.items() if k != RECEIPT} == {
        k: v for k, v in clean.items() if k != RECEIPT
    }


@pytest.mark.soak
@pytest.mark.parametrize(
    ("mount", "namespace"),
    [
        ('mount -t tmpfs -o size=600k x "$1"', "-rm"),
        ('truncate -s 4M "$2" && mkfs.ext4 -q -m 0 "$2" && mount -o loop "$2" "$1"', "-m"),
    ],
    ids=["tmpfs", "ext4"],
)
def test_a_disk_that_fills_up_at_any_moment(mount, namespace, tmp_path, share_s, request, capsys):
    """fill_disk.py."""
    inputs, work, clean = five_shards(tmp_path), tmp_path / "work", tmp_path / "clean"
    work.mkdir()
    uninterrupted(inputs, clean)
    script = [
        sys.executable,
        fill_disk.__file__,
        *inputs,
        work,
        clean,
        "40",
        str(share_s),
    ]
    said = run_with_mount(
        mount, work, tmp_path / "image", "--", *script, namespace=namespace, timeout=180 + share_s
    )
    if share_s:
        with capsys.disabled():
            sys.stdout.write(f"\n{request.node.name}: {said}")
