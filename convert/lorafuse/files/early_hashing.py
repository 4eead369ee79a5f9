"""Hashing that begins while torch is imported, which keeps one core busy for a second or two, and no disk."""

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from mmap import mmap
from threading import Event, Thread, stack_size
from typing import Any, NamedTuple

from lorafuse.errors import LorafuseError
from lorafuse.files.folder import FileFacts
from lorafuse.files.local_folder import LocalFolder, directory_as_typed
from lorafuse.files.names import SINGLE

WEIGHTS = SINGLE.replace(".", "*.")  # its shards, too
# The thread asks for the interpreter's lock after each, and the import lets go of it after 5 ms.
READ_NBYTES = 4 << 20
# glibc keeps the stack of a thread that ended for the next thread that asks for no more. Where memory is out,
# that thread would begin, and die before it says so, which Python waits for without end. Other threads ask
# for 8 MB, which is then refused as it should be.
STACK_NBYTES = 1 << 20


class Begun(NamedTuple):
    """The hash of a file's first bytes, and what was known of the file before it was read."""

    digest: Any
    nbytes: int
    facts: FileFacts | None


_BEGUN: dict[str, Begun] = {}


def begun_hash(label: str, facts: FileFacts) -> Begun:
    """What there is of the hash of a file: nothing, unless it is the same file as then. It is given once."""
    begun = _BEGUN.pop(label, None)
    return begun if begun and begun.facts == facts else Begun(hashlib.sha256(), 0, None)


@contextmanager
def hashing_meanwhile(name: str) -> Iterator[None]:
    """The weights in a directory are hashed in another thread, file by file, until the context ends;
    `hash_file` goes on from there. What goes wrong is left to whoever reads the file next. Does nothing for
    what is no directory here, as an empty name."""
    stop = Event()
    thread = Thread(target=_hash, args=(name, stop), name="early-hash", daemon=True)
    try:
        if name:
            others = stack_size(STACK_NBYTES)
            try:
                thread.start()
            finally:
                stack_size(others)
        yield
    finally:
        stop.set()
        if thread.ident:  # it was started
            thread.join()


def _hash(name: str, stop: Event) -> None:
    # Memory of its own: of what malloc gives and gets back, it would keep more ever after.
    with suppress(OSError, LorafuseError), mmap(-1, READ_NBYTES) as buffer, memoryview(buffer) as view:
        folder = LocalFolder.at(directory_as_typed(name))
        for file_name in folder.names(WEIGHTS):
            with closing(folder.open(file_name)) as file:
                digest, nbytes = hashlib.sha256(), 0
                while not stop.is_set() and (n := file.read_into(nbytes, view)):
                    digest.update(view[:n])
                    nbytes += n
                _BEGUN[folder / file_name] = Begun(digest, nbytes, file.facts)
            if stop.is_set():
                return
