"""Quantizations whose configs have other words for what is dense than a list of modules. Each function
returns the section of an output, of that of its base.

    GPTQ         `modules_in_block_to_quantize` lists what is quantized: transformers (optimum) compares the
                 end of a module's name, vLLM any part of it. gptqmodel knows `dynamic` instead: "-:" and an
                 expression, matched from the start of a name, for what is dense; the first match counts.
    auto-round   `extra_config` has what is true of a module under its name; 16 bits are none of its codes
    MLX          false under a module's name
    AQLM         `linear_weights_not_to_quantize` has names of weights, for transformers 4; transformers 5
                 reads each as it reads modules elsewhere, so that both names are listed; neither leaves
                 anything dense that is not

ModelOpt has a list; with several formats (quant_algo MIXED_PRECISION) `quantized_layers` has the format of
each module besides, and so have the `targets` of `config_groups`: modelopt 0.47,
export/convert_hf_config.py.
"""

import re
from functools import cache
from typing import Any

from lorafuse.formats.modules import EXPERTS, Parts, catching_nothing_else

_BLOCK = re.compile(r"(?:.*?\.)?\d+\.(.+)")  # the name in the layer


def gptq(section: dict[str, Any], parts: Parts) -> dict[str, Any]:
    before = section.get("dynamic")
    named = parts.names.fused(parts.dense)
    excluded: dict[str, object] = {f"-:{_expression(name)}": {} for name in named}
    words: dict[str, object] = {
        "modules_in_block_to_quantize": [_quantized(parts)],
        "dynamic": excluded | (before if isinstance(before, dict) else {}),
    }
    if parts.names.head.removesuffix(".weight") in parts.dense:
        words["lm_head"] = False
    return section | words


def _quantized(parts: Parts) -> list[str]:
    """What is quantized: names in a layer, or whole names where a module in another layer is dense."""
    dense = [*parts.dense, *parts.names.of(parts.names.dense_matrices())]
    everywhere = cache(lambda name: not any(name in other for other in dense))
    named = ((name, _BLOCK.fullmatch(name)) for name in parts.quantized)
    return list(dict.fromkeys(found[1] if found and everywhere(found[1]) else name for name, found in named))


def _expression(module: str) -> str:
    """Of a dense module; the experts of a layer have one."""
    experts = EXPERTS.fullmatch(module)
    return rf"{re.escape(experts[1])}(\..*)?$" if experts else f"{re.escape(module)}$"


def auto_round(section: dict[str, Any], parts: Parts) -> dict[str, Any]:
    before = section.get("extra_config")
    dense = {name: {"bits": 16, "data_type": "float"} for name in parts.dense}
    return section | {"extra_config": (before if isinstance(before, dict) else {}) | dense}


def mlx(section: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """MLX has the names that are on disk."""
    return section | dict.fromkeys(parts.on_disk, False)


def aqlm(section: dict[str, Any], parts: Parts) -> dict[str, Any]:
    before, names = section.get("linear_weights_not_to_quantize") or [], parts.names
    dense = [*names.of(names.dense_matrices()), *parts.dense]
    modules = catching_nothing_else(dense, parts.quantized)
    entries = [*before, *modules, *(f"{name}.weight" for name in dense)]
    return section | {"linear_weights_not_to_quantize": list(dict.fromkeys(entries))}


def modelopt(section: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """Without the formats of modules that are dense."""
    dense = {*parts.dense, *(found[1] for name in parts.dense if (found := EXPERTS.fullmatch(name)))}
    layers, groups = section.get("quantized_layers"), section.get("config_groups")
    changed: dict[str, object] = {}
    if isinstance(layers, dict):
        changed["quantized_layers"] = {name: said for name, said in layers.items() if name not in dense}
    if isinstance(groups, dict):
        fewer = {name: _without(dense, group) for name, group in groups.items()}
        changed["config_groups"] = {name: group for name, group in fewer.items() if group}
    return section | changed


def _without(dense: set[str], group: object) -> object:
    """A group of modules without the dense ones; None where it has no others."""
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(targets, list):
        return group
    left = [name for name in targets if name not in dense]
    return group | {"targets": left} if left or not targets else None
