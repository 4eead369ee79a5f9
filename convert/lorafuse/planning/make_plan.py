"""(checkpoint, adapter, settings) → Plan, or a refusal. Nothing is written and no weight is read here.

A plan is complete: the loop that carries it out decides nothing.
"""

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lorafuse._version import __version__
from lorafuse.adapters import AdapterDir, Edit, updates_of
from lorafuse.codecs import Sources, dropped
from lorafuse.codecs.dense import DenseSources
from lorafuse.codecs.stored import StoredEncoder
from lorafuse.errors import CheckpointError, UsageError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.names import natural_key
from lorafuse.files.tensors import DTYPES, FLOATS, SAFETENSORS_NAMES, StoredTensor, TensorSpec
from lorafuse.files.uncollected import uncollected
from lorafuse.formats import FORMATS
from lorafuse.formats.format import Format, MakeFormat, WeightToStore
from lorafuse.naming import Names
from lorafuse.planning.base_check import base_copies, base_warnings, naming_the_base
from lorafuse.planning.by_format import sizes_by_format
from lorafuse.planning.combine import AdapterSays, WeightedAdapter, combine, common_model, in_order
from lorafuse.planning.edits import own_edits
from lorafuse.planning.memory import fit_memory
from lorafuse.planning.plan import (
    ADAPTER_TENSOR_NBYTES,
    RECEIPT_ENTRY_NBYTES,
    STORED_TENSOR_NBYTES,
    Plan,
    PlannedShard,
    Step,
)
from lorafuse.planning.shards import split_shards
from lorafuse.planning.shared_weights import SharedWeights
from lorafuse.planning.tied import settle_tied
from lorafuse.planning.vocabulary import cut_vocabulary, vocabulary_changes
from lorafuse.settings import Settings
from lorafuse.side_files.choose import Embedding, SideFiles, choose_side_files
from lorafuse.structure import Structure, structure_of
from lorafuse.trained_base.base_weights import base_weights

HeldByWriting = Callable[[Sequence[int], Folder], int]
"""Bytes of each result's largest file, folder of the checkpoint → host bytes that writing takes beside
reading."""


@uncollected()
def make_plan(
    ckpt: Checkpoint,
    adapters: Sequence[WeightedAdapter],
    settings: Settings,
    weights: Mapping[str, Sources] | None = None,
    make_format: MakeFormat | None = None,
    *,
    each_format: bool = False,
    held_by_writing: HeldByWriting = lambda sizes, ckpt: 0,
) -> Plan:
    """Decide everything. The updates of all adapters are added. Plans that get the same `weights`, those of
    `ckpt`, can be carried out together. `each_format`: say the size in each format, too.
    Raises CheckpointError, AdapterError, or UsageError when the memory limit is too small."""
    warnings, notes = [*ckpt.warnings], list[str]()
    weights = weights or base_weights(ckpt, settings.base_quant, warnings.append)
    summed = in_order(adapters)
    warnings += base_warnings(ckpt.folder, weights, [weighted.adapter for weighted in summed], notes.append)
    said = [_read(weighted, weights, ckpt.config, warnings.append) for weighted in summed]
    model = common_model(said)
    names = Names(model.weights, model.config)
    for says in said:
        says.edits = own_edits(says, names, warnings.append)
    copies = [copy for says in said for copy in base_copies(says.adapter, says.edits, names)]
    edits, ignored = combine(said, model, names)
    files = listed(weighted.adapter.file for weighted in summed)
    cut_vocabulary(names, edits, files, warnings.append)
    untied = settle_tied(names, edits, ignored)
    how = (make_format or _format_of(settings))(ckpt, settings, weights)
    run_time = dropped(ckpt.tensors, ckpt.config)
    stored_so = partial(_steps, model, names, edits, untied, ckpt, run_time)
    steps = list(stored_so(settings.dtype, how))
    if not steps:
        raise CheckpointError(f"{shown(ckpt.folder)}: holds no weight.")
    shards = split_shards(steps, settings.max_shard_nbytes)
    n_entries = len(ckpt.tensors) + max(len(steps) - len(weights), 0)
    held_nbytes = _held_nbytes(ckpt, adapters, n_entries)
    held_nbytes += held_by_writing([max(shard.nbytes for shard in shards)], ckpt.folder)
    memory = fit_memory(SharedWeights([steps]), held_nbytes, settings, len(steps) * RECEIPT_ENTRY_NBYTES)
    config_changes = model.changes | _config_changes(names, steps, untied, files)
    used = sorted({key for edit in edits.values() for key in edit.keys}.union(*model.added.values()))
    plan_id = _plan_id(ckpt, adapters[0].adapter, summed, settings, shards)
    side_files = _side_files(ckpt, adapters[0].adapter, names, steps, config_changes)
    warnings += [*how.warnings(), *side_files.warnings]
    return Plan(
        shards, plan_id, memory, held_nbytes, config_changes, how.config(), used, ignored,
        dict(how.left_out(run_time)), warnings, notes,
        copies, side_files,
        sizes_by_format(ckpt, settings, weights, stored_so) if each_format else {},
    )  # fmt: skip


def _held_nbytes(ckpt: Checkpoint, adapters: Sequence[WeightedAdapter], n_entries: int) -> int:
    """By the tables of so many tensors, by adapters, and by the place that the checkpoint is read from."""
    of_adapters = sum(
        weighted.adapter.nbytes + len(weighted.adapter.store.tensors) * ADAPTER_TENSOR_NBYTES
        for weighted in adapters
    )
    return n_entries * STORED_TENSOR_NBYTES + of_adapters + ckpt.folder.held_nbytes


def _side_files(
    ckpt: Checkpoint, adapter: AdapterDir, names: Names, steps: list[Step], config_changes: dict[str, Any]
) -> SideFiles:
    embeddings = (Embedding(step.name, step.spec.shape[0]) for step in steps if step.name == names.embed)
    return choose_side_files(
        ckpt.folder,
        ckpt.config,
        [adapter.folder, adapter.root],
        next(embeddings, None),
        new_head="architectures" in config_changes,
    )


def _read(
    weighted: WeightedAdapter,
    weights: Mapping[str, Sources],
    config: dict[str, Any],
    warn: Callable[[str], None],
) -> AdapterSays:
    """What an adapter says, and of which model."""
    said, ignored = updates_of(weighted.adapter, weighted.weight, warn)
    with naming_the_base(weighted.adapter):
        return AdapterSays(
            weighted.adapter,
            weighted.weight,
            structure_of(weights, config, weighted.adapter, said, warn),
            ignored,
        )


def _steps(
    model: Structure,
    names: Names,
    edits: dict[str, Edit],
    untied: bool,
    ckpt: Checkpoint,
    run_time: Mapping[str, str],
    dtype: str,
    how: Format,
) -> Iterator[Step]:
    bases, untouched = model.weights, Edit()
    if untied:
        bases = {**bases, **names.unstored()}
    changing = {
        name: edit.replaced or bases[name] for name, edit in edits.items() if name in bases and _changes(edit)
    }
    how.foresee(model.weights, changing)
    for name in sorted(bases, key=natural_key):
        base, edit = bases[name], edits.get(name, untouched)
        sources = edit.replaced or base
        out = base.out_dtype if dtype == "auto" or base.out_dtype not in FLOATS else SAFETENSORS_NAMES[dtype]
        action = _action(edit, stored=name in model.weights and name not in model.added)
        spec = sources.spec if out == sources.spec.dtype else TensorSpec(out, sources.spec.shape)
        encoder = how.encoder_of(WeightToStore(name, spec, sources, action is None, model.weights.get(name)))
        action = action or ("decoded" if encoder.needs_values else "copied")
        yield Step(name, spec, sources, encoder, edit.patches, action)
    kept = sorted(run_time.keys() - how.left_out(run_time).keys(), key=natural_key)
    yield from (_copied(name, ckpt) for name in kept)


def _copied(name: str, ckpt: Checkpoint) -> Step:
    """A stored tensor that no weight is made from, as it is."""
    sources = DenseSources(ckpt, name)
    return Step(name, sources.spec, sources, StoredEncoder(ckpt, {name: name}))


def _format_of(settings: Settings) -> MakeFormat:
    make = FORMATS.get(settings.format)
    if make is None:
        raise UsageError(f"--format is {shown(settings.format)}; expected one of {', '.join(FORMATS)}.")
    return make


def _changes(edit: Edit) -> bool:
    return bool(edit.patches or edit.replaced)


def _action(edit: Edit, *, stored: bool) -> str | None:
    """What the adapter does to a weight, in the receipt's words; None for nothing."""
    if edit.patches:
        return "merged"
    if edit.replaced:
        return "replaced"
    return None if stored else "added"


def _config_changes(names: Names, steps: list[Step], untied: bool, files: str) -> dict[str, Any]:
    """Fields of config.json that the result needs: dtype, and vocab_size and tie_word_embeddings where they
    change."""
    totals: Counter[str] = Counter()
    for step in steps:
        if step.spec.dtype in FLOATS:
            totals[step.spec.dtype] += step.spec.nbytes
    changes: dict[str, Any] = {"dtype": DTYPES[totals.most_common(1)[0][0]][1]} if totals else {}
    return changes | vocabulary_changes(names, steps, untied=untied, files=files)


def _stored(shard: PlannedShard) -> Iterator[tuple[Step, StoredTensor]]:
    return ((step, tensor) for step in shard.steps for tensor in step.encoder.tensors)


def _plan_id(
    ckpt: Checkpoint,
    first: AdapterDir,
    summed: Sequence[WeightedAdapter],
    settings: Settings,
    shards: list[PlannedShard],
) -> str:
    """sha256 of everything that the output depends on, inputs by their sizes and headers."""
    identity: dict[str, Any] = {
        "version": __version__,
        "settings": settings.that_decide_bytes,
        "checkpoint": [
            [posixpath.basename(shard.name), shard.nbytes, shard.header_sha256] for shard in ckpt.shards
        ],
        "adapter": [
            [[posixpath.basename(name), first.folder.facts(name).nbytes] for name in first.files],
            first.config,
        ],
        "outputs": [],
    }
    if len(summed) > 1:
        identity["adapters"] = [weighted.identity for weighted in summed]
    digest = hashlib.sha256()
    for text in _as_json(identity, shards):
        digest.update(text.encode())
    return digest.hexdigest()


def _as_json(identity: dict[str, Any], shards: Sequence[PlannedShard]) -> Iterator[str]:
    """The identity with the shards as its "outputs": what json.dumps makes of it with sorted keys, in pieces,
    since there may be a hundred thousand tensors."""
    before = "{"
    for name in sorted(identity):
        yield f'{before}"{name}": '
        if name == "outputs":
            yield from _listed_as_json(shards)
        else:
            yield json.dumps(identity[name], sort_keys=True)
        before = ", "
    yield "}"


def _listed_as_json(shards: Sequence[PlannedShard]) -> Iterator[str]:
    before = "["
    for shard in shards:
        tensors = [[t.name, t.spec.dtype, t.spec.shape, step.action] for step, t in _stored(shard)]
        yield before + json.dumps([shard.file, tensors])
        before = ", "
    yield "]"
