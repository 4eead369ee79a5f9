"""The sha256 of every input file, as the receipt lists them."""

import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import FileHash, Folder
from lorafuse.files.hashing import checked_hash
from lorafuse.receipt.fields import InputEntry

if TYPE_CHECKING:
    from lorafuse.planning.combine import WeightedAdapter


AHEAD_NBYTES = 32 << 20  # hashed of a checkpoint before the merge has read as much
POLL_S = 0.01


class InputFile(NamedTuple):
    """A file that is read, and what a receipt says of it before it is hashed."""

    folder: Folder
    name: str
    role: Literal["checkpoint", "adapter"]
    path: str
    weight: float | None = None

    def entry(self, hashed: FileHash) -> InputEntry:
        """What a receipt says of it."""
        entry: dict[str, Any] = {"role": self.role, "path": self.path}
        if self.weight is not None:
            entry["weight"] = self.weight
        entry |= {"size": hashed.size, "sha256": hashed.sha256}
        if self.folder.commit is not None:
            entry["commit"] = self.folder.commit
        return cast(InputEntry, entry)


class InputHashes:
    """sha256 of every input file, taken in a thread beside the merge; leaving the context early stops it.

    Each file is read for it once more, in its own order; a merge reads in the order of names. That takes a
    sixth of what SHA-256 takes (bench/speed/hashing.py). The hash keeps about as far as the merge, a little
    ahead of it, so that the disk reads a byte once, whichever of the two comes first: the other one finds it
    in the page cache, even of a checkpoint that is larger than memory. A file whose hash this run has
    compared when it was fetched is not read.
    """

    def __init__(self, ckpt: Checkpoint, ckpt_name: str, adapters: Sequence["WeightedAdapter"]) -> None:
        names = [*ckpt.config_files, *(shard.name for shard in ckpt.shards)]
        self._files = [
            InputFile(ckpt.folder, name, "checkpoint", path_of(ckpt_name, None, name)) for name in names
        ]
        self._files += _files_of(adapters)
        self._ckpt, self._n_hashed = ckpt, 0
        self._stop, self._hurries = Event(), Event()
        self._executor = ThreadPoolExecutor(1, "hash")

    def __enter__(self) -> "InputHashes":
        self._future = self._executor.submit(lambda: [file.entry(self._hashed(file)) for file in self._files])
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown()

    def result(self) -> list[InputEntry]:
        """role, path (the input as it was named, then the file), size and sha256 of each file; with several
        adapters also the weight of each. The merge has read what it reads."""
        self._hurries.set()
        return self._future.result()

    def _hashed(self, file: InputFile) -> FileHash:
        return checked_hash(file.folder, file.name, self._go_on)

    def _go_on(self, nbytes: int) -> None:
        self._n_hashed += nbytes
        while self._n_hashed > self._ckpt.nbytes_read + AHEAD_NBYTES and not self._hurries.is_set():
            if self._stop.wait(POLL_S):
                break
        if self._stop.is_set():
            raise CancelledError


def adapter_hashes(
    adapters: Sequence["WeightedAdapter"], hashed: Callable[[Folder, str], FileHash]
) -> list[InputEntry]:
    """The same for the files of adapters alone, at once."""
    return [file.entry(hashed(file.folder, file.name)) for file in _files_of(adapters)]


def path_of(input_name: str, sub_folder: str | None, file: str) -> str:
    """What a receipt calls a file: the input as the user named it, then the file in it."""
    return f"{input_name.rstrip('/')}/{posixpath.normpath(posixpath.join(sub_folder or '', file))}"


def _files_of(adapters: Sequence["WeightedAdapter"]) -> list[InputFile]:
    files = []
    for adapter, weight in ((weighted.adapter, weighted.weight) for weighted in adapters):
        told = weight if len(adapters) > 1 else None
        for name in adapter.files:
            path = path_of(adapter.name, adapter.sub_folder, name)
            files.append(InputFile(adapter.folder, name, "adapter", path, told))
    return files
