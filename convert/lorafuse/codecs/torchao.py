"""torchao's safetensors (quant_method "torchao"): a weight is several tensors, and JSON in the header.

`M.weight` is stored as `M._weight_qdata`, `M._weight_scale` and others; the header's metadata has, under the
weight's name, its class and attributes. T is the dtype among these.

    Int8Tensor, IntxUnpackedToInt8Tensor
                   qdata I8 [N, K], scale of blocks, zero_point I8 alike or none: W = T((q − zero) · scale)
    Float8Tensor   qdata F8 [N, K], scale of blocks: W = T(q · scale)
    NVFP4Tensor    qdata U8 [N, K / 2], two E2M1 codes in a byte, low half first; scale E4M3 of 16 codes,
                   perhaps swizzled; per_tensor_scale F32 [] or none: W = T(code · (per_tensor_scale · scale))

All is computed in fp32. As torchao 0.18 has it (quantization/quantize_/workflows, prototype/mx_formats).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from lorafuse.arithmetic.codes import Codes, e2m1_codes, float8_codes, int8_codes
from lorafuse.codecs.run_time import OF_ACTIVATIONS
from lorafuse.codecs.scaled import Block, Grid, Recipe, ScaledRows, block_of
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.codecs.swizzled import SwizzledScales
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import DTYPES, FLOATS, SAFETENSORS_NAMES, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("torchao",)
_PARTS = ("qdata", "scale", "zero_point", "per_tensor_scale", "act_pre_scale")
_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_CLASSES = (*_INTEGERS, "Float8Tensor", "NVFP4Tensor")
_WORDS = {"I8": "int8", "U8": "NVFP4"}
NVFP4_GROUP = 16


def _part(weight: str, part: str) -> str:
    """The name of the stored tensor that is this part of a weight."""
    module, _, leaf = weight.rpartition(".")
    return f"{module}._{leaf}_{part}" if module else f"_{leaf}_{part}"


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (its qdata, its scale, and what other parts are stored)}."""
    weights: dict[str, tuple[str, ...]] = {}
    dropped: dict[str, str] = {}
    for codes in stored:
        module, _, leaf = codes.rpartition(".")
        name = leaf.removeprefix("_").removesuffix("_qdata")
        weight = f"{module}.{name}" if module else name
        if codes != _part(weight, "qdata") or _part(weight, "scale") not in stored:
            continue
        if stored[codes].spec.dtype in ("I8", "U8") or stored[codes].spec.dtype.startswith("F8_"):
            weights[weight] = tuple(n for part in _PARTS if (n := _part(weight, part)) in stored)
            activations = _part(weight, "act_per_tensor_scale")
            dropped |= {activations: OF_ACTIVATIONS} if activations in stored else {}
    return Claims(weights, dropped)


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the kind of codes, and how many in a row share a scale."""
    codes, scales = (stored[name].spec for name in names[:2])
    words = f"torchao, {_WORDS.get(codes.dtype, 'FP8')}"
    if codes.dtype == "U8":
        return Scheme("torchao", blocksize=NVFP4_GROUP, words=words, bits=4, codes_per_byte=2)
    block = block_of(codes.shape, scales.shape)
    grouped = block is not None and block.height == 1 and block.width < codes.shape[-1]
    return Scheme("torchao", blocksize=block.width if block and grouped else 0, words=words, bits=8)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a weight. Raises CheckpointError for a class that is not read, and where the
    stored tensors do not fit together."""
    parts = {part: name for part in _PARTS if (name := _part(weight, part)) in names}
    try:
        kind, dtype = _read_class(weight, names[0], ckpt)
        if "act_pre_scale" in parts:
            raise ValueError(
                f"{shown(parts['act_pre_scale'])} scales activations; the dense model has no place for that. "
                "Merge into the full-precision checkpoint."
            )
        specs = {part: ckpt.tensors[name].spec for part, name in parts.items()}
        shape, recipe = _recipe(kind, parts, specs)
    except ValueError as e:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)}: {e}") from None
    told = scheme(names, ckpt.tensors, ckpt.config)
    return ScaledRows(ckpt, names, TensorSpec(dtype, shape), told, recipe)


def _read_class(weight: str, codes: str, ckpt: Checkpoint) -> tuple[str, str]:
    """(class, dtype) of a weight, as the header says. Raises ValueError where it says no such thing."""
    said = ckpt.shards[ckpt.tensors[codes].file].metadata.get(weight)
    if said is None:
        raise ValueError("the header's metadata has nothing about it, which torchao writes there.")
    try:
        parsed = json.loads(said)
        kind, attributes, parts = parsed["_type"], parsed["_data"], parsed["_tensor_data_names"]
        missing = [name for part in parts if (name := _part(weight, part)) not in ckpt.tensors]
        dtype = SAFETENSORS_NAMES.get((attributes.get("orig_dtype") or attributes["dtype"])["_data"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"the header's metadata about it is broken: {shown(said[:200])}.") from None
    if kind not in _CLASSES or dtype not in FLOATS:
        raise ValueError(
            f"torchao's {shown(kind)} of {shown(dtype)} is not read, only {', '.join(_CLASSES)} of floats. "
            "Dequantize it with torchao, or merge into the full-precision checkpoint."
        )
    if missing:
        raise ValueError(f"{shown(missing[0])} is missing, which the header's metadata names.")
    return kind, dtype


def _recipe(
    kind: str, parts: Mapping[str, str], specs: Mapping[str, TensorSpec]
) -> tuple[tuple[int, ...], Recipe]:
    """(shape of the weight, how it is decoded). Raises ValueError where the parts do not fit."""
    stored, scale = specs["qdata"], specs["scale"]
    if kind == "NVFP4Tensor":
        return _nvfp4(parts, specs)
    block, expected = block_of(stored.shape, scale.shape), "I8" if kind in _INTEGERS else "F8_"
    zeros = specs.get("zero_point")
    if (
        block is None
        or 0 in stored.shape
        or scale.dtype not in FLOATS
        or not stored.dtype.startswith(expected)
        or zeros not in (None, TensorSpec("I8", scale.shape))
        or (zeros and kind not in _INTEGERS)
    ):
        raise ValueError(_misfit(kind, parts, specs))
    grid = Grid.of(parts["scale"], scale.dtype, stored.shape, block)
    zero = Grid.of(parts["zero_point"], "I8", stored.shape, block) if zeros else None
    return stored.shape, Recipe(_codes(stored), grid, zeros=zero)


def _codes(stored: TensorSpec) -> Codes:
    if stored.dtype == "I8":
        return int8_codes(stored.shape[-1])
    return float8_codes(stored.shape[-1], getattr(torch, DTYPES[stored.dtype][1]))


def _nvfp4(parts: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> tuple[tuple[int, ...], Recipe]:
    stored, scale, factor = specs["qdata"], specs["scale"], specs.get("per_tensor_scale")
    n_rows, n_cols = (stored.shape[0], 2 * stored.shape[1]) if len(stored.shape) == 2 else (0, 0)
    n_groups = n_cols // NVFP4_GROUP
    plain, swizzled = (n_rows, n_groups), (-(-n_rows // 128) * 32, -(-n_groups // 4) * 16)
    if (
        stored.dtype != "U8"
        or not n_rows * n_groups
        or n_cols % NVFP4_GROUP
        or scale.dtype != "F8_E4M3"
        or scale.shape not in (plain, swizzled)
        or (factor and (factor.dtype != "F32" or factor.numel != 1))
        or "zero_point" in specs
    ):
        raise ValueError(_misfit("NVFP4Tensor", parts, specs))
    scales: Grid | SwizzledScales = SwizzledScales(parts["scale"], n_groups, NVFP4_GROUP)
    if scale.shape == plain:
        scales = Grid.of(parts["scale"], scale.dtype, (n_rows, n_cols), Block(1, NVFP4_GROUP))
    return (n_rows, n_cols), Recipe(e2m1_codes(n_cols), scales, global_scale=parts.get("per_tensor_scale"))


def _misfit(kind: str, parts: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> str:
    stored = ", ".join(f"{shown(parts[part])} {spec}" for part, spec in specs.items())
    return f"{stored} are not the parts of torchao's {kind}."
