"""An exception of a signal handler may come right after a file was opened, before anything holds it: it is
closed all the same."""

import os
import signal

import pytest

from lorafuse.files.local_folder import LocalFolder
from lorafuse.outdir.local_file import LocalOutFile


class InterruptedHereError(Exception):
    pass


@pytest.mark.parametrize("kind", ["read", "written"])
def test_what_is_interrupted_is_closed(kind, tmp_path, monkeypatch):
    """The signal comes between the kernel's answer and the next step of Python."""
    (tmp_path / "a").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))

    def raise_it(*_: object) -> None:
        raise InterruptedHereError

    kernel = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: raise_it() if kind == "read" else kernel(fd))
    old = signal.signal(signal.SIGUSR1, raise_it)
    try:
        with pytest.raises(InterruptedHereError):
            if kind == "read":
                LocalFolder(tmp_path).open("a")
            else:
                LocalOutFile(tmp_path / "b")
                signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before
