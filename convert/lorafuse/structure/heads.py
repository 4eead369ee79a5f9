"""Task heads that an adapter brings: `score`, `classifier`, `decode_head`, trained on a checkpoint that has
none, or one for another number of labels.

PEFT saves them whole (modules_to_save). The output becomes a checkpoint of the class with that head: the head
is added, the heads of other classes are left out. `models.json` says which tensors each class has; an adapter
that brings only some of them is refused, since the others were random when training began and are nowhere.
"""

import re
from collections.abc import Mapping, Sequence
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

BY_LABEL = ("labels", "labels+1")  # detection has a row for what is nothing
# PEFT 0.21 utils/peft_types.py, TaskType, as far as they have heads.
PEFT_TASKS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

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
    modules = {_module(name) for entry in kind["classes"].values() for name in entry["head"]}
    offered = {name: update for name, update in whole.items() if _module(name) in modules}
    if not offered:
        return None
    renames = Renames(config)
    in_memory = {name: renames.memory_names(name)[0][0] for name in weights}
    stored = {memory: name for name, memory in in_memory.items()} | {name: name for name in weights}
    resized = {
        name
        for name, update in offered.items()
        if name in stored
        and update.replaced
        and update.replaced.spec.shape != weights[stored[name]].spec.shape
    }
    if offered.keys() <= stored.keys() and not any(_is_by_label(kind, name) for name in resized):
        return None
    task = _class_of(kind["classes"], offered, adapter)
    _check_prefix(kind, task, in_memory, adapter)
    updates = _collect(kind, task, in_memory, whole, adapter)
    n_labels = _check_shapes(task, updates, config, adapter)
    dropped = _dropped(kind, task, in_memory)
    changes: dict[str, Any] = {"architectures": [task["class"]]}
    if n_labels is not None:
        changes |= _labels(n_labels, config, adapter)
    new = {
        stored.get(name, name): update
        for name, update in updates.items()
        if name not in stored or name in resized
    }
    warn(_notice(task, new, dropped, n_labels, changes, adapter, resized=bool(resized)))
    return NewHead(new, dropped, changes)


def _numberless(name: str) -> str:
    """With * for the number of a layer, as the table has it."""
    return _NUMBER.sub("*", name)


def _module(name: str) -> str:
    return name.partition(".")[0]


def _is_by_label(kind: Mapping[str, Any], name: str) -> bool:
    """Whether a part of a head has a row for each label."""
    heads = [entry["head"].get(_numberless(name)) for entry in kind["classes"].values()]
    return any(dims and dims[0] in BY_LABEL for dims in heads)


def _class_of(classes: Mapping[str, Any], offered: Whole, adapter: AdapterDir) -> dict[str, Any]:
    """The class that the head belongs to: the one that the adapter's config names, or that of its task_type,
    and where it says nothing, by the names."""
    auto_mapping = adapter.config.get("auto_mapping")
    named = str(auto_mapping.get("base_model_class")) if isinstance(auto_mapping, dict) else ""
    task_type = str(adapter.config.get("task_type"))
    known = [entry | {"class": name} for name, entry in classes.items()]
    patterns = {_numberless(name) for name in offered}
    fitting = (
        [entry for entry in known if entry["class"] == named]
        or [entry for entry in known if entry["task"] == task_type]
        or [entry for entry in known if entry["head"].keys() == patterns]
    )
    if len(fitting) == 1:
        chosen: dict[str, Any] = fitting[0]
        strange = [name for name in offered if _numberless(name) not in chosen["head"]]
        if not strange:
            return chosen
        raise AdapterError(
            f"{adapter.file}: {shown(offered[min(strange)].keys[0])} is no part of the head of "
            f"{chosen['class']}, which has {listed(chosen['head'])}; task_type in {CONFIG} says which head "
            "is meant."
        )
    keys = [update.keys[0] for update in offered.values()]
    if fitting:
        raise AdapterError(
            f"{adapter.file}: {listed(keys)} may be the head of "
            f"{' or '.join(entry['class'] for entry in fitting)}; {_way_to_say(fitting)}."
        )
    all_heads = "; ".join(f"{entry['class']} has {listed(entry['head'])}" for entry in known)
    raise AdapterError(
        f"{adapter.file}: {listed(keys)} are not one head that transformers knows: {all_heads}."
    )


def _way_to_say(fitting: Sequence[Mapping[str, Any]]) -> str:
    """How adapter_config.json names one of several classes: PEFT has a task_type for some only."""
    tasks = [entry["task"] for entry in fitting]
    if len(set(tasks)) == len(tasks) and PEFT_TASKS.issuperset(tasks):
        return f"set task_type in {CONFIG} to {' or '.join(tasks)}"
    return f'set "auto_mapping": {{"base_model_class": …}} in {CONFIG} to the class that was trained'


def _check_prefix(
    kind: Mapping[str, Any], task: Mapping[str, Any], in_memory: InMemory, adapter: AdapterDir
) -> None:
    """Some classes keep the model under another name, so that transformers finds none of its weights in this
    checkpoint."""
    usual = _before(kind["prefix"])
    if task["prefix"] not in ("", kind["prefix"]) and any(
        name.startswith(usual) for name in in_memory.values()
    ):
        raise AdapterError(
            f"{adapter.file}: holds the head of {task['class']}, which keeps the model under "
            f"{task['prefix']!r}, while the checkpoint has {kind['prefix']!r}: transformers loads none of "
            "its weights into that class, so the adapter was trained on another base.",
            misfit=True,
        )


def _collect(
    kind: Mapping[str, Any],
    task: Mapping[str, Any],
    in_memory: InMemory,
    whole: Whole,
    adapter: AdapterDir,
) -> dict[str, Update]:
    """What the class has and the checkpoint has not, from the adapter."""
    there = set(in_memory.values())
    inside = {_inside(name, kind, task) for name in there}
    lacking = [_before(task["prefix"]) + name for name in task["needs"] if name not in inside]
    wanted = [*task["head"], *lacking]
    held = {_numberless(name) for name in (*there, *whole)}
    if missing := [name for name in wanted if name not in held]:
        raise AdapterError(
            f"{adapter.file}: {task['class']} also has {listed(missing)}, which neither the checkpoint nor "
            "the adapter holds: it was random when training began, and was not saved. Train with it in "
            "modules_to_save."
        )
    return {name: whole[name] for one in wanted for name in whole if _numberless(name) == one}


def _check_shapes(
    task: Mapping[str, Any], updates: Whole, config: Mapping[str, Any], adapter: AdapterDir
) -> int | None:
    """Compares the head with the config. Returns the number of labels, None for a class with a fixed number
    of outputs."""
    n_labels: int | None = None
    for name, update in updates.items():
        dims = task["head"].get(_numberless(name))
        if dims is None or update.replaced is None:
            continue
        shape = update.replaced.spec.shape
        sizes = [_size(dim, config) for dim in dims]
        if dims and len(shape) == len(dims) and dims[0] in BY_LABEL:
            more = int(dims[0] == "labels+1")
            n_labels = n_labels or shape[0] - more
            sizes[0] = n_labels + more
        fits = len(shape) == len(sizes) and all(
            n in (size, None) for n, size in zip(sizes, shape, strict=True)
        )
        if not fits or 0 in shape:
            rows = [
                dim if size is None or dim == "labels" else size
                for dim, size in zip(dims, sizes, strict=True)
            ]
            raise AdapterError(
                f"{adapter.file}: {shown(update.keys[0])} is {list(shape)}, but {name} of {task['class']} is "
                f"[{', '.join(map(str, rows))}] for this checkpoint; is the adapter for another base?",
                misfit=True,
            )
    return n_labels


def _size(dim: str | int | None, config: Mapping[str, Any]) -> int | None:
    """What the config says for a dimension of the table, such as "2*text_config.hidden_size"; None for any,
    also where it leaves the field to its default."""
    if not isinstance(dim, str):
        return dim
    times, _, path = dim.rpartition("*")
    value: Any = config
    for field in path.split("."):
        value = value.get(field) if isinstance(value, Mapping) else None
    return int(times or 1) * value if type(value) is int else None


def _before(prefix: str) -> str:
    """What stands before a name of the model in a class with this prefix."""
    return f"{prefix}." if prefix else ""


def _inside(name: str, kind: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """A parameter of the model as the table has it."""
    return _numberless(name.removeprefix(_before(task["prefix"]) or _before(kind["prefix"])))


def _dropped(kind: Mapping[str, Any], task: Mapping[str, Any], in_memory: InMemory) -> frozenset[str]:
    """Heads of other classes, and parts of the model that the class does without."""
    unneeded = set(kind["variants"]) - set(task["needs"])
    # A checkpoint of the model alone has no heads; its modules may be called as those of others.
    before = _before(task["prefix"])
    headed = any(name.startswith(before) for name in in_memory.values())
    return frozenset(
        weight
        for weight, name in in_memory.items()
        if (headed and _module(name) in kind["outside"] and _numberless(name) not in task["head"])
        or _inside(name, kind, task) in unneeded
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
    *,
    resized: bool,
) -> str:
    named = "" if n_labels is None else f" with {n_labels} labels ({listed(changes['id2label'].values(), 3)})"
    other_size = " or has for another number of labels" if resized else ""
    gone = f"; {listed(sorted(dropped))} {'is' if len(dropped) == 1 else 'are'} left out" if dropped else ""
    return (
        f"{adapter.file}: brings {listed(updates)}, which the checkpoint lacks{other_size}; the output is a "
        f"{task['class']}{named}{gone}."
    )
