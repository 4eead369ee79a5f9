"""The files that a run reads: what tells their contents apart from those of an earlier run, and whether they
changed meanwhile."""

from collections.abc import Sequence
from typing import Any

import torch

from lorafuse._version import __version__
from lorafuse.adapters.reading.check_tensors import refuse_nonfinite
from lorafuse.arithmetic.devices import device_kind
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import FileHash, Folder
from lorafuse.files.hashing import checked_hash
from lorafuse.files.stores import ShardedStore
from lorafuse.inputs.hashes import adapter_hashes
from lorafuse.outdir.journal import Attempt
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.plan import Plan
from lorafuse.receipt.fields import InputEntry
from lorafuse.settings import Settings


class UnchangedInputs:
    """The files of a checkpoint and its adapters, as they were when they were opened."""

    def __init__(self, ckpt: Checkpoint, adapters: Sequence[WeightedAdapter]) -> None:
        self._command: dict[str, Any] = {"checkpoint": ckpt.folder.address}
        for number, weighted in enumerate(adapters, 1):
            self._command[f"adapter {number}"] = weighted.adapter.folder.address
        for number, weighted in enumerate(adapters[1:], 2):  # the first has adapter_scale
            self._command[f"weight {number}"] = weighted.weight
        self._ckpt, self._weighted = ckpt, adapters
        self._adapters = [weighted.adapter for weighted in adapters]
        self._whole = [(ckpt.folder, name) for name in ckpt.config_files]
        self._whole += [(adapter.folder, name) for adapter in self._adapters for name in adapter.files]
        self._hashes: dict[str, FileHash] = {}
        self._facts = {folder / name: (folder, name, folder.facts(name)) for folder, name in self._whole}
        stores = [(ckpt.folder, ckpt), *((adapter.folder, adapter.store) for adapter in self._adapters)]
        self._facts |= {
            shard.label: (folder, shard.name, shard.facts)
            for folder, store in stores
            if isinstance(store, ShardedStore)
            for shard in store.shards
        }

    @property
    def adapters(self) -> Sequence[WeightedAdapter]:
        return self._weighted

    def refuse_nonfinite(self) -> None:
        """Raises AdapterError for NaN and infinity in an adapter. Reads the files, in pieces."""
        for adapter in self._adapters:
            refuse_nonfinite(adapter)

    def hashed(self, folder: Folder, name: str) -> FileHash:
        """Of a file, which is read once."""
        label = folder / name
        if label not in self._hashes:
            self._hashes[label] = checked_hash(folder, name)
        return self._hashes[label]

    def adapter_inputs(self) -> list[InputEntry]:
        """What a receipt says of the adapters' files."""
        return adapter_hashes(self._weighted, self.hashed)

    def contents(self) -> dict[str, Any]:
        """Label → sha256; of a checkpoint's shard that of its header, with the file's identity for the data.
        Reads the rest."""
        shards = {shard.label: [shard.header_sha256, *shard.facts.identity] for shard in self._ckpt.shards}
        return shards | {folder / name: self.hashed(folder, name).sha256 for folder, name in self._whole}

    def attempt(self, plan: Plan, settings: Settings) -> Attempt:
        """What a run is about to do. Reads small files whole."""
        others = {
            "adapter_name": settings.adapter_name,
            "allow_nonfinite": settings.allow_nonfinite,
            "device": device_kind(settings.device),
        }
        command = self._command | settings.that_decide_bytes | others
        return Attempt(
            plan.plan_id, command, self.contents(), {"lorafuse": __version__, "torch": torch.__version__}
        )

    def refuse_changed(self) -> None:
        """Raises CheckpointError for a file, be it an adapter's, that was written to, replaced or removed
        since it was opened."""
        for label, (folder, name, facts) in self._facts.items():
            try:
                same = folder.facts(name) == facts
            except FileNotFoundError:
                same = False
            if not same:
                raise CheckpointError(
                    f"{shown(label)}: changed during the run, which may have read some of both; run it again."
                )
