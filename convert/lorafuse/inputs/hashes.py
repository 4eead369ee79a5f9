"""The sha256 of every input file, as the receipt lists them."""

import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.hashing import FileHash, hash_file

if TYPE_CHECKING:
    from lorafuse.planning.combine import WeightedAdapter


class InputFile(NamedTuple):
    """A file that is read, and what a receipt says of it before it is hashed."""

    folder: Folder
    name: str
    entry: dict[str, Any]


class InputHashes:
    """sha256 of every input file, taken in a thread beside the merge; leaving the context early stops it."""

    def __init__(self, ckpt: Checkpoint, ckpt_name: str, adapters: Sequence["WeightedAdapter"]) -> None:
        names = ["config.json", *(shard.name for shard in ckpt.shards)]
        self._files = [
            InputFile(ckpt.folder, name, {"role": "checkpoint", "path": path_of(ckpt_name, None, name)})
            for name in names
        ]
        for weighted in adapters:
            self._files += _files_of(weighted, {"weight": weighted.weight} if len(adapters) > 1 else {})
        self._stop = Event()
        self._executor = ThreadPoolExecutor(1, "hash")

    def __enter__(self) -> "InputHashes":
        self._future = self._executor.submit(
            lambda: [file.entry | self._hashed(file) for file in self._files]
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown()

    def result(self) -> list[dict[str, Any]]:
        """role, path (the input as it was named, then the file), size and sha256 of each file; with several
        adapters also the weight of each."""
        return self._future.result()

    def _hashed(self, file: InputFile) -> dict[str, Any]:
        return hash_file(file.folder, file.name, self._go_on)._asdict()

    def _go_on(self, _: int) -> None:
        if self._stop.is_set():
            raise CancelledError


def adapter_hashes(
    weighted: "WeightedAdapter", hashed: Callable[[Folder, str], FileHash]
) -> list[dict[str, Any]]:
    """The same for the files of one adapter, at once."""
    return [file.entry | hashed(file.folder, file.name)._asdict() for file in _files_of(weighted, {})]


def path_of(input_name: str, sub_folder: str | None, file: str) -> str:
    """What a receipt calls a file: the input as the user named it, then the file in it."""
    return f"{input_name.rstrip('/')}/{posixpath.normpath(posixpath.join(sub_folder or '', file))}"


def _files_of(weighted: "WeightedAdapter", facts: dict[str, float]) -> list[InputFile]:
    adapter = weighted.adapter
    paths = {name: path_of(adapter.name, adapter.sub_folder, name) for name in adapter.files}
    return [
        InputFile(adapter.folder, name, {"role": "adapter", "path": path} | facts)
        for name, path in paths.items()
    ]
