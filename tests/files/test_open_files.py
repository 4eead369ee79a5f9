"""Checkpoints of more files than may be open."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from lorafuse.files import local_folder
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.open_files import OpenFiles


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Fifty open files, of which four stay open: file i holds 100 bytes i."""
    monkeypatch.setattr(local_folder, "OPEN_FILES", OpenFiles(4))
    for number in range(50):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    with ExitStack() as stack:
        folder = LocalFolder(tmp_path)
        yield [stack.enter_context(closing(folder.open(str(number)))) for number in range(50)]


def n_open():
    return len(os.listdir("/proc/self/fd"))


def read(file, start=40):
    buffer = bytearray(7)
    file.will_need(start, 7)
    assert file.read_into(start, buffer) == 7
    return bytes(buffer)


def test_few_are_open_and_all_are_read_by_any_thread(files):
    before = n_open()
    numbers = [number * 7 % 50 for number in range(2000)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: read(files[number]), numbers))
    assert found == [bytes([number]) * 7 for number in numbers]
    assert n_open() <= before


def test_the_limit_of_the_system_is_not_reached(files):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open() + 10, hard))
    try:
        assert [read(file)[0] for file in files] == list(range(50))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_another_file_of_the_name_is_refused(files, tmp_path, how):
    """Its size and time may be the same."""
    path = tmp_path / "3"
    before = os.stat(path)
    if how == "replaced":
        path.unlink()
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OSError, match="was replaced or changed while it was read"):
        read(files[3])


def test_a_relative_name_after_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(local_folder, "OPEN_FILES", OpenFiles(1))
    for name in "ab":
        (tmp_path / name).write_bytes(b"1234567")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        first, second = (stack.enter_context(closing(LocalFolder.at(".").open(name))) for name in "ab")
        monkeypatch.chdir("/")
        assert [read(file, 0) for file in (first, second, first)] == [b"1234567"] * 3
