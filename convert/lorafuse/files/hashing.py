"""sha256 of files, a piece at a time."""

from collections.abc import Callable
from contextlib import closing

from lorafuse.errors import StorageError, shown
from lorafuse.files.early_hashing import begun_hash
from lorafuse.files.folder import FileHash, Folder

READ_NBYTES = 1 << 20


def hash_file(folder: Folder, name: str, on_nbytes: Callable[[int], object] = lambda n: None) -> FileHash:
    """Size and sha256 of a file, 1 MiB at a time, after what `hashing_meanwhile` has; `on_nbytes` hears of
    each piece and may end it by an exception. Raises FormatError for what is no regular file, OSError."""
    view = memoryview(bytearray(READ_NBYTES))
    with closing(folder.open(name)) as file:
        digest, nbytes, _ = begun_hash(folder / name, file.facts)
        if nbytes:
            on_nbytes(nbytes)
        while n := file.read_into(nbytes, view):
            digest.update(view[:n])
            nbytes += n
            on_nbytes(n)
    return FileHash(nbytes, digest.hexdigest())


def checked_hash(folder: Folder, name: str, on_nbytes: Callable[[int], object] = lambda n: None) -> FileHash:
    """The same. What was compared, or is not on this machine, is not read: the place says what it holds.
    Raises StorageError when a copy on this machine is another file."""
    known = folder.known_hash(name)
    if known and not folder.is_unchecked(name):
        return known
    hashed = hash_file(folder, name, on_nbytes)
    if known and hashed != known:
        raise StorageError(
            f"{shown(folder / name)}: the copy in the hub's cache is not the file that the hub lists: its "
            f"sha256 is {hashed.sha256}, expected {known.sha256}. Remove it from the cache (`hf cache rm`), "
            "and run again."
        )
    return hashed
