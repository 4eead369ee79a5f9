"""The sha256 of every input file, as the receipt lists them."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.hashing import FileHash, hash_file

if TYPE_CHECKING:
    from lorafuse.planning.combine import WeightedAdapter


class InputHashes:
    """sha256 of every input file, taken in a thread beside the merge; leaving the context early stops it."""

    def __init__(self, ckpt: Checkpoint, ckpt_name: str, adapters: Sequence["WeightedAdapter"]) -> None:
        files = (ckpt.path / "config.json", *(shard.path for shard in ckpt.shards))
        self._files = [(path, _entry("checkpoint", ckpt_name, ckpt.path, path)) for path in files]
        for one in adapters:
            self._files += _adapter_files(one, {"weight": one.weight} if len(adapters) > 1 else {})
        self._stop = Event()
        self._executor = ThreadPoolExecutor(1, "hash")

    def __enter__(self) -> "InputHashes":
        self._future = self._executor.submit(
            lambda: [entry | self._hashed(path) for path, entry in self._files]
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown()

    def result(self) -> list[dict[str, Any]]:
        """role, path (the input as it was named, then the file), size and sha256 of each file; with several
        adapters also the weight of each."""
        return self._future.result()

    def _hashed(self, path: Path) -> dict[str, Any]:
        return hash_file(path, self._go_on)._asdict()

    def _go_on(self, _: int) -> None:
        if self._stop.is_set():
            raise CancelledError


def adapter_hashes(one: "WeightedAdapter", hashed: Callable[[Path], FileHash]) -> list[dict[str, Any]]:
    """The same for the files of one adapter, at once."""
    return [entry | hashed(path)._asdict() for path, entry in _adapter_files(one, {})]


def _adapter_files(one: "WeightedAdapter", facts: dict[str, float]) -> list[tuple[Path, dict[str, Any]]]:
    adapter = one.adapter
    return [(path, _entry("adapter", adapter.name, adapter.root, path) | facts) for path in adapter.files]


def _entry(role: str, name: str, root: Path, path: Path) -> dict[str, Any]:
    return {"role": role, "path": f"{name.rstrip('/')}/{path.relative_to(root)}"}
