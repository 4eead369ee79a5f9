"""In a directory where others may write too, only what this user made is taken over, locked or removed."""

import os
import stat

import pytest
from build import files_of

from lorafuse.errors import OutDirError
from lorafuse.outdir.journal import Attempt, Journal
from lorafuse.outdir.local import check_out_dir, clean_up, left_nbytes
from lorafuse.outdir.lock import Lock
from lorafuse.outdir.staging import LocalOutDir

ATTEMPT = Attempt("0123456789abcdef", {"dtype": "auto"}, {"file": "hash"}, {"lorafuse": "1"})


def stranger(monkeypatch):
    """From now on, what is there already belongs to somebody else."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def plant(tmp_path):
    """What a run that was cut off after a shard leaves."""
    folder = tmp_path / ".out.lorafuse-01234567-89abcdef"
    (folder / "out").mkdir(parents=True)
    (folder / "out/x.safetensors").write_bytes(b"doctored")
    Journal(folder, ATTEMPT, {}).close()
    return folder


def others(folder, monkeypatch):
    stranger(monkeypatch)


def writable(folder, monkeypatch):
    folder.chmod(0o775)


def linked(folder, monkeypatch):
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize("change", [others, writable, linked])
def test_a_staging_directory_that_others_could_fill_is_left_alone(change, tmp_path, monkeypatch):
    """It is neither resumed nor removed, and a warning says so."""
    folder, events = plant(tmp_path), []
    change(folder, monkeypatch)
    before = files_of(tmp_path)
    assert left_nbytes([str(tmp_path / "out")]) == 0
    clean_up(str(tmp_path / "out"))
    with LocalOutDir(tmp_path / "out", "a" * 64, ATTEMPT, restart=True, on_event=events.append) as staging:
        assert not staging.finished
        (staging.path / "y").write_text("1")
        staging.commit()
    assert [event["message"] for event in events] == [
        f"{folder}: is left alone, since others than this user could have written to it; remove it if nobody "
        "needs it."
    ]
    assert files_of(tmp_path) == before | {"out/y": b"1"}


def test_this_users_own_is_taken_over(tmp_path):
    folder = plant(tmp_path)
    with LocalOutDir(tmp_path / "out", "a" * 64, ATTEMPT):
        assert not folder.exists()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_nobody_else_reaches_what_is_in_the_making(umask, tmp_path):
    """The result has the mode that the umask gives."""
    before = os.umask(umask)
    try:
        with LocalOutDir(tmp_path / "out", "a" * 64, ATTEMPT) as staging:
            assert stat.S_IMODE(staging.path.parent.stat().st_mode) == 0o700
            lock = tmp_path / ".out.lorafuse.lock"
            assert stat.S_IMODE(lock.stat().st_mode) == 0o600 & ~umask
            staging.commit()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def lock_of_others(lock, monkeypatch):
    lock.touch(0o600)
    stranger(monkeypatch)


def lock_for_all(lock, monkeypatch):
    lock.touch()
    lock.chmod(0o666)


def lock_link(lock, monkeypatch):
    (lock.parent / "thesis").write_text("mine")
    lock.symlink_to("thesis")


def lock_dangling(lock, monkeypatch):
    lock.symlink_to("nowhere")


def lock_second_name(lock, monkeypatch):
    (lock.parent / "thesis").write_text("mine")
    (lock.parent / "thesis").chmod(0o600)
    lock.hardlink_to(lock.parent / "thesis")


def lock_fifo(lock, monkeypatch):
    os.mkfifo(lock, 0o600)


@pytest.mark.parametrize(
    "make", [lock_of_others, lock_for_all, lock_link, lock_dangling, lock_second_name, lock_fifo]
)
def test_a_lock_that_is_not_this_users_is_refused(make, tmp_path, monkeypatch):
    """It is not opened, and stays as it is."""
    lock = tmp_path / ".out.lorafuse.lock"
    make(lock, monkeypatch)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OutDirError) as e:
        LocalOutDir(tmp_path / "out", "a" * 64, ATTEMPT).__enter__()
    assert str(e.value) == (
        f"{lock}: is no lock file of this user alone, but may be another user's; once nobody writes "
        f"{tmp_path}/out, remove it, or choose another directory."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    check_out_dir(str(tmp_path / "out"), [], overwrite=False)
    clean_up(str(tmp_path / "out"))


def test_a_lock_that_a_killed_run_left_is_used(tmp_path):
    path = tmp_path / "lock"
    path.touch(0o600)
    lock = Lock(path, tmp_path / "out")
    lock.acquire()
    lock.release()
    assert not path.exists()
