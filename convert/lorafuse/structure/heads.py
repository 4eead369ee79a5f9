"""Task heads that an adapter brings: `score`, `classifier`, `qa_outputs`, trained on a checkpoint that has
none.

PEFT saves them whole (modules_to_save of the task types SEQ_CLS, TOKEN_CLS and QUESTION_ANS). The output
becomes a checkpoint of the class with that head: the head is added, the heads of other classes are left out.
`models.json` says which tensors each class has; an adapter that brings only some of them is refused, since
the others were random when training began and are nowhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafuse.adapters import AdapterDir, Choice, Update
from lorafuse.adapters.reading.directory import CONFIG
from lorafuse.adapters.reading.modules import Warn
from lorafuse.codecs import Sources
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.naming.table import Renames
from lorafuse.structure.models import load_table

Whole = Mapping[str, Update]
InMemory = Mapping[
    str, str
]  # weight → its name once transformers has loaded it; a converter's parts have that of the whole


@dataclass(frozen=True)
class NewHead:
    """The weights that the head adds, the names of those that go, and the fields of config.json that
    change."""

    updates: dict[str, Update]
    dropped: frozenset[str]
    changes: dict[str, Any]


def new_head(
    weights: Mapping[str, Sources],
    config: dict[str, Any],
    adapter: AdapterDir,
    said: list[Update | Choice],
    warn: Warn,
) -> NewHead | None:
    """The head that the adapter brings and the checkpoint lacks, if there is one. Raises AdapterError for a
    head that is not whole or does not fit."""
    kind = load_table()["types"].get(str(config.get("model_type")))
    # Remote code has classes of its own.
    if kind is None or config.get("auto_map"):
        return None
    whole = {one.parameter: one for one in said if isinstance(one, Update) and one.replaced and not one.make}
    modules = {_module(name) for task in kind["tasks"].values() for name in task["head"]}
    offered = {name: update for name, update in whole.items() if _module(name) in modules}
    if all(name in weights for name in offered):
        return None
    task = _task(kind["tasks"], offered, adapter)
    renames = Renames(config)
    in_memory = {name: renames.memory_names(name)[0][0] for name in weights}
    _check_prefix(kind, task, in_memory, adapter)
    updates = _collect(task, in_memory, whole, adapter)
    n_labels = _check_shapes(task, updates, config, adapter)
    dropped = _dropped(kind, task, in_memory)
    changes: dict[str, Any] = {"architectures": [task["class"]]}
    if n_labels is not None:
        changes |= _labels(n_labels, config, adapter)
    new = {name: update for name, update in updates.items() if name not in weights}
    warn(_notice(task, new, dropped, n_labels, changes, adapter))
    return NewHead(new, dropped, changes)


def _module(name: str) -> str:
    return name.partition(".")[0]


def _task(tasks: Mapping[str, Any], offered: Whole, adapter: AdapterDir) -> dict[str, Any]:
    """The class that the head belongs to: by task_type, and where it says nothing, by the names."""
    stated = tasks.get(str(adapter.config.get("task_type")))
    fitting = (
        [stated] if stated else [task for task in tasks.values() if task["head"].keys() == offered.keys()]
    )
    if len(fitting) == 1:
        task: dict[str, Any] = fitting[0]
        strange = offered.keys() - task["head"].keys()
        if not strange:
            return task
        raise AdapterError(
            f"{adapter.file}: {shown(offered[min(strange)].keys[0])} is no part of the head of "
            f"{task['class']}, which has {listed(task['head'])}; task_type in {CONFIG} says which head is "
            "meant."
        )
    keys = [update.keys[0] for update in offered.values()]
    if fitting:
        raise AdapterError(
            f"{adapter.file}: {listed(keys)} may be the head of "
            f"{' or '.join(task['class'] for task in fitting)}; set task_type in {CONFIG} to "
            f"{' or '.join(name for name, task in tasks.items() if task in fitting)}."
        )
    known = "; ".join(f"{task['class']} has {listed(task['head'])}" for task in tasks.values())
    raise AdapterError(f"{adapter.file}: {listed(keys)} are not one head that transformers knows: {known}.")


def _check_prefix(
    kind: Mapping[str, Any], task: Mapping[str, Any], in_memory: InMemory, adapter: AdapterDir
) -> None:
    """Some classes keep the model under another name, so that transformers finds none of its weights in this
    checkpoint."""
    usual = f"{kind['prefix']}."
    if task["prefix"] != kind["prefix"] and any(name.startswith(usual) for name in in_memory.values()):
        raise AdapterError(
            f"{adapter.file}: holds the head of {task['class']}, which keeps the model under "
            f"{task['prefix']!r}, while the checkpoint has {kind['prefix']!r}: transformers loads none of "
            "its weights into that class, so the adapter was trained on another base.",
            misfit=True,
        )


def _collect(
    task: Mapping[str, Any], in_memory: InMemory, whole: Whole, adapter: AdapterDir
) -> dict[str, Update]:
    """What the class has and the checkpoint has not, from the adapter."""
    prefix = f"{task['prefix']}."
    there = set(in_memory.values())
    lacking = [prefix + name for name in task["needs"] if not there & {name, prefix + name}]
    missing = [name for name in [*task["head"], *lacking] if name not in there and name not in whole]
    if missing:
        raise AdapterError(
            f"{adapter.file}: {task['class']} also has {listed(missing)}, which neither the checkpoint nor "
            "the adapter holds: it was random when training began, and was not saved. Train with it in "
            "modules_to_save."
        )
    return {name: whole[name] for name in [*task["head"], *lacking] if name in whole}


def _check_shapes(
    task: Mapping[str, Any], updates: Whole, config: Mapping[str, Any], adapter: AdapterDir
) -> int | None:
    """Compares the head with the config. Returns the number of labels, None for a class with a fixed number
    of outputs."""
    n_labels: int | None = None
    for name, dims in task["head"].items():
        update = updates.get(name)
        if update is None or update.replaced is None:
            continue
        shape = update.replaced.spec.shape
        expected = [config.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
        if "labels" in dims and len(shape) == len(dims):
            n_labels = n_labels or shape[0]
            expected[0] = n_labels
        if list(shape) != expected or 0 in shape:
            rows = [dim if dim == "labels" else n for dim, n in zip(dims, expected, strict=True)]
            raise AdapterError(
                f"{adapter.file}: {shown(update.keys[0])} is {list(shape)}, but {name} of {task['class']} is "
                f"[{', '.join(map(str, rows))}] for this checkpoint; is the adapter for another base?",
                misfit=True,
            )
    return n_labels


def _dropped(kind: Mapping[str, Any], task: Mapping[str, Any], in_memory: InMemory) -> frozenset[str]:
    """Heads of other classes, and parts of the model that the class does without."""
    unneeded = set(kind["variants"]) - set(task["needs"])
    return frozenset(
        weight
        for weight, name in in_memory.items()
        if (_module(name) in kind["outside"] and name not in task["head"])
        or name.removeprefix(f"{task['prefix']}.") in unneeded
    )


def _labels(n_labels: int, config: Mapping[str, Any], adapter: AdapterDir) -> dict[str, Any]:
    """id2label and label2id: those of a config.json beside the adapter or of the checkpoint, if they are as
    many."""
    folder, beside = adapter.folder, "config.json"
    try:
        shipped = read_json_dict(folder, beside) if folder.exists(beside) else {}
    except ValueError as e:
        raise AdapterError(str(e)) from None
    for source in (shipped, config):
        names = source.get("id2label")
        if isinstance(names, dict) and names.keys() == {str(i) for i in range(n_labels)}:
            break
    else:
        names = {str(i): f"LABEL_{i}" for i in range(n_labels)}
    changes = {"id2label": names, "label2id": {str(label): int(i) for i, label in names.items()}}
    return changes | ({"num_labels": n_labels} if "num_labels" in config else {})


def _notice(
    task: Mapping[str, Any],
    updates: Whole,
    dropped: frozenset[str],
    n_labels: int | None,
    changes: Mapping[str, Any],
    adapter: AdapterDir,
) -> str:
    named = "" if n_labels is None else f" with {n_labels} labels ({listed(changes['id2label'].values(), 3)})"
    gone = f"; {listed(sorted(dropped))} {'is' if len(dropped) == 1 else 'are'} left out" if dropped else ""
    return (
        f"{adapter.file}: brings {listed(updates)}, which the checkpoint lacks; the output is a "
        f"{task['class']}{named}{gone}."
    )
