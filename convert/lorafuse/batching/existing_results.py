"""Finished results of a batch, as their receipts tell: which jobs are done, and which files other
results need too.

Nothing is believed but the receipt and the bytes: a result that is to be skipped has all its inputs' hashes,
a file that is to be shared is hashed once before its first use.
"""

import hashlib
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse._version import __version__
from lorafuse.errors import LorafuseError, OutDirError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import FileHash, Folder
from lorafuse.files.names import RECEIPT
from lorafuse.files.safetensors_file import Shard
from lorafuse.files.tensors import TensorSpec
from lorafuse.merge.destination import Written
from lorafuse.outdir.folder_file import FolderFile
from lorafuse.outdir.out_dir import FinishedFile
from lorafuse.planning.plan import Plan, PlannedShard
from lorafuse.receipt.fields import InputEntry, OutputEntry, Receipt
from lorafuse.receipt.read import read_receipt, stored_tensors
from lorafuse.settings import Settings

MAX_FILES = 4096  # that are remembered, so that their number does not grow with that of the jobs
FILE_NBYTES, NAME_NBYTES = 1000, 150  # what one takes, and what the name of a result does
UNTOUCHED = ("copied", "decoded")


def shard_key(shard: PlannedShard) -> str | None:
    """What decides the bytes of a file that no adapter has a say in, beside the checkpoint; None for any
    other file."""
    if any(
        step.changes or step.patches or not isinstance(step.sources.store, Checkpoint) for step in shard.steps
    ):
        return None
    sources = [(tensor, step.sources.names[0]) for step in shard.steps for tensor in step.encoder.tensors]
    return _key([(tensor.name, tensor.spec, source) for tensor, source in sources])


def _key(weights: Sequence[tuple[str, TensorSpec, str]]) -> str:
    return hashlib.sha256(
        json.dumps([[name, str(spec), source] for name, spec, source in weights]).encode()
    ).hexdigest()


def common_files_of(plan: Plan) -> dict[str, str]:
    """The files of a plan that no adapter has a say in, each with its `shard_key`."""
    return {shard.file: key for shard in plan.shards if (key := shard_key(shard))}


@dataclass
class Shared:
    """A file of a finished result. `checked`: its bytes are known to be those of the receipt."""

    file: FinishedFile
    written: Written
    checked: bool


class ExistingResults:
    """The results in OUT_ROOT. `ckpt_inputs` gives the checkpoint's entries of a receipt, once they are
    hashed."""

    def __init__(
        self, out_root: Folder, settings: Settings, ckpt_inputs: Callable[[], list[InputEntry]]
    ) -> None:
        self._out_root, self._ckpt_inputs = out_root, ckpt_inputs
        # Of the call's settings only these have a say in weights that no adapter touches; their dtype is in
        # the spec.
        own = ("dtype", "max_shard_size", "adapter_scale")
        self._base = {name: value for name, value in settings.that_decide_bytes.items() if name not in own}
        self._files: OrderedDict[str, Shared] = OrderedDict()
        self._seen: set[str] = set()

    @property
    def nbytes(self) -> int:
        """What is held in memory."""
        return len(self._files) * FILE_NBYTES + len(self._seen) * NAME_NBYTES

    def holds(self, name: str, settings: Settings, adapter_inputs: list[InputEntry]) -> bool:
        """Whether the result of that name is already what a run with these settings and inputs makes. Raises
        OutDirError when it is something else, and says what."""
        out_dir = self._out_root.sub_folder(name)
        if not out_dir.is_there() or not (out_dir.names("*") or out_dir.sub_folders()):
            return False
        receipt = _read_receipt(out_dir)
        reason = _difference(receipt, out_dir, settings) if receipt else f"holds no {RECEIPT}"
        if receipt and not reason:
            reason = self._other_inputs(receipt, adapter_inputs)
        if reason or not receipt:
            raise OutDirError(
                f"{shown(out_dir)}: exists, but {reason}; --overwrite replaces it once the new one is "
                "complete."
            )
        self._remember(name, receipt)
        return True

    def _other_inputs(self, receipt: Receipt, adapter_inputs: list[InputEntry]) -> str | None:
        if _identities(receipt["inputs"], "adapter") != _identities(adapter_inputs, "adapter"):
            return "the receipt names another adapter, or the adapter has changed since"
        return (
            None
            if self._of_this_checkpoint(receipt)
            else "the receipt names another checkpoint, or it has changed since"
        )

    def _of_this_checkpoint(self, receipt: Receipt) -> bool:
        return _identities(receipt["inputs"], "checkpoint") == _identities(self._ckpt_inputs(), "checkpoint")

    def find(self, key: str) -> Shared | None:
        """A file with this content, which was hashed by this call. Results that others finished meanwhile are
        looked at too."""
        if key not in self._files:
            self._look(key)
        return self.known(key)

    def known(self, key: str) -> Shared | None:
        """What was found or offered before, if it is still as it was written."""
        shared = self._files.get(key)
        if shared is None or shared.checked or _is_as_written(shared):
            return shared
        del self._files[key]
        return None

    def _look(self, key: str) -> None:
        """Read the receipts that were not read yet, until one has a file of that content."""
        for name in self._out_root.sub_folders():
            if name in self._seen or name.startswith("."):
                continue
            receipt = _read_receipt(self._out_root.sub_folder(name))
            if receipt and self._of_this_checkpoint(receipt):
                self._remember(name, receipt)
            if key in self._files:
                return

    def _remember(self, name: str, receipt: Receipt) -> None:
        """The files of a result that hold only what no adapter has a say in."""
        self._seen.add(name)
        out_dir = self._out_root.sub_folder(name)
        if not _is_own(receipt) or any(
            receipt["settings"].get(setting) != value for setting, value in self._base.items()
        ):
            return
        for output in _shards(receipt):
            key = _key_of_file(out_dir, output["file"], receipt["tensors"])
            if key:
                self.offer(
                    key,
                    FolderFile(out_dir, output["file"]),
                    Written(output["file"], output["size"], output["sha256"]),
                    checked=False,
                )

    def offer(self, key: str, file: FinishedFile, written: Written, *, checked: bool = True) -> None:
        """A file for those that come later. The latest is given first: an older one may have as many links as
        it can."""
        if checked or key not in self._files:
            self._files[key] = Shared(file, written, checked)
            self._files.move_to_end(key)
        while len(self._files) > MAX_FILES:
            self._files.popitem(last=False)

    def forget(self, key: str) -> None:
        """The file is gone."""
        self._files.pop(key, None)


def _read_receipt(out_dir: Folder) -> Receipt | None:
    try:
        receipt = read_receipt(out_dir)
    except (OSError, LorafuseError):
        return None
    if receipt is None:
        return None
    entries: list[InputEntry | OutputEntry] = [*receipt["outputs"], *receipt["inputs"]]
    whole = all(type(entry.get("size")) is int and "sha256" in entry for entry in entries)
    return receipt if whole else None


def _shards(receipt: Receipt) -> list[OutputEntry]:
    """The files that hold weights; others may be edited as people like."""
    return [
        entry
        for entry in receipt["outputs"]
        if entry["file"].endswith(".safetensors") and "/" not in entry["file"]
    ]


def _is_own(receipt: Receipt) -> bool:
    """Whether this version of the tool wrote it: another one may decode or arrange differently."""
    tool = receipt.get("tool")
    return isinstance(tool, dict) and tool.get("version") == __version__


def _difference(receipt: Receipt, out_dir: Folder, settings: Settings) -> str | None:
    """What a result is not, before any input is looked at."""
    if not _is_own(receipt):
        return "another version of lorafuse made it"
    was, wanted = receipt["settings"], settings.that_decide_bytes
    if was != wanted:
        names = sorted(name for name in wanted.keys() | was.keys() if was.get(name) != wanted.get(name))
        return f"was made with other settings ({listed(names)})"
    for output in _shards(receipt):
        if not _has_size(out_dir, output["file"], output["size"]):
            return f"{shown(output['file'])} is not the file that its receipt describes"
    return None


def _identities(inputs: Sequence[InputEntry], role: str) -> list[tuple[str, str]]:
    """What the files of a role hold, wherever they lie."""
    return sorted(
        (str(entry.get("size")), str(entry.get("sha256"))) for entry in inputs if entry.get("role") == role
    )


def _has_size(folder: Folder, file: str, nbytes: int) -> bool:
    if folder.local_path is not None:
        return _is_of_size(folder.local_path / file, nbytes)
    try:
        return folder.facts(file).nbytes == nbytes
    except OSError:
        return False


def _is_of_size(path: Path, nbytes: int) -> bool:
    """Whether a path is a file of that size, and no link."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == nbytes


def _is_as_written(shared: Shared) -> bool:
    """Hash a file before its first use."""
    expected = FileHash(shared.written.nbytes, shared.written.sha256)
    try:
        path = shared.file.local_path
        shared.checked = (
            path is None or _is_of_size(path, shared.written.nbytes)
        ) and shared.file.hash() == expected
    except (OSError, LorafuseError):
        return False
    return shared.checked


def _key_of_file(folder: Folder, file: str, tensors: Mapping[str, Any]) -> str | None:
    """`shard_key` of a finished file: its own header, and what the receipt says of each weight."""
    try:
        shard = Shard(folder, file)
    except (OSError, LorafuseError):
        return None
    shard.close()
    stored, made_from = {stored.name: stored.weight for stored in stored_tensors(tensors)}, []
    for name, info in shard.tensors.items():
        weight = stored.get(name)
        entry = tensors[weight] if weight else {}
        if entry.get("action") not in UNTOUCHED:
            return None
        made_from.append((name, info.spec, str(entry.get("source", weight))))
    return _key(made_from)
