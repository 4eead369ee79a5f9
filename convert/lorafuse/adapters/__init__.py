"""Adapters: one file per PEFT type, one for MLX-LM, and `open_adapter`, which reads any of them.

A module of `types/` satisfies `AdapterType`: its function `updates(adapter, scale, warn)` returns a list of
Update (or Choice) and the ignored tensors with reasons. A type is added by one file and one word in ADAPTERS.
"""

from collections.abc import Callable
from importlib import import_module
from typing import cast

from lorafuse.adapters.adapter_type import AdapterType
from lorafuse.adapters.reading.beside import unused_weights
from lorafuse.adapters.reading.check_tensors import refuse_placeholders
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir, adapter_folder, is_mlx
from lorafuse.adapters.reading.known_fields import check_fields
from lorafuse.adapters.updates import Choice, Edit, Update
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.folder import Folder
from lorafuse.patches.patch import Patch
from lorafuse.patches.target import Target

# Type → its module, or the module's name in `types/`, which is imported when it is asked for: of small limits
# on memory all of them would be a part.
ADAPTERS: dict[str, AdapterType | str] = {
    "ADALORA": "adalora",
    "BEFT": "beft",
    "BOFT": "boft",
    "C3A": "c3a",
    "DEFT": "deft",
    "DELORA": "delora",
    "FOURIERFT": "fourierft",
    "FROD": "frod",
    "GLORA": "glora",
    "GRALORA": "gralora",
    "HIRA": "hira",
    "HRA": "hra",
    "IA3": "ia3",
    "LN_TUNING": "ln_tuning",
    "LOHA": "loha",
    "LOKR": "lokr",
    "LORA": "lora",
    "MISS": "miss",
    "MLX": "mlx",
    "OFT": "oft",
    "OSF": "osf",
    "PVERA": "pvera",
    "RANDLORA": "randlora",
    "ROAD": "road",
    "SHIRA": "shira",
    "SUPERTUNING": "supertuning",
    "TINYLORA": "tinylora",
    "TRAINABLE_TOKENS": "trainable_tokens",
    "UNILORA": "unilora",
    "VBLORA": "vblora",
    "VERA": "vera",
    "WAVEFT": "waveft",
}

_PROMPT = "it trains inputs of the model, not weights"
# Types that no change of weights equals, or whose update cannot be known from the files: type → why, in plain
# words.
REFUSED_TYPES: dict[str, str] = {
    "ADAMSS": "its subspaces are found by clustering singular vectors of the base weight, and the clusters "
    "are not in the file",
    "ADAPTION_PROMPT": "it adds attention to trained inputs, which no weight holds",
    "CARTRIDGE": "it trains a key-value cache, not weights",
    "CPT": _PROMPT,
    "LILY": "a router chooses between factors for each input, so no merged weight equals it",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PEANUT": "its update is a network applied to the base weight, which is not implemented",
    "POLY": "a router chooses between skills for each task, so no merged weight equals it",
    "PREFIX_TUNING": "it trains a key-value cache, not weights",
    "PROMPT_TUNING": _PROMPT,
    "PSOFT": "its factors A and B come from an SVD of the base weight and are not in the file, and the sign "
    "of a singular vector "
    "is each library's choice, so the update depends on where it was trained",
    "P_TUNING": _PROMPT,
    "SHADOW": "a second network runs beside the model, so no merged weight equals it",
    "XLORA": "a classifier mixes LoRA adapters for each input, so no merged weight equals it",
}

__all__ = [
    "ADAPTERS",
    "REFUSED_TYPES",
    "AdapterDir",
    "AdapterType",
    "Choice",
    "Edit",
    "Patch",
    "Target",
    "Update",
    "adapter_folder",
    "module_of",
    "open_adapter",
    "updates_of",
]


def open_adapter(root: Folder, sub_folder: str | None = None, name: str | None = None) -> AdapterDir:
    """The adapter of a type that is known here in `root`, which the user called `name`, or in a sub-folder of
    it. Raises AdapterError."""
    adapter = AdapterDir(root, sub_folder, name)
    try:
        type_of(adapter)
    except BaseException:
        adapter.close()
        raise
    return adapter


def updates_of(
    adapter: AdapterDir, scale: float, warn: Callable[[str], None]
) -> tuple[list[Update | Choice], dict[str, str]]:
    """What the adapter says of its base, and the tensors that it ignores, with reasons. Raises
    AdapterError."""
    refuse_placeholders(adapter)
    check_fields(adapter, warn)
    if unused := unused_weights(adapter.folder, adapter.files):
        warn(unused)
    said, ignored = type_of(adapter).updates(adapter, scale, warn)
    return list(said), ignored


def type_of(adapter: AdapterDir) -> AdapterType:
    """The module that reads the adapter. Raises AdapterError where there is none."""
    kind = "MLX" if is_mlx(adapter.config) else adapter.config.get("peft_type")
    if kind is None:
        raise AdapterError(
            f"{adapter.folder / CONFIG}: has no peft_type; it was written neither by PEFT nor by MLX-LM."
        )
    if isinstance(kind, str) and kind in REFUSED_TYPES:
        raise AdapterError(
            f"{adapter.folder / CONFIG}: peft_type {kind} cannot be merged: {REFUSED_TYPES[kind]}."
        )
    if not isinstance(kind, str) or kind not in ADAPTERS:
        right = str(kind).upper()
        spelling = f"; PEFT spells it {right}" if right in ADAPTERS else ""
        raise AdapterError(
            f"{adapter.folder / CONFIG}: peft_type {shown(kind)} is not supported; known are "
            f"{listed(ADAPTERS)}{spelling}."
        )
    return module_of(kind)


def module_of(kind: str) -> AdapterType:
    """The module of a type in ADAPTERS."""
    module = ADAPTERS[kind]
    if isinstance(module, str):
        return cast(AdapterType, import_module(f"{__name__}.types.{module}"))
    return module
