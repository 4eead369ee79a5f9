"""One run at a time for an OUT_DIR, where it is staged, and how that becomes OUT_DIR."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from build import files_of, write_adapter, write_checkpoint
from faults import run_with_mount

import lorafuse
from lorafuse.batching import one_pass
from lorafuse.errors import HeldError, OutDirError
from lorafuse.files.names import RECEIPT
from lorafuse.merge.destination import Written
from lorafuse.outdir import commit, interrupts
from lorafuse.outdir.commit import StagingPlace
from lorafuse.outdir.journal import Attempt, read_journal
from lorafuse.outdir.local import check_out_dir
from lorafuse.outdir.lock import Lock
from lorafuse.outdir.sidecars import write_json
from lorafuse.outdir.staging import LocalOutDir

ATTEMPT = Attempt("0123456789abcdef", {"dtype": "auto"}, {"file": "hash"}, {"lorafuse": "1"})


def fill(staging, **files):
    for name, text in files.items():
        (staging.path / name).write_text(text)


def names(path):
    return sorted(p.name for p in path.iterdir())


# ---- the lock


def test_a_second_run_is_refused_while_the_first_writes(tmp_path):
    """At once, with exit 6, and it leaves the first alone."""
    out = tmp_path / "out"
    with LocalOutDir(out, "a" * 64, ATTEMPT) as staging:
        fill(staging, x="1")
        before = files_of(tmp_path)
        with pytest.raises(
            HeldError,
            match=rf"^{out}: another run is writing it; wait for it, or choose another directory\.$",
        ):
            LocalOutDir(out, "b" * 64, ATTEMPT).__enter__()
        assert files_of(tmp_path) == before and HeldError.exit_code == 6
        staging.commit()
    assert files_of(tmp_path) == {"out/x": b"1"}


def test_the_lock_is_that_of_the_real_directory(tmp_path):
    """Whatever name leads to it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with LocalOutDir(tmp_path / "real/out", "a" * 64), pytest.raises(HeldError):
        LocalOutDir(tmp_path / "link/../link/out/", "a" * 64).__enter__()


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between open and flock the run that held it may have ended, and a third one made a new file: then that
    one counts."""
    path, real_flock, n = tmp_path / "lock", fcntl.flock, []

    def flock(fd, flags):
        n.append(fd)
        if len(n) == 1:
            path.unlink()
        real_flock(fd, flags)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = Lock(path, tmp_path / "out")
    lock.acquire()
    assert len(n) == 2 and path.exists()
    with pytest.raises(HeldError):
        Lock(path, tmp_path / "out").acquire()
    lock.release()
    assert not path.exists()


RUN = """
import sys, time, lorafuse
try:
    lorafuse.convert(*sys.argv[1:4], max_shard_size=1400)
except lorafuse.errors.LorafuseError as e:
    sys.exit(e.exit_code)
"""


def test_of_many_runs_one_wins(tmp_path):
    """Each ends with 0, 6 or 7, one with 0, and the result is whole."""
    ckpt, adapter = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "adapter")
    lorafuse.convert(ckpt, adapter, tmp_path / "clean", max_shard_size=1400)
    env = os.environ | {"PYTHONPATH": str(Path(lorafuse.__file__).parents[1])}
    out = tmp_path / "work" / "out"
    args = [sys.executable, "-c", RUN, str(ckpt), str(adapter), str(out)]
    codes = [process.wait(120) for process in [subprocess.Popen(args, env=env) for _ in range(4)]]
    assert codes.count(0) == 1 and {*codes} <= {0, 6, 7}
    found, clean = files_of(out), files_of(tmp_path / "clean")
    assert {k: v for k, v in found.items() if k != RECEIPT} == {
        k: v for k, v in clean.items() if k != RECEIPT
    }
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("flock", ["unsupported", "of no effect"])
def test_without_locks_the_rename_decides(flock, tmp_path, monkeypatch):
    """Some network file systems have none. Two runs are in the loop at once; one wins, the other ends with 7,
    and the result is whole."""

    def broken(fd, flags):
        if flock == "unsupported":
            raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", broken)
    ckpt, adapter = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "adapter")
    lorafuse.convert(ckpt, adapter, tmp_path / "clean", max_shard_size=1400)
    both, real_merge, ended = threading.Barrier(2), one_pass.merge, []

    def merge(*args, **kw):
        both.wait(60)
        real_merge(*args, **kw)

    monkeypatch.setattr(one_pass, "merge", merge)

    def run():
        try:
            lorafuse.convert(ckpt, adapter, tmp_path / "work/out", max_shard_size=1400)
            ended.append(0)
        except OutDirError as e:
            ended.append(e.exit_code)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        while thread is threads[0] and not both.n_waiting:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert sorted(ended) == [0, 7]
    found, clean = files_of(tmp_path / "work/out"), files_of(tmp_path / "clean")
    assert {k: v for k, v in found.items() if k != RECEIPT} == {
        k: v for k, v in clean.items() if k != RECEIPT
    }


def test_a_run_whose_work_was_taken_over_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda fd, flags: None)
    out = tmp_path / "out"
    with (
        pytest.raises(OutDirError, match="another run took over what this one had begun"),
        LocalOutDir(out, "a" * 64, ATTEMPT) as one,
    ):
        fill(one, s="1")
        one.record(Written("s", 1, "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"), {})
        with LocalOutDir(out, "a" * 64, ATTEMPT) as other:
            assert [*other.finished] == ["s"] and names(other.path) == ["s"]
            other.commit()
        one.commit()
    assert files_of(tmp_path) == {"out/s": b"1"}


# ---- where it is staged


def test_staging_is_hidden_and_beside(tmp_path):
    with LocalOutDir(tmp_path / "a/b/out", "0123456789", ATTEMPT) as staging:
        assert re.fullmatch(
            r"\.out\.lorafuse-01234567-[0-9a-f]{8}/out", str(staging.path.relative_to(tmp_path / "a/b"))
        )
        assert not (tmp_path / "a/b/out").exists()
        assert names(staging.path.parent) == ["journal.jsonl", "out"]
    assert names(tmp_path / "a/b") == []


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "\udcff" * 250])
def test_long_names(name, tmp_path):
    """A name may have 255 bytes, and two that begin alike do not meet."""
    with (
        LocalOutDir(tmp_path / name, "a" * 64) as one,
        LocalOutDir(tmp_path / f"{name[:-1]}y", "a" * 64) as other,
    ):
        one.commit()
        other.commit()
    assert names(tmp_path) == sorted([name, f"{name[:-1]}y"])


def test_what_belongs_to_others_stays(tmp_path):
    """Names that only look like those of this OUT_DIR's runs."""
    others = [
        ".out.lorafuse-1",
        ".out.lorafuse-01234567-0123456g",
        ".out2.lorafuse-01234567-01234567",
        "out.lorafuse-01234567-01234567",
    ]
    for name in [*others, ".out.lorafuse-01234567-01234567"]:
        (tmp_path / name).mkdir()
    with LocalOutDir(tmp_path / "out", "a" * 64) as staging:
        staging.commit()
    assert names(tmp_path) == sorted([*others, "out"])


def test_without_an_attempt_nothing_is_kept(tmp_path):
    """Nor anything resumed: it is not known what it was made of."""
    with pytest.raises(KeyboardInterrupt), LocalOutDir(tmp_path / "out", "a" * 64) as staging:
        fill(staging, s="1")
        staging.record(Written("s", 1, ""), {})
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_the_journal_survives_json(tmp_path):
    """Sums that are no numbers, and the smallest."""
    from lorafuse.arithmetic.measure import Measures

    measures = {"a": Measures(3, float("inf"), 5e-324, 0.1 + 0.2, float("-inf"), 2)}
    with pytest.raises(KeyboardInterrupt), LocalOutDir(tmp_path / "out", "a" * 64, ATTEMPT) as staging:
        fill(staging, s="1")
        staging.record(Written("s", 1, "h"), measures)
        raise KeyboardInterrupt
    record = read_journal(next(tmp_path.iterdir()))
    assert record.attempt == ATTEMPT and record.finished["s"].measures == measures


# ---- inside OUT_DIR


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "_is_mount", lambda path: path == tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lost+found").mkdir()
    return tmp_path / "out"


def test_a_mount_point_is_filled_from_inside(mounted, tmp_path):
    """It cannot be renamed to. What a new file system has counts as nothing."""
    check_out_dir(str(mounted), [], overwrite=False)
    with LocalOutDir(mounted, "a" * 64, ATTEMPT) as staging:
        assert staging.path.parent.parent == mounted
        fill(staging, **{"a.safetensors": "1", "config.json": "2", RECEIPT: "3"})
        staging.commit()
    assert names(mounted) == sorted(["a.safetensors", "config.json", RECEIPT, "lost+found"]) and names(
        tmp_path
    ) == ["out"]


def test_the_order_of_moves(mounted, monkeypatch):
    """Shards, the rest, config.json, the receipt, each synced before the next."""
    moves, real_rename, real_sync = [], os.rename, commit.fsync_dir
    with LocalOutDir(mounted, "a" * 64) as staging:
        fill(
            staging,
            **{
                "b.safetensors": "",
                "a.json": "",
                "config.json": "",
                RECEIPT: "",
                "model.safetensors.index.json": "",
            },
        )
        monkeypatch.setattr(os, "rename", lambda a, b: (moves.append(b.name), real_rename(a, b)))
        synced = lambda path: (moves.append(path == mounted), real_sync(path))  # noqa: E731
        monkeypatch.setattr(commit, "fsync_dir", synced)
        staging.commit()
    moves = [move for move in moves if move is not False]
    assert moves[:2] == ["b.safetensors", True] and {*moves[2:4]} == {
        "a.json",
        "model.safetensors.index.json",
    }
    assert moves[4:] == [True, "config.json", True, RECEIPT, True]


def test_a_mount_point_with_something_in_it_is_refused(mounted):
    (mounted / "model.safetensors").write_text("mine")
    with pytest.raises(OutDirError, match="exists and is not empty"):
        check_out_dir(str(mounted), [], overwrite=False)
    with pytest.raises(OutDirError, match="exists and is not empty"), LocalOutDir(mounted, "a" * 64):
        pass
    assert files_of(mounted) == {"model.safetensors": b"mine"}


def test_overwriting_a_mount_point_removes_what_was_there(mounted):
    for name in ("config.json", "old.safetensors"):
        (mounted / name).write_text("old")
    (mounted / "sub").mkdir()
    (mounted / "link").symlink_to("sub")
    with LocalOutDir(mounted, "a" * 64, overwrite=True) as staging:
        fill(staging, **{"config.json": "new", RECEIPT: "new"})
        staging.commit()
    assert names(mounted) == ["config.json", RECEIPT, "lost+found"]


def test_a_real_mount_point(tmp_path):
    """Renaming to it gives EBUSY; a bind mount of the same file system is only in mountinfo."""
    ckpt, adapter = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "adapter")
    (tmp_path / "out dir").mkdir()
    (tmp_path / "volume").mkdir()
    code = (
        "import lorafuse; from lorafuse.outdir.commit import StagingPlace; p = "
        f"{str(tmp_path / 'out dir')!r}\nfrom pathlib import Path; assert StagingPlace.of(Path(p)).inside\n"
        f"lorafuse.convert({str(ckpt)!r}, {str(adapter)!r}, p)"
    )
    there = (tmp_path / "volume", tmp_path / "out dir")
    run_with_mount('mount --bind "$1" "$2"', *there, "--", sys.executable, "-c", code)
    assert names(tmp_path / "volume") == ["config.json", RECEIPT, "model.safetensors"]
    assert names(tmp_path) == ["adapter", "ckpt", "out dir", "volume"]


def test_a_parent_that_may_not_be_written(tmp_path, monkeypatch):
    """As of a directory that somebody else made for this user."""
    (tmp_path / "out").mkdir()
    real_access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real_access(path, mode))
    assert StagingPlace.of(tmp_path / "out").inside and not StagingPlace.of(tmp_path / "none").inside


# ---- the commit


def test_a_directory_that_another_run_filled_meanwhile_stays(tmp_path):
    """Without --overwrite nothing is replaced, whenever it came."""
    out = tmp_path / "out"
    with (
        pytest.raises(OutDirError, match="another run has just made it"),
        LocalOutDir(out, "a" * 64) as staging,
    ):
        fill(staging, x="mine")
        out.mkdir()
        (out / "x").write_text("theirs")
        staging.commit()
    assert files_of(tmp_path) == {"out/x": b"theirs"}


def test_a_directory_that_was_filled_before_is_refused_under_the_lock(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").write_text("theirs")
    with pytest.raises(OutDirError, match="exists and is not empty"), LocalOutDir(tmp_path / "out", "a" * 64):
        pass
    assert files_of(tmp_path) == {"out/x": b"theirs"} and names(tmp_path) == ["out"]


def test_every_directory_is_synced(tmp_path, monkeypatch):
    """Of the result, its parents that were made, and the one that holds its name."""
    synced, real_fsync = set(), os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))
    )
    with LocalOutDir(tmp_path / "a/b/out", "a" * 64) as staging:
        (staging.path / "sub").mkdir()
        write_json(staging, "sub/x.json", {})
        path = staging.path
        staging.commit()
    assert {
        str(p) for p in (tmp_path, tmp_path / "a", tmp_path / "a/b", path, path / "sub", path / "sub/x.json")
    } <= synced


# ---- interruptions


def test_an_interruption_waits_while_it_must():
    kept = interrupts.Hold()
    with pytest.raises(KeyboardInterrupt):
        kept.interrupt(KeyboardInterrupt())
    done = []
    with pytest.raises(KeyboardInterrupt), kept:
        with kept:
            kept.interrupt(KeyboardInterrupt())
            done.append(1)
        done.append(2)
    assert done == [1, 2]
    with kept:
        kept.interrupt(KeyboardInterrupt())
        kept.forget()


def test_an_interruption_during_the_commit_comes_too_late(tmp_path, monkeypatch):
    """The result is complete then, and the run a success."""
    real_rename = os.rename

    def rename(a, b):
        interrupts.UNINTERRUPTED.interrupt(KeyboardInterrupt())
        real_rename(a, b)

    with LocalOutDir(tmp_path / "out", "a" * 64) as staging:
        monkeypatch.setattr(os, "rename", rename)
        staging.commit()
    assert names(tmp_path) == ["out"]
