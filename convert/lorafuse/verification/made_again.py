"""Everything of a merged directory beside the values of its weights, made again from the inputs and compared:
headers, side files, which files there are, and what the receipt says."""

import json
import math
from collections.abc import Iterable

from lorafuse._version import __version__
from lorafuse.errors import ResultError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder, read_fully
from lorafuse.files.names import RECEIPT
from lorafuse.files.safetensors_file import FormatError, header_of
from lorafuse.merge.destination import Outcome
from lorafuse.outdir.sidecars import write_sidecars
from lorafuse.planning.plan import Plan
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.write import base_semantics, tensor_entry
from lorafuse.settings import Settings

MEASURED = ("delta_norm", "delta_rel", "kept", "noise", "changed", "clipped")
# What another machine's sums of fp32 may differ in.
REL_TOL, ABS_TOL = 1e-4, 1e-6


class SideFilesCompared:
    """Takes the side files of a merge and compares each with that of a directory. `files`: their names."""

    def __init__(self, folder: Folder) -> None:
        self.files: set[str] = set()
        self._folder = folder

    def put(self, file: str, chunks: Iterable[bytes]) -> None:
        """Raises ResultError for a file that is missing or holds anything else."""
        self.files.add(file)
        at = 0
        try:
            stored = self._folder.open(file)
        except (OSError, FormatError):
            raise ResultError(f"{shown(self._folder / file)}: is missing; the inputs make it.") from None
        try:
            for chunk in chunks:
                if read_fully(stored, at, len(chunk)) != chunk:
                    raise ResultError(self._differs(file))
                at += len(chunk)
            if stored.facts.nbytes != at:
                raise ResultError(self._differs(file))
        finally:
            stored.close()

    def _differs(self, file: str) -> str:
        return f"{shown(self._folder / file)}: is not what the inputs make."


def check_files(folder: Folder, receipt: Receipt, plan: Plan, base: Checkpoint) -> None:
    """The headers of the shards, the side files, and that the receipt lists these files and no others. Raises
    ResultError."""
    compared = SideFilesCompared(folder)
    write_sidecars(plan, base.config, compared)
    for shard in plan.shards:
        compared.files.add(shard.file)
        header = header_of(list(shard.tensors))
        if _beginning(folder, shard.file, len(header)) != header:
            raise ResultError(f"{shown(folder / shard.file)}: its header is not what the inputs make.")
    listed_files = {entry["file"] for entry in receipt["outputs"]}
    for file in sorted(listed_files ^ compared.files):
        what = "is in the receipt, and the inputs do not make it" if file in listed_files else "is not in it"
        raise ResultError(f"{shown(folder / RECEIPT)}: {shown(file)} {what}.")


def _beginning(folder: Folder, file: str, nbytes: int) -> bytes:
    try:
        opened = folder.open(file)
    except (OSError, FormatError):
        raise ResultError(f"{shown(folder / file)}: is missing; the inputs make it.") from None
    try:
        return bytes(read_fully(opened, 0, nbytes))
    finally:
        opened.close()


def check_receipt(
    folder: Folder,
    receipt: Receipt,
    plan: Plan,
    outcome: Outcome,
    settings: Settings,
    *,
    several: bool,
) -> None:
    """What the receipt says of the weights and of the adapters' tensors is what the inputs say; measures are
    those of the weights that were made again. The names of `several` adapters, by which the receipt tells
    their tensors apart, may be others. Raises ResultError."""
    adapter_tensors = {"used": plan.used, "ignored": plan.ignored}
    for name, told in receipt["adapter_tensors"].items():
        said, made = (_nameless(value) if several else value for value in (told, adapter_tensors.get(name)))
        _compare(folder, f"adapter_tensors.{name}", said, made)
    _compare(folder, "dropped", receipt.get("dropped", {}), plan.dropped)
    _compare(folder, "base_semantics", receipt["base_semantics"], base_semantics(plan, settings))
    if receipt["tool"].get("version") == __version__:  # which is a part of plan_id
        _compare(folder, "plan_id", receipt.get("plan_id"), plan.plan_id)
    entries = {step.name: tensor_entry(step, outcome) for step in plan.steps}
    for name in sorted(entries.keys() | receipt["tensors"].keys()):
        entry, said = dict(entries.get(name, {})), dict(receipt["tensors"].get(name, {}))
        if name in entries and name not in outcome.measures and entry["action"] == "merged":
            said = {field: value for field, value in said.items() if field not in MEASURED}
        for field in sorted(entry.keys() | said.keys()):
            _compare(folder, f"{name}: {field}", _updates(said.get(field)), _updates(entry.get(field)))


def _nameless(labels: object) -> object:
    """Tensors of several adapters without the names of these, which stand before a colon."""
    if isinstance(labels, dict):
        return sorted({f"{_key(label)}: {reason}" for label, reason in labels.items()})
    return sorted({_key(label) for label in labels}) if isinstance(labels, list) else labels


def _key(label: object) -> str:
    return str(label).rpartition(": ")[2]


def _updates(value: object) -> object:
    """The updates of several adapters without the names of these; any other field as it is."""
    if not isinstance(value, list) or not all(isinstance(update, dict) for update in value):
        return value
    return [{name: fact for name, fact in update.items() if name != "adapter"} for update in value]


def _compare(folder: Folder, name: str, told: object, made: object) -> None:
    made = json.loads(json.dumps(made))  # tuples are lists there
    if not _same(told, made):
        raise ResultError(
            f"{shown(folder / RECEIPT)}: says {shown(name)} is {shown(told)}; the inputs make it "
            f"{shown(made)}."
        )


def _same(told: object, made: object) -> bool:
    """Whether two values of JSON are the same, but for what other machines' sums differ in."""
    if isinstance(told, dict) and isinstance(made, dict):
        return told.keys() == made.keys() and all(_same(told[name], made[name]) for name in told)
    if isinstance(told, list) and isinstance(made, list):
        return len(told) == len(made) and all(map(_same, told, made))
    if isinstance(made, float) and isinstance(told, int | float):
        return math.isclose(told, made, rel_tol=REL_TOL, abs_tol=ABS_TOL)
    return type(told) is type(made) and told == made
