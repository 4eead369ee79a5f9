"""(checkpoint, adapter, settings) → Plan, or a refusal. Nothing is written and no weight is read here.

A plan is complete: the loop that carries it out decides nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorafuse._version import __version__
from lorafuse.adapters import AdapterDir, Choice, Edit, Patch, Target, Update, updates_of
from lorafuse.adapters.keys import unusual_prefixes
from lorafuse.adapters.patch import Parameter, Part
from lorafuse.adapters.placed import Placed
from lorafuse.checkpoint import Checkpoint
from lorafuse.codecs import Sources
from lorafuse.codecs.dense import DenseSources
from lorafuse.codecs.sources import is_conv1d
from lorafuse.errors import AdapterError, CheckpointError, listed, shown
from lorafuse.naming import Names
from lorafuse.right_base import base_copies, doubts, naming_the_base
from lorafuse.settings import Settings
from lorafuse.several import Found, Weighted, combine, common_model, in_order
from lorafuse.steps import STORED_TENSOR_NBYTES, Plan, PlannedShard, Step, natural_key, split_shards
from lorafuse.structure import Structure, structure_of
from lorafuse.tensors import DTYPES, FLOATS, SAFETENSORS_NAMES, TensorSpec
from lorafuse.trained_base import base_weights
from lorafuse.turns import fit_memory, turns


def make_plan(
    ckpt: Checkpoint,
    adapter: AdapterDir,
    settings: Settings,
    others: Sequence[Weighted] = (),
    weights: Mapping[str, Sources] | None = None,
) -> Plan:
    """Decide everything. `others` are adapters whose updates are added to those of `adapter`. Plans that get the same `weights`,
    those of `ckpt`, can be carried out together. Raises CheckpointError, AdapterError, or UsageError when the memory limit is too
    small."""
    warnings = [*ckpt.warnings]
    weights = weights or base_weights(ckpt, settings.base_quant, warnings.append)
    adapters = in_order([Weighted(adapter, settings.adapter_scale), *others])
    warnings += doubts(ckpt.path, weights, [one.adapter for one in adapters])
    found = [_read(one, weights, ckpt.config, warnings.append) for one in adapters]
    model = common_model(found)
    names = Names(model.weights, model.config)
    for one in found:
        one.edits = _own_edits(one, names, warnings.append)
    copies = [copy for one in found for copy in base_copies(one.adapter, one.edits, names)]
    edits, ignored = combine(found, model, names)
    untied = _settle_tied(names, edits, ignored)
    steps = _steps(model, names, edits, untied, settings.dtype)
    if not steps:
        raise CheckpointError(f"{shown(ckpt.path)}: holds no weight.")
    shards = split_shards(steps, settings.max_shard_nbytes)
    n_entries = len(ckpt.tensors) + max(len(steps) - len(weights), 0) + sum(len(o.adapter.store.tensors) for o in others)
    held_nbytes = sum(one.adapter.nbytes for one in adapters) + n_entries * STORED_TENSOR_NBYTES
    memory = fit_memory(turns([steps]), held_nbytes, settings)
    config_changes = model.changes | _config_changes(names, steps, untied, listed(one.adapter.file for one in adapters))
    used = sorted({key for edit in edits.values() for key in edit.keys}.union(*model.added.values()))
    plan_id = _plan_id(ckpt, adapter, adapters, settings, shards)
    return Plan(shards, plan_id, memory, held_nbytes, config_changes, used, ignored, warnings, copies)


def _read(one: Weighted, weights: Mapping[str, Sources], config: dict[str, Any], warn: Callable[[str], None]) -> Found:
    """What an adapter says, and of which model."""
    said, ignored = updates_of(one.adapter, one.weight, config.get("model_type"), warn)
    with naming_the_base(one.adapter):
        return Found(one.adapter, one.weight, structure_of(weights, config, one.adapter, said, warn), ignored)


def _own_edits(one: Found, names: Names, warn: Callable[[str], None]) -> dict[str, Edit]:
    """What the adapter alone does to each weight."""
    with naming_the_base(one.adapter):
        edits = _edits(one.model.said, names, one.adapter, warn)
    _fill_tied(names, edits, one.adapter)
    whole = [weight for weight, edit in edits.items() if edit.replaced] + list(one.model.added)
    if whole and one.weight != 1:
        warn(f"{one.adapter.file}: holds {listed(whole)} whole, which a weight of {one.weight:g} does not change.")
    return edits


def _edits(said: list[Update | Choice], names: Names, adapter: AdapterDir, warn: Callable[[str], None]) -> dict[str, Edit]:
    """Weight → edit. Replacements first: an update goes on top of them."""
    unusual = unusual_prefixes(adapter)
    if unusual:
        warn(unusual)
    found = names.resolve(_parameters(said), adapter.file, warn)
    updates: list[Update] = []
    for one in said:
        updates += one.settle({name: found[name] for name in one.parameters}) if isinstance(one, Choice) else [one]
    edits: dict[str, Edit] = {}
    for update in sorted(updates, key=lambda update: update.make is not None):
        parameter = found.get(update.parameter) or _beside_weight(update.parameter, found, names)
        if parameter is None:
            continue
        for part in parameter.parts:
            edit = edits.setdefault(part.weight, Edit())
            edit.keys += update.keys
            sources = edit.replaced or names.base_of(part.weight)
            if update.replaced:
                _replace(update, part, sources.spec, edit, names, adapter)
            if update.make:
                beside = _sources_beside(update, found, names, edits)
                edit.patches.append(_patch(update, parameter, part, sources, beside, names, adapter))
    return edits


def _parameters(said: list[Update | Choice]) -> dict[str, str]:
    """The parameters to find, each with a tensor that names it."""
    wanted: dict[str, str] = {}
    for one in said:
        if isinstance(one, Choice):
            wanted |= dict.fromkeys(one.parameters, one.keys[0])
        else:
            names = [one.beside] if one.optional else [one.parameter, one.beside]
            wanted |= {name: one.keys[0] for name in names if name is not None}
    return wanted


def _beside_weight(parameter: str, found: Mapping[str, Parameter], names: Names) -> Parameter | None:
    """An optional parameter, a bias: what stands beside the weight of its module, if anything does."""
    module, _, leaf = parameter.rpartition(".")
    weight = found.get(f"{module}.weight")
    if weight is None or len(weight.parts) != 1 or not weight.parts[0].whole:
        return None
    name = f"{weight.parts[0].weight.rpartition('.')[0]}.{leaf}"
    return Parameter(names.weights[name].spec.shape, (Part(name),)) if name in names.weights else None


def _sources_beside(update: Update, found: Mapping[str, Parameter], names: Names, edits: dict[str, Edit]) -> Sources | None:
    if update.beside is None:
        return None
    weight = found[update.beside].parts[0].weight
    return edits.get(weight, Edit()).replaced or names.base_of(weight)


def _replace(update: Update, part: Part, spec: TensorSpec, edit: Edit, names: Names, adapter: AdapterDir) -> None:
    if edit.replaced:
        both = listed(edit.keys)
        raise AdapterError(f"{adapter.file}: {both} replace the same weight, {shown(part.weight)}; which is meant?")
    if not part.whole or part.transposed:
        raise AdapterError(
            f"{adapter.file}: {shown(update.keys[0])} replaces a parameter that the checkpoint stores in another form, in "
            f"{shown(part.weight)}; that is not supported."
        )
    _check_replacement(update, part.weight, spec, names, adapter)
    edit.replaced = update.replaced


def _patch(
    update: Update, parameter: Parameter, part: Part, sources: Sources, beside: Sources | None, names: Names, adapter: AdapterDir
) -> Patch:
    """The update's patch for this weight, moved to the rows that it has of the parameter."""
    assert update.make is not None
    key, spec, quantized = shown(update.keys[0]), sources.spec, not isinstance(sources, DenseSources)
    if spec.dtype not in FLOATS:
        raise AdapterError(f"{adapter.file}: {key} updates {shown(part.weight)}, which is {spec}.")
    conv1d = is_conv1d(names.config, part.weight) != part.transposed
    if update.stacked:
        return update.make(Target(part.weight, spec, conv1d, part, beside))
    if part.expert is not None:
        raise AdapterError(f"{adapter.file}: {key} updates {shown(part.weight)} and others as one matrix; that is not supported.")
    if part.whole:
        return update.make(Target(part.weight, spec, conv1d, beside=beside, quantized=quantized))
    whole = TensorSpec(spec.dtype, parameter.shape)
    inner = update.make(Target(part.weight, whole, conv1d, beside=beside, quantized=quantized))
    if inner.reads_base or inner.row_multiple > 1:
        raise AdapterError(
            f"{adapter.file}: {key} changes {shown(update.parameter)} as a whole, which the checkpoint stores in another form, in "
            f"{shown(part.weight)}; that is not supported."
        )
    return Placed(inner, part)


def _check_replacement(update: Update, weight: str, spec: TensorSpec, names: Names, adapter: AdapterDir) -> None:
    assert update.replaced is not None
    new = update.replaced.spec
    rows_only = new.shape[1:] == spec.shape[1:] and len(new.shape) == len(spec.shape) > 0
    if new.shape != spec.shape and not (rows_only and names.may_resize(weight)):
        raise AdapterError(
            f"{adapter.file}: {shown(update.keys[0])} is {list(new.shape)}, but {shown(weight)} is {list(spec.shape)}; is the "
            "adapter for another base?",
            misfit=True,
        )


def _fill_tied(names: Names, edits: dict[str, Edit], adapter: AdapterDir) -> None:
    """What an adapter that names one side of a tied pair does to the other. Replaced rows are those of both, unless the head has
    its own."""
    pair = names.tied
    if pair is None or not (pair.embed in edits or pair.head in edits):
        return
    names.refuse_shared(adapter.file)
    embed, head = edits.get(pair.embed), _with_tied_rows(edits.get(pair.embed), edits.get(pair.head))
    if adapter.ties_embeddings:
        embed, head = embed or head, head or embed
    edits |= {weight: edit for weight, edit in ((pair.embed, embed), (pair.head, head)) if edit}


def _settle_tied(names: Names, edits: dict[str, Edit], ignored: dict[str, str]) -> bool:
    """Whether a tied pair has to be untied, since its sides are not edited alike.

    LoRA on one side of a tied pair changes only that side in training, so the pair comes apart; PEFT's merge adds the update to the
    shared tensor, and so to both.
    """
    pair = names.tied
    if pair is None or not (pair.embed in edits or pair.head in edits):
        return False
    embed, head = edits.get(pair.embed), edits.get(pair.head)
    if not embed or not head or not embed.same_as(head):
        return True
    if not pair.head_stored:
        del edits[pair.head]
        repeated = set(head.keys) - set(embed.keys)
        ignored |= dict.fromkeys(sorted(repeated), f"equal to the update of {pair.embed}, to which it is tied")
    return False


def _with_tied_rows(embed: Edit | None, head: Edit | None) -> Edit | None:
    """The head's edit, with the rows that it takes over from the embedding: PEFT replaces them below any LoRA of the head."""
    rows = [patch for patch in embed.patches if patch.follows_tie] if embed else []
    if not rows or (head and any(patch.follows_tie for patch in head.patches)):
        return head
    assert embed is not None
    head = head or Edit()
    return Edit(head.replaced, [*rows, *head.patches], [*embed.keys, *head.keys])


def _steps(model: Structure, names: Names, edits: dict[str, Edit], untied: bool, dtype: str) -> list[Step]:
    bases = dict(model.weights)
    if untied and names.tied:
        bases.setdefault(names.tied.head, bases[names.tied.embed])
    steps = []
    for name in sorted(bases, key=natural_key):
        base, edit = bases[name], edits.get(name, Edit())
        sources = edit.replaced or base
        out = base.out_dtype if dtype == "auto" or base.out_dtype not in FLOATS else SAFETENSORS_NAMES[dtype]
        action = _action(edit, base, out, stored=name in model.weights and name not in model.added)
        steps.append(Step(name, TensorSpec(out, sources.spec.shape), sources, edit.patches, action))
    return steps


def _action(edit: Edit, base: Sources, out_dtype: str, *, stored: bool) -> str:
    if edit.patches:
        return "merged"
    if edit.replaced:
        return "replaced"
    if not stored:
        return "added"
    # "decoded" also covers a dense weight that is quantized and dequantized, or only changes its dtype.
    return "copied" if isinstance(base, DenseSources) and base.spec.dtype == out_dtype else "decoded"


def _config_changes(names: Names, steps: list[Step], untied: bool, files: str) -> dict[str, Any]:
    """Fields of config.json that the result needs: dtype, and vocab_size and tie_word_embeddings where they change."""
    totals: Counter[str] = Counter()
    for step in steps:
        if step.spec.dtype in FLOATS:
            totals[step.spec.dtype] += step.spec.nbytes
    changes: dict[str, Any] = {"dtype": DTYPES[totals.most_common(1)[0][0]][1]} if totals else {}
    if untied:
        changes["tie_word_embeddings"] = False
    after = {step.name: step.spec.shape[0] for step in steps if step.name in (names.embed, names.head)}
    before = {name: names.weights[name].spec.shape[0] for name in after if name in names.weights}
    if any(after[name] != before[name] for name in before):
        if len(set(after.values())) > 1:
            both = " and ".join(f"{name} has {n} rows" for name, n in after.items())
            raise AdapterError(f"{files}: resizes the vocabulary on one side only: {both}.")
        changes["vocab_size"] = next(iter(after.values()))
    return changes


def _plan_id(
    ckpt: Checkpoint, adapter: AdapterDir, adapters: Sequence[Weighted], settings: Settings, shards: list[PlannedShard]
) -> str:
    """sha256 of everything that the output depends on, inputs by their sizes and headers."""
    identity: dict[str, Any] = {
        "version": __version__,
        "settings": settings.decisive,
        "checkpoint": [[shard.path.name, shard.nbytes, shard.header_sha256] for shard in ckpt.shards],
        "adapter": [[[file.name, file.stat().st_size] for file in adapter.files], adapter.config],
        "outputs": [[shard.file, [[s.name, s.spec.dtype, s.spec.shape, s.action] for s in shard.steps]] for shard in shards],
    }
    if len(adapters) > 1:
        identity["adapters"] = [one.identity for one in adapters]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
