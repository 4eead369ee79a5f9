"""FP8 with a scale for each block or tensor (quant_method "fp8": DeepSeek-V3, Kimi-K2, Qwen3-FP8, MiniMax),
for a matrix or for experts in stacks.

`X` F8 [..., N, K]; `X_scale_inv` [..., ⌈N/bm⌉, ⌈K/bk⌉], or one number, F32, F16, BF16 or E8M0 (F8_E8M0, or
its bytes as U8): what codes are multiplied with, in spite of its name. Other names of it, beside `M.weight`:
`M.scale` (DeepSeek-V4), `M.qscale_weight` (Mistral). W = T(fp32(code) · fp32(scale)), T the model's dtype.

With `expert_dtype: fp4`, experts are I8 [N, K/2]: two E2M1 codes in a byte, low half first, a scale for each
32.

As transformers 5.23 (integrations/finegrained_fp8.py) and compressed-tensors' FP8BlockDequantizer have it;
the former's own dequantizer is wrong where blocks do not divide a matrix evenly."""

from collections.abc import Mapping
from typing import Any

import torch

from lorafuse.arithmetic.codes import Codes, e2m1_codes, float8_codes
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.other_formats import quantizations
from lorafuse.codecs.run_time import run_time_tensors
from lorafuse.codecs.scaled import E8M0, Block, Grid, Recipe, ScaledRows, block_of, fitting_block
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import DTYPES, FLOATS, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("fp8",)
_BESIDE = (".scale", ".qscale_weight")  # names of scales beside M.weight
_INV = "_scale_inv"
FP4_GROUP = 32
_DEFAULT = [128, 128]  # transformers' FineGrainedFP8Config


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {X: (X, its scales)} for all codes beside which scales of these names are stored."""
    weights = {}
    for name in stored:
        weight = name.removesuffix(_INV)
        if weight == name:
            end = next((end for end in _BESIDE if name.endswith(end)), None)
            if end is None:
                continue
            weight = f"{name.removesuffix(end)}.weight"
        if _is_coded(stored.get(weight), config):
            weights[weight] = (weight, name)
    return Claims(weights, run_time_tensors(stored, weights))


def _is_coded(info: TensorInfo | None, config: Mapping[str, Any]) -> bool:
    if info is None or len(info.spec.shape) < 2:
        return False
    return _is_float8(info.spec) or (info.spec.dtype == "I8" and _setting(config, "expert_dtype") == "fp4")


def _is_float8(spec: TensorSpec) -> bool:
    return spec.dtype.startswith("F8_") and spec.dtype != "F8_E8M0"


def _setting(config: Mapping[str, Any], name: str) -> object:
    """Of the first section of a config that has it."""
    return next((section[name] for section in quantizations(config) if name in section), None)


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns FP8 or FP4, and its blocks."""
    codes, scales = (stored[name].spec for name in names)
    if codes.dtype == "I8":
        return Scheme("fp8", blocksize=FP4_GROUP, words="FP4 of FP8", bits=4, codes_per_byte=2)
    block = _block(codes.shape, scales.shape, config)
    each = "tensor" if block is None else f"{block.height} × {block.width}"
    return Scheme("fp8", words=f"FP8, a scale for each {each}", bits=8)


def _block(shape: tuple[int, ...], grid: tuple[int, ...], config: Mapping[str, Any]) -> Block | None:
    """The config's, or else what divides a weight of that shape evenly; None for one scale, or none that
    fits."""
    if TensorSpec("U8", grid).numel == 1 and len(grid) < 3:
        return None
    sizes = _setting(config, "weight_block_size") or _DEFAULT
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int for size in sizes):
        block = Block(*sizes)
        if fitting_block(shape, grid, block):
            return block
    return block_of(shape, grid)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of an FP8 or FP4 weight. Raises CheckpointError where its scales do not fit."""
    stored, scales = (ckpt.tensors[name].spec for name in names)
    packed = stored.dtype == "I8"
    shape = (*stored.shape[:-1], stored.shape[-1] * 2) if packed else stored.shape
    block = Block(1, FP4_GROUP) if packed else _block(shape, scales.shape, ckpt.config)
    fits = fitting_block(shape, scales.shape, block) if block else scales.numel == 1
    told_by_shapes = packed or block in (None, Block(*_DEFAULT), Block(1, shape[-1]))
    if not told_by_shapes and not any(quantizations(ckpt.config)):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} has a scale for each block, and no config says of which "
            "size: add quantization_config to config.json, with weight_block_size."
        )
    if not fits or scales.dtype not in (*FLOATS, *E8M0):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} is {stored}, its scales {shown(names[1])} are {scales}; "
            "expected a scale, or E8M0, for each block of weight_block_size in config.json, or for all."
        )
    if block:
        grid = Grid.of(names[1], scales.dtype, shape, block)
    else:
        grid = Grid.of_all(names[1], scales.dtype, shape)
    spec = TensorSpec(out_dtype(ckpt), shape)
    told = scheme(names, ckpt.tensors, ckpt.config)
    return ScaledRows(ckpt, names, spec, told, Recipe(_codes(stored, packed), grid))


def _codes(stored: TensorSpec, packed: bool) -> Codes:
    if packed:
        return e2m1_codes(stored.shape[-1] * 2)
    dtype: torch.dtype = getattr(torch, DTYPES[stored.dtype][1])
    return float8_codes(stored.shape[-1], dtype)
