"""Adapters: one file per PEFT type, and `open_adapter`, which reads any of them.

An adapter module has one function, `updates(adapter, scale, warn)`, which returns a list of Update (or Choice) and the ignored
tensors with reasons. A type is added by one file and one word in ADAPTERS.
"""

from pathlib import Path
from types import ModuleType

from lorafuse.adapters import (
    beft,
    boft,
    c3a,
    delora,
    fourierft,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    loha,
    lokr,
    lora,
    miss,
    oft,
    pvera,
    randlora,
    road,
    shira,
    vblora,
    vera,
    waveft,
)
from lorafuse.adapters.patch import Choice, Edit, Patch, Target, Update
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, listed, shown

ADAPTERS: dict[str, ModuleType] = {
    "BEFT": beft,
    "BOFT": boft,
    "C3A": c3a,
    "DELORA": delora,
    "FOURIERFT": fourierft,
    "GLORA": glora,
    "GRALORA": gralora,
    "HIRA": hira,
    "HRA": hra,
    "IA3": ia3,
    "LOHA": loha,
    "LOKR": lokr,
    "LORA": lora,
    "MISS": miss,
    "OFT": oft,
    "PVERA": pvera,
    "RANDLORA": randlora,
    "ROAD": road,
    "SHIRA": shira,
    "VBLORA": vblora,
    "VERA": vera,
    "WAVEFT": waveft,
}

__all__ = ["ADAPTERS", "AdapterDir", "Choice", "Edit", "Patch", "Target", "Update", "module_of", "open_adapter"]


def open_adapter(path: Path) -> AdapterDir:
    """An adapter directory whose type is known here. Raises AdapterError."""
    adapter = AdapterDir(path)
    try:
        module_of(adapter)
    except BaseException:
        adapter.close()
        raise
    return adapter


def module_of(adapter: AdapterDir) -> ModuleType:
    kind = adapter.config.get("peft_type")
    if kind is None:
        raise AdapterError(f"{adapter.path / CONFIG}: has no peft_type; it was not written by PEFT.")
    module = ADAPTERS.get(kind) if isinstance(kind, str) else None
    if module is None:
        raise AdapterError(f"{adapter.path / CONFIG}: peft_type {shown(kind)} is not supported; known are {listed(ADAPTERS)}.")
    return module
