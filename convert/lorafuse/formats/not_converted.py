"""What config.json says of a checkpoint that is quantized in part: its quantization, and which modules are
dense although others like them are not.

transformers 5 reads an entry of such a list as a regular expression from the start of a module's name in
memory, or as the end of the name; transformers 4 as the name, or a part of it that ends before a dot; vLLM as
the name, or the start of it that ends before a dot. So whole names are right for all of them; a name that is
the end of another one is written as an expression, which catches it alone in transformers 5. Where a name in
memory differs from that on disk, both are listed. compressed-tensors reads an entry as a whole name, or after
`re:` as an expression from the start of a name; vLLM reads ModelOpt's with * for any letters.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lorafuse.codecs.other_formats import quantizations
from lorafuse.codecs.sources import Sources
from lorafuse.errors import UsageError, shown
from lorafuse.formats.modules import EXPERTS, Modules, Parts, catching_nothing_else
from lorafuse.formats.own_words import aqlm, auto_round, gptq, mlx, modelopt

_ANNOUNCING = ("quantization_config", "compression_config", "_load_in_4bit", "_load_in_8bit")


class DenseList(NamedTuple):
    """Where a quantization's config lists modules that are dense, and what it means. `fields`: the first is
    the usual one. `expressions`: entries are read as described above, else as whole names. `implied`: without
    a list, a reader has one of its own. `one_by_one`: each linear layer of an expert is a module, else the
    experts of a layer are dense or quantized together. `marked`: an expression begins with re:."""

    fields: tuple[str, ...]
    expressions: bool = False
    implied: bool = False
    one_by_one: bool = False
    marked: bool = False


_AS_TRANSFORMERS = DenseList(("modules_to_not_convert",), expressions=True, implied=True)
_MODELOPT = DenseList(("ignore", "exclude_modules"))
# quant_method → its list.
LISTS = {
    "bitsandbytes": _AS_TRANSFORMERS._replace(fields=("llm_int8_skip_modules",), one_by_one=True),
    "fp8": _AS_TRANSFORMERS._replace(fields=("modules_to_not_convert", "ignored_layers")),
    "fbgemm_fp8": _AS_TRANSFORMERS,
    "awq": _AS_TRANSFORMERS._replace(implied=False),
    "mxfp4": _AS_TRANSFORMERS._replace(implied=False),
    "compressed-tensors": DenseList(("ignore",), marked=True),
    "modelopt": _MODELOPT,
    "modelopt_fp4": _MODELOPT,
    "modelopt_mixed": _MODELOPT,
}
# quant_method → what says it otherwise than by a list of what is dense.
OWN_WORDS: dict[str, Callable[[dict[str, Any], Parts], dict[str, Any]]] = {
    "gptq": gptq,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,
    "MLX": mlx,
    "aqlm": aqlm,
}
_IN_HEADERS = ("torchao",)
_SECTIONS = ("quantization_config", "compression_config", "quantization")
# A section without a quant_method is of this one.
_USUAL = {
    "quantization_config": "bitsandbytes",
    "compression_config": "compressed-tensors",
    "quantization": "MLX",
}


def experts_together(config: Mapping[str, Any]) -> bool:
    """Whether a config that describes a light result names the experts of a layer together or not at all."""
    if isinstance(config.get("quantization"), dict):  # MLX
        return False
    for name, value in config.items():
        if name in _SECTIONS and isinstance(value, dict):
            kind = LISTS.get(value.get("quant_method", _USUAL[name]))
            if kind is None or not kind.one_by_one:
                return True
        elif isinstance(value, dict) and experts_together(value):
            return True
    return False


def has_words_for_dense(config: Mapping[str, Any]) -> bool:
    """Whether a config can say that a part of what its quantizations quantize is dense."""
    methods = (section.get("quant_method") for section in quantizations(config))
    return all(method is None or method in LISTS or method in OWN_WORDS for method in methods)


def announces(name: str, value: object) -> bool:
    """Whether a field of a config says how weights are quantized; `quantization` is MLX's."""
    return name in _ANNOUNCING or (name == "quantization" and isinstance(value, dict))


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that say how weights are quantized, also those in its sections."""
    found = {name: value for name, value in config.items() if value and announces(name, value)}
    sections = {
        name: inner
        for name, value in config.items()
        if isinstance(value, dict) and name not in found and (inner := quantization_of(value))
    }
    return found | sections


def with_dense_modules(
    config: Mapping[str, Any],
    dense: Iterable[str],
    quantized: Iterable[str],
    weights: Mapping[str, Sources],
) -> dict[str, Any]:
    """The same of an output whose weights `dense` are quantized no longer, and whose weights `quantized` are;
    `weights`: all that the base has. Raises UsageError for a quantization whose configs have no such list, or
    whose list has no words for it, and where the config says nothing of a quantization."""
    fields, no_longer = quantization_of(config), list(dense)
    if not fields:
        raise UsageError(
            "config.json does not say how the checkpoint is quantized, so that no reader would know it of "
            "the result: leave --format out."
        )
    if any(section.get("quant_method") in _IN_HEADERS for section in quantizations(config)):
        raise UsageError(
            "torchao's checkpoints say in their files' headers how each weight is stored; these are not "
            "copied: leave --format out."
        )
    if no_longer:
        names = Modules(config, weights)
        on_disk = [name.removesuffix(".weight") for name in no_longer]
        _extend(fields, Parts(names, names.of(no_longer), names.of(quantized), on_disk))
    return fields


def dense_modules(
    config: Mapping[str, Any],
    dense: Iterable[str],
    quantized: Iterable[str],
    weights: Mapping[str, Sources],
) -> list[str]:
    """The list of an output whose weights are all quantized here or dense: the modules of the weights
    `dense`, and the output embedding, which readers leave dense only where there is no list."""
    names = Modules(config, weights)
    modules = names.of([*dense, names.head])
    return catching_nothing_else(names.fused(modules), names.of(quantized))


def _entries(parts: Parts, kind: DenseList) -> list[str]:
    """What the list of a quantization has to have for the modules that are quantized no longer."""
    dense = parts.dense
    if not kind.one_by_one:
        dense = list(dict.fromkeys(_with_experts(name, kind) for name in dense))
    if not kind.expressions:
        return dense
    return catching_nothing_else(parts.names.fused(dense), parts.quantized)


def _with_experts(module: str, kind: DenseList) -> str:
    """The entry for a module: experts are listed together."""
    experts = EXPERTS.fullmatch(module)
    if not experts:
        return module
    return f"re:{re.escape(experts[1])}(\\..*)?$" if kind.marked else experts[1]


def _extend(fields: dict[str, Any], parts: Parts) -> None:
    """Replaces each part of a config that lists modules, wherever it stands, by a copy with more of them."""
    for name, value in fields.items():
        if name in _SECTIONS and isinstance(value, dict):
            usual = "MLX" if isinstance(fields.get("quantization"), dict) else _USUAL[name]
            fields[name] = _of_section(value, value.get("quant_method", usual), parts)
        elif not announces(name, value):
            _extend(value, parts)


def _of_section(section: dict[str, Any], method: str, parts: Parts) -> dict[str, Any]:
    if method in OWN_WORDS:
        return OWN_WORDS[method](section, parts)
    if method not in LISTS:
        raise UsageError(
            f"A checkpoint in {shown(method)} that is dense in part cannot be described in config.json by "
            "this version: leave --format out."
        )
    kind, inner = LISTS[method], section.get("quantization")
    if kind is not _MODELOPT:
        return _with_entries(section, kind, parts)
    if isinstance(inner, dict):  # as hf_quant_config.json has it
        as_there = kind._replace(fields=kind.fields[::-1])
        return section | {"quantization": modelopt(_with_entries(inner, as_there, parts), parts)}
    return modelopt(_with_entries(section, kind, parts), parts)


def _with_entries(section: dict[str, Any], kind: DenseList, parts: Parts) -> dict[str, Any]:
    names, entries = parts.names, _entries(parts, kind)
    listing = [field for field in kind.fields if section.get(field) is not None]
    before = [] if listing or not kind.implied else names.of(names.dense_matrices())
    return section | {
        field: list(dict.fromkeys([*(section.get(field) or before), *entries]))
        for field in listing or kind.fields[:1]
    }
