"""The result of a merge, by its receipt: what was merged into what, and how much of each update was kept.
Needs no torch."""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.safetensors_file import FormatError
from lorafuse.files.tensors import FLOATS, SAFETENSORS_NAMES
from lorafuse.receipt.read import kept_in_sum, merged_inputs, read_receipt, sizes_in_sum, worst_first

_FIGURES = ("kept", "noise", "delta_rel", "delta_norm", "changed", "clipped")


def inspect_merged(folder: Folder, name: str) -> dict[str, Any]:
    """The receipt in sum, and the merged weights, worst first. Raises ResultError for a damaged receipt."""
    receipt = read_receipt(folder)
    assert receipt, "it has a receipt, or something else is inspected"
    tensors = receipt["tensors"]
    shards = [output for output in receipt["outputs"] if output["file"].endswith(".safetensors")]
    config: dict[str, Any] = {}
    with suppress(FormatError, OSError, ValueError):
        config = read_json_dict(folder, "config.json")
    floats = [entry for entry in tensors.values() if SAFETENSORS_NAMES.get(entry["dtype"]) in FLOATS]
    return {
        "kind": "merged",
        "path": name,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "tool": receipt["tool"],
        "settings": receipt["settings"],
        "base_semantics": receipt["base_semantics"],
        "checkpoint": next((entry["path"] for entry in merged_inputs(receipt, "checkpoint")), None),
        "adapters": merged_inputs(receipt, "adapter"),
        "n_weights": len(tensors),
        "n_parameters": sum(math.prod(entry["shape"]) for entry in floats),
        "nbytes": sum(output["size"] for output in shards),
        "files": [output["file"] for output in shards],
        "dtypes": Counter(entry["dtype"] for entry in tensors.values()),
        "actions": Counter(entry["action"] for entry in tensors.values()),
        "ignored": receipt["adapter_tensors"]["ignored"],
        "update": kept_in_sum(tensors, receipt["settings"]),
        "sizes": sizes_in_sum(tensors),
        "weights": [_weight(weight, tensors[weight]) for weight in worst_first(tensors)],
    }


def _weight(name: str, entry: Mapping[str, object]) -> dict[str, Any]:
    figures = {figure: entry.get(figure) for figure in _FIGURES}
    return {
        "name": name,
        "dtype": entry["dtype"],
        "shape": entry["shape"],
        "rank": entry.get("rank"),
        **figures,
    }
