"""An adapter by its config and its headers: what kind it is, how large, what it updates, and what keeps it
from being merged."""

import posixpath
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from lorafuse.adapters import REFUSED_TYPES, AdapterDir, Choice, Update, updates_of
from lorafuse.adapters.reading.directory import adapters_in, is_mlx
from lorafuse.adapters.reading.keys import unusual_prefixes
from lorafuse.errors import AdapterError
from lorafuse.files.hub import folder_of

# Fields that have entries of their own, or that only training or loading needs.
_ELSEWHERE = (
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "target_modules",
    "modules_to_save",
    "model",
)
_UNIMPORTANT = (
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
)


def inspect_adapters(name: str, folders: Sequence[str | None]) -> dict[str, Any]:
    """The adapter in the directory or hub id itself (None), or those in its sub-folders. Raises AdapterError
    where none can be read, StorageError."""
    readable, errors = [], []
    for folder in folders:
        try:
            readable.append(_inspect(name, folder))
        except AdapterError as e:
            errors.append(e)
    if not readable:
        raise errors[0]
    if len(folders) == 1:
        return readable[0]
    return {"kind": "adapters", "path": name, "adapters": readable, "problems": [str(e) for e in errors]}


def _inspect(name: str, folder: str | None) -> dict[str, Any]:
    root = folder_of(name, AdapterError, whole=True)
    where = name if folder is None else f"{name.rstrip('/')}/{folder}"
    with closing(AdapterDir(root, folder, where)) as adapter:
        return _facts(adapter) | {
            "path": where,
            "sub_folders": adapters_in(root)[1] if folder is None else [],
        }


def _facts(adapter: AdapterDir) -> dict[str, Any]:
    config, specs = adapter.config, [info.spec for info in adapter.store.tensors.values()]
    return {
        "kind": "adapter",
        "format": "MLX-LM" if is_mlx(config) else "PEFT",
        "type": config.get("fine_tune_type", "lora") if is_mlx(config) else config.get("peft_type"),
        "task_type": config.get("task_type"),
        "base_model": config.get("model") if is_mlx(config) else config.get("base_model_name_or_path"),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "config": {name: value for name, value in sorted(config.items()) if _matters(name, value)},
        "n_tensors": len(specs),
        "n_parameters": sum(spec.numel for spec in specs),
        "nbytes": sum(spec.nbytes for spec in specs),
        "dtypes": Counter(spec.torch_name for spec in specs),
        "files": [posixpath.basename(file) for file in adapter.files],
        "beside": adapter.beside,
        **_updates(adapter),
    }


def _matters(name: str, value: Any) -> bool:
    return (
        name not in _ELSEWHERE + _UNIMPORTANT
        and value is not None
        and value is not False
        and value not in ([], {}, "")
    )


def _updates(adapter: AdapterDir) -> dict[str, Any]:
    """What the adapter says of its base, or why it cannot be merged, whatever the base."""
    warnings: list[str] = []
    said: list[Update | Choice] = []
    ignored: dict[str, str] = {}
    problems = []
    try:
        said, ignored = updates_of(adapter, 1.0, warnings.append)
    except AdapterError as e:
        problems.append(str(e))
    # Keys of other types are PEFT's own, whatever they are.
    unusual = None if adapter.config.get("peft_type") in list(REFUSED_TYPES) else unusual_prefixes(adapter)
    updates = [edit for edit in said if not (isinstance(edit, Update) and edit.replaced)]
    scales = Counter(
        (update.facts["rank"], update.facts["scale"])
        for update in updates
        if isinstance(update, Update) and update.facts
    )
    return {
        "n_updates": len(updates),
        "scales": [
            {"rank": rank, "scale": scale, "n_updates": n} for (rank, scale), n in sorted(scales.items())
        ],
        "replaced": [edit.parameter for edit in said if isinstance(edit, Update) and edit.replaced],
        "ignored": ignored,
        "warnings": [*warnings, unusual] if unusual else warnings,
        "problems": problems,
    }
