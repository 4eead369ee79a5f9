"""(checkpoint, adapter, settings) → Plan, or a refusal. Nothing is written and no weight is read here.

A plan is complete: the loop that carries it out decides nothing.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lorafuse._version import __version__
from lorafuse.adapters import AdapterDir, Edit, Target, Update, module_of
from lorafuse.adapters.patch import LowRank, Patch
from lorafuse.checkpoint import SINGLE, Checkpoint
from lorafuse.codecs import Sources, open_weights
from lorafuse.codecs.sources import is_conv1d
from lorafuse.errors import AdapterError, CheckpointError, UsageError, shown
from lorafuse.naming import Names
from lorafuse.settings import Settings
from lorafuse.tensors import DTYPES, FLOATS, SAFETENSORS_NAMES, TensorSpec

# Elements of a tile. It depends on nothing, so that the bytes written do not either; a tile of this size stays in cache while it is
# decoded, updated and cast, and smaller ones cost more in calls (bench/tiles.py).
TILE_NUMEL = 1 << 18
COPY_NBYTES = 1 << 20
# What a worker holds per element of its tile: packed codes, index, decoded values in fp32 and in the weight's dtype, the sum, two
# buffers for the measures.
WORKER_NBYTES_PER_ELEMENT = 24
# Interpreter, libraries' buffers and allocator slack beyond `import torch`, measured by bench/memory.py.
RUNTIME_NBYTES = 45_000_000
STORED_TENSOR_NBYTES = 700  # a stored tensor's entries in the tables
TILES_PER_WORKER = 6  # so that workers go on while a write waits for the disk
MIN_TILES_AHEAD = 2


@dataclass
class Step:
    """One weight of the output: what it is made from and what is done to it."""

    name: str
    spec: TensorSpec
    sources: Sources
    patches: list[Patch] = field(default_factory=list)
    action: str = "copied"

    @property
    def verbatim(self) -> bool:
        """Stored bytes are output bytes."""
        return self.action == "copied"

    @property
    def row_numel(self) -> int:
        """Elements per row of a tile: patches see the weight as a matrix of its first dimension, decoding needs only the last."""
        return max(self.spec.n_cols if self.patches else math.prod(self.spec.shape[-1:]), 1)

    @property
    def tile_numel(self) -> int:
        if self.verbatim:
            return COPY_NBYTES // DTYPES[self.spec.dtype][0]
        return max(TILE_NUMEL // self.row_numel, 1) * self.row_numel

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(start, stop) in elements, in order."""
        step, numel = self.tile_numel, self.spec.numel
        return ((start, min(start + step, numel)) for start in range(0, numel, step))

    @property
    def resident_nbytes(self) -> int:
        """Held from the weight's first tile to its last."""
        return sum(patch.nbytes for patch in self.patches)

    @property
    def worker_nbytes(self) -> int:
        """Held by each worker while it makes a tile."""
        tile = min(self.tile_numel, self.spec.numel)
        if self.verbatim:
            return 0
        return (
            tile * WORKER_NBYTES_PER_ELEMENT + self.sources.nbytes + sum(patch.scratch_nbytes for patch in self.patches)
        )

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a finished tile."""
        return min(self.tile_numel, self.spec.numel) * DTYPES[self.spec.dtype][0]


@dataclass(frozen=True)
class Memory:
    """How the memory limit is spent."""

    n_workers: int
    n_tiles: int  # in the making or waiting to be written, at once
    tile_nbytes: int
    resident_nbytes: int  # for what patches hold from a weight's first tile to its last


@dataclass
class PlannedShard:
    """One output file and its weights in order."""

    file: str
    steps: list[Step]

    @property
    def nbytes(self) -> int:
        return sum(step.spec.nbytes for step in self.steps)


@dataclass
class Plan:
    """Everything that is going to happen."""

    shards: list[PlannedShard]
    plan_id: str
    memory: Memory
    config_changes: dict[str, Any]
    used: list[str]
    ignored: dict[str, str]
    warnings: list[str]

    @property
    def steps(self) -> Iterator[Step]:
        return (step for shard in self.shards for step in shard.steps)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def make_plan(ckpt: Checkpoint, adapter: AdapterDir, settings: Settings) -> Plan:
    """Decide everything. Raises CheckpointError, AdapterError, or UsageError when the memory limit is too small."""
    warnings: list[str] = []
    weights = open_weights(ckpt)
    names = Names(weights, ckpt.config)
    updates, ignored = module_of(adapter).updates(adapter, settings.adapter_scale, warnings.append)
    edits = _edits(updates, names, adapter)
    untied = _settle_tied(names, edits, ignored, bool(adapter.config.get("ensure_weight_tying")))
    steps = _steps(weights, names, edits, untied, settings.dtype)
    if not steps:
        raise CheckpointError(f"{shown(ckpt.path)}: holds no weight.")
    shards = _shards(steps, settings.max_shard_nbytes)
    memory = _fit_memory(steps, adapter.nbytes + len(ckpt.tensors) * STORED_TENSOR_NBYTES, settings)
    config_changes = _config_changes(names, edits, steps, untied)
    used = sorted({key for edit in edits.values() for key in edit.keys})
    return Plan(shards, _plan_id(ckpt, adapter, settings, shards), memory, config_changes, used, ignored, warnings)


def _edits(updates: list[Update], names: Names, adapter: AdapterDir) -> dict[str, Edit]:
    """Weight → edit. Replacements first: an update goes on top of them."""
    edits: dict[str, Edit] = {}
    for update in sorted(updates, key=lambda update: update.make is not None):
        weight = names.resolve(update.parameter, adapter.file, update.keys[0])
        edit = edits.setdefault(weight, Edit())
        edit.keys += update.keys
        sources = edit.replaced or names.weights.get(weight) or names.weights[names.embed or ""]
        if update.replaced:
            _check_replacement(update, weight, sources.spec, names, adapter)
            edit.replaced = update.replaced
        if update.make:
            if sources.spec.dtype not in FLOATS:
                raise AdapterError(
                    f"{adapter.file}: {shown(update.keys[0])} updates {shown(weight)}, which is {sources.spec}."
                )
            edit.patches.append(update.make(Target(weight, sources.spec, is_conv1d(names.config, weight))))
    return edits


def _check_replacement(update: Update, weight: str, spec: TensorSpec, names: Names, adapter: AdapterDir) -> None:
    assert update.replaced is not None
    new = update.replaced.spec
    rows_only = new.shape[1:] == spec.shape[1:] and len(new.shape) == len(spec.shape) > 0
    if new.shape != spec.shape and not (rows_only and names.may_resize(weight)):
        raise AdapterError(
            f"{adapter.file}: {shown(update.keys[0])} is {list(new.shape)}, but {shown(weight)} is {list(spec.shape)}; is the adapter for "
            "another base?"
        )


def _settle_tied(names: Names, edits: dict[str, Edit], ignored: dict[str, str], ensure_tying: bool) -> bool:
    """Make the edits of a tied pair agree, or untie it. Returns whether it has to be untied.

    LoRA on one side of a tied pair changes only that side in training, so the pair comes apart; PEFT's merge adds the update to the
    shared tensor, and so to both.
    """
    pair = names.tied
    if pair is None or not (pair.embed in edits or pair.head in edits):
        return False
    names.refuse_shared()
    embed, head = edits.get(pair.embed), edits.get(pair.head)
    together = embed.same_as(head) if embed and head else ensure_tying
    if not together:
        return True
    shared = embed or head
    assert shared is not None
    edits[pair.embed] = shared
    if pair.head_stored:
        edits[pair.head] = head or shared
    elif head:
        del edits[pair.head]
        if embed:
            ignored |= dict.fromkeys(head.keys, f"equal to the update of {pair.embed}, to which it is tied")
    return False


def _steps(weights: dict[str, Sources], names: Names, edits: dict[str, Edit], untied: bool, dtype: str) -> list[Step]:
    bases = dict(weights)
    if untied and names.tied:
        bases.setdefault(names.tied.head, weights[names.tied.embed])
    steps = []
    for name in sorted(bases, key=natural_key):
        base, edit = bases[name], edits.get(name, Edit())
        sources = edit.replaced or base
        out = base.out_dtype if dtype == "auto" or base.out_dtype not in FLOATS else SAFETENSORS_NAMES[dtype]
        action = _action(edit, base, out, stored=name in weights)
        steps.append(Step(name, TensorSpec(out, sources.spec.shape), sources, edit.patches, action))
    return steps


def _action(edit: Edit, base: Sources, out_dtype: str, *, stored: bool) -> str:
    if edit.patches:
        return "merged"
    if edit.replaced:
        return "replaced"
    if not stored:
        return "added"
    # "decoded" also covers a dense weight that only changes its dtype.
    return "copied" if len(base.names) == 1 and base.spec.dtype == out_dtype else "decoded"


def natural_key(name: str) -> list[str | int]:
    """Sorts layers.2 before layers.10: the order of a model's execution, and independent of how the input is sharded."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", name))]


def _shards(steps: list[Step], max_nbytes: int) -> list[PlannedShard]:
    """Greedy: a weight that does not fit any more starts the next shard, and one larger than the limit has its own."""
    groups: list[list[Step]] = [[]]
    nbytes = 0
    for step in steps:
        if groups[-1] and nbytes + step.spec.nbytes > max_nbytes:
            groups.append([])
            nbytes = 0
        groups[-1].append(step)
        nbytes += step.spec.nbytes
    if len(groups) == 1:
        return [PlannedShard(SINGLE, groups[0])]
    return [PlannedShard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _fit_memory(steps: list[Step], held_nbytes: int, settings: Settings) -> Memory:
    """As many workers as the limit allows. A right factor that does not fit beside one worker is read again for each tile."""
    for attempt in ("resident", "read again"):
        worker = max(step.worker_nbytes for step in steps)
        tile = max(step.tile_nbytes for step in steps)
        resident = max(step.resident_nbytes for step in steps)
        for n_workers in range(settings.n_workers, 0, -1):
            n_tiles = n_workers * TILES_PER_WORKER + MIN_TILES_AHEAD
            fixed = RUNTIME_NBYTES + held_nbytes + n_workers * worker + n_tiles * tile
            if fixed + resident <= settings.memory_nbytes:
                return Memory(n_workers, n_tiles, tile, settings.memory_nbytes - fixed)
        if attempt == "resident":
            for patch in (patch for step in steps for patch in step.patches if isinstance(patch, LowRank)):
                patch.right_resident = fixed + patch.nbytes <= settings.memory_nbytes
    largest = max(steps, key=lambda step: step.worker_nbytes + step.resident_nbytes)
    raise UsageError(
        f"A memory limit of {settings.memory_nbytes / 1e6:.0f} MB is too small: {(fixed + resident) / 1e6:.0f} MB are needed beyond "
        f"`import torch`, most of it for {shown(largest.name)}. Raise --memory-limit."
    )


def _config_changes(names: Names, edits: dict[str, Edit], steps: list[Step], untied: bool) -> dict[str, Any]:
    """Fields of config.json that the result needs: dtype, and vocab_size and tie_word_embeddings where they change."""
    totals: Counter[str] = Counter()
    for step in steps:
        if step.spec.dtype in FLOATS:
            totals[step.spec.dtype] += step.spec.nbytes
    changes: dict[str, Any] = {"dtype": DTYPES[totals.most_common(1)[0][0]][1]} if totals else {}
    if untied:
        changes["tie_word_embeddings"] = False
    rows = {step.name: step.spec.shape[0] for step in steps if step.name in (names.embed, names.head)}
    if any(
        edits[name].replaced and rows[name] != names.weights[name].spec.shape[0]
        for name in rows
        if name in edits and name in names.weights
    ):
        if len(set(rows.values())) > 1:
            both = " and ".join(f"{name} has {n} rows" for name, n in rows.items())
            raise AdapterError(f"The adapter resizes the vocabulary on one side only: {both}.")
        changes["vocab_size"] = next(iter(rows.values()))
    return changes


def _plan_id(ckpt: Checkpoint, adapter: AdapterDir, settings: Settings, shards: list[PlannedShard]) -> str:
    """sha256 of everything that the output depends on, inputs by their sizes and headers."""
    identity = {
        "version": __version__,
        "settings": settings.decisive,
        "checkpoint": [[shard.path.name, shard.nbytes, shard.header_sha256] for shard in ckpt.shards],
        "adapter": [adapter.file.name, adapter.file.stat().st_size, adapter.config],
        "outputs": [
            [shard.file, [[s.name, s.spec.dtype, s.spec.shape, s.action] for s in shard.steps]] for shard in shards
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
