"""Adapters that do not fit: what is changed in them, and the text of the refusal."""

import build
import pytest
from oracle import read_adapter
from safetensors.torch import save_file

import lorafuse
from lorafuse.errors import AdapterError

MODULE = "model.layers.0.self_attn.q_proj"
Q = f"base_model.model.{MODULE}"
ANOTHER_BASE = "is the adapter for another base?"


def put(tensors):
    """Changes tensors of the file, None drops one: by whole key, or by leaf in q_proj of the first layer."""

    def change(stored):
        for leaf, tensor in tensors.items():
            key = leaf if leaf.startswith("base_model.") else f"{Q}.{leaf}"
            stored.pop(key, None)
            if tensor is not None:
                stored[key] = tensor

    return change


def only(tensors):
    """The file has these tensors of q_proj of the first layer and no others."""

    def change(stored):
        stored.clear()
        put(tensors)(stored)

    return change


def refusal_of(made, tmp_path, fields=None, change=None):
    """The text with which a changed adapter is refused, {file} and {config} for its files; nothing is
    written."""
    adapter = made.copy(tmp_path / "adapter")
    build.rewrite(adapter, **(fields or {}))
    if change:
        stored = read_adapter(adapter)
        change(stored)
        save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(made.ckpt, adapter, tmp_path / "work" / "out")
    assert not (tmp_path / "work").exists()
    text = build.refusal(caught)
    for name, file in (("file", "adapter_model.safetensors"), ("config", "adapter_config.json")):
        text = text.replace(str(adapter / file), f"{{{name}}}")
    return text
