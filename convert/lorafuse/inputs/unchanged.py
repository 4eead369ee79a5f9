"""The files that a run reads: what tells their contents apart from those of an earlier run, and whether they
changed meanwhile."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorafuse._version import __version__
from lorafuse.adapters.reading.check_tensors import refuse_nonfinite
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.hashing import FileHash, hash_file
from lorafuse.files.safetensors_file import Stamp
from lorafuse.files.stores import ShardedStore
from lorafuse.outdir.journal import Attempt
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.plan import Plan
from lorafuse.settings import Settings


class UnchangedInputs:
    """The files of a checkpoint and its adapters, as they were when they were opened."""

    def __init__(self, ckpt: Checkpoint, ckpt_name: str, adapters: Sequence[WeightedAdapter]) -> None:
        self._names = {"checkpoint": _lasting(ckpt_name, ckpt.path)}
        self._names |= {
            f"adapter {i}": _lasting(one.adapter.name, one.adapter.path) for i, one in enumerate(adapters, 1)
        }
        self._weights = {
            f"weight {i}": one.weight for i, one in enumerate(adapters[1:], 2)
        }  # the first has adapter_scale
        self._shards, self._adapters = ckpt.shards, [one.adapter for one in adapters]
        self._whole = [ckpt.path / "config.json", *(path for one in adapters for path in one.adapter.files)]
        self._hashes: dict[Path, FileHash] = {}
        self._stamps = {path: Stamp.of(path.stat()) for path in self._whole}
        stores = [ckpt, *(one.adapter.store for one in adapters)]
        self._stamps |= {
            shard.path: shard.stamp
            for store in stores
            if isinstance(store, ShardedStore)
            for shard in store.shards
        }

    def refuse_nonfinite(self) -> None:
        """Raises AdapterError for NaN and infinity in an adapter. Reads the files, in pieces."""
        for adapter in self._adapters:
            refuse_nonfinite(adapter)

    def hashed(self, path: Path) -> FileHash:
        """Of a file, which is read once."""
        if path not in self._hashes:
            self._hashes[path] = hash_file(path)
        return self._hashes[path]

    def contents(self) -> dict[str, Any]:
        """Path → sha256; of a checkpoint's shard that of its header, with size, time and inode for the data.
        Reads the rest."""
        found: dict[str, Any] = {
            str(shard.path): [shard.header_sha256, *shard.stamp] for shard in self._shards
        }
        return found | {str(path): self.hashed(path).sha256 for path in self._whole}

    def attempt(self, plan: Plan, settings: Settings, device: str) -> Attempt:
        """What a run is about to do, on a device of this kind. Reads small files whole."""
        others = {
            "adapter_name": settings.adapter_name,
            "allow_nonfinite": settings.allow_nonfinite,
            "device": device,
        }
        command = self._names | self._weights | settings.that_decide_bytes | others
        return Attempt(
            plan.plan_id, command, self.contents(), {"lorafuse": __version__, "torch": torch.__version__}
        )

    def refuse_changed(self) -> None:
        """Raises CheckpointError for a file, be it an adapter's, that was written to, replaced or removed
        since it was opened."""
        for path, stamp in self._stamps.items():
            try:
                same = Stamp.of(path.stat()) == stamp
            except FileNotFoundError:
                same = False
            if not same:
                raise CheckpointError(
                    f"{shown(path)}: changed during the run, which may have read some of both; run it again."
                )


def _lasting(name: str, path: Path) -> str:
    """An input's name that does not depend on the working directory; a hub id stays one, whatever its newest
    commit."""
    return os.path.realpath(path) if os.path.isdir(name) else name
