"""NVIDIA ModelOpt (quant_method "modelopt"; until 2025 only hf_quant_config.json says so): `M.weight`, in
place of the dense one, and `M.weight_scale`.

FP8     `weight` F8_E4M3 [N, K]; `weight_scale` F32 [] | [N] | [N, 1] | blocks, also as [N/b, 1, K/b, 1]
INT8    `weight` I8 [N, K]; `weight_scale` F32, as FP8
NVFP4   `weight` U8 [N, K/2], low half first; `weight_scale` F8_E4M3 [N, K/16]; `weight_scale_2` F32 [], a
        factor
MXFP4   `weight` U8 [N, K/2]; `weight_scale` U8 [N, K/32]: E8M0
MXFP8   `weight` F8_E4M3 [N, K]; `weight_scale` U8 [N, K/32]: E8M0

W = T(fp32(code) · scale), one fp32 product; with NVFP4, scale = fp32(weight_scale) · weight_scale_2. As
modelopt 0.47, torch/quantization/qtensor/.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lorafuse.arithmetic.codes import Codes, e2m1_codes, float8_codes, int8_codes
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.other_formats import quantizations
from lorafuse.codecs.run_time import run_time_tensors
from lorafuse.codecs.scaled import E8M0, Block, Grid, Recipe, ScaledRows, block_of, fitting_block
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import DTYPES, FLOATS, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("modelopt", "modelopt_mixed", "modelopt_fp4")
_SCALE, _GLOBAL = ".weight_scale", ".weight_scale_2"
_USUAL = Block(128, 128)
NVFP4_GROUP, MX_GROUP = 16, 32


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (M.weight, its scales)}: of a config that names ModelOpt, or where the scales are as
    no other format has them."""
    named = any(section.get("quant_method") in QUANT_METHODS for section in quantizations(config))
    weights = {}
    for scale in stored:
        module = scale.removesuffix(_SCALE)
        weight, second = f"{module}.weight", module + _GLOBAL
        if module == scale or weight not in stored or len(stored[weight].spec.shape) < 2:
            continue
        if _is_known(stored[weight].spec, stored[scale].spec, has_second=second in stored, named=named):
            weights[weight] = (weight, scale, second) if second in stored else (weight, scale)
    return Claims(weights, run_time_tensors(stored, weights))


def _is_known(codes: TensorSpec, scales: TensorSpec, *, has_second: bool, named: bool) -> bool:
    if codes.dtype == "U8":
        return has_second if scales.dtype == "F8_E4M3" else _fits(codes, scales, MX_GROUP)
    if codes.dtype not in ("F8_E4M3", "I8") or has_second:
        return False
    return named or len(scales.shape) == 4 or (len(scales.shape) == 1 and scales.numel == codes.shape[0] > 1)


def _fits(codes: TensorSpec, scales: TensorSpec, group: int) -> bool:
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    return scales.dtype in E8M0 and fitting_block(shape, scales.shape, Block(1, group))


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the format, and how many elements share a scale."""
    codes, scales = stored[names[0]].spec, stored[names[1]].spec
    is_mx = scales.dtype in E8M0
    if codes.dtype == "U8":
        size, words = (MX_GROUP, "MXFP4") if is_mx else (NVFP4_GROUP, "NVFP4")
        return Scheme("modelopt", blocksize=size, words=f"ModelOpt {words}", bits=4, codes_per_byte=2)
    words = "INT8" if codes.dtype == "I8" else "MXFP8" if is_mx else "FP8"
    if is_mx:
        return Scheme("modelopt", blocksize=MX_GROUP, words=f"ModelOpt {words}", bits=8)
    block = _block(codes.shape, scales)
    each = "tensor" if scales.numel == 1 or block is None else f"{block.height} × {block.width}"
    if block and block == Block(1, codes.shape[-1]):
        each = "row"
    return Scheme("modelopt", words=f"ModelOpt {words}, a scale for each {each}", bits=8)


def _block(shape: tuple[int, ...], scales: TensorSpec) -> Block | None:
    """Rows and columns that share a scale; None where that cannot be told."""
    grid = scales.shape
    if scales.dtype in E8M0:
        return Block(1, MX_GROUP) if fitting_block(shape, grid, Block(1, MX_GROUP)) else None
    if scales.dtype not in FLOATS:
        return None
    if len(shape) == 2 and grid in ((shape[0],), (shape[0], 1)):
        return Block(1, shape[1])
    if len(grid) == 4 and len(shape) == 2 and grid[1] == grid[3] == 1:
        return block_of(shape, (grid[0], grid[2]))
    return _USUAL if fitting_block(shape, grid, _USUAL) else block_of(shape, grid)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a weight. Raises CheckpointError where its scales do not fit."""
    stored, scales = (ckpt.tensors[name].spec for name in names[:2])
    shape = (*stored.shape[:-1], 2 * stored.shape[-1]) if stored.dtype == "U8" else stored.shape
    second = names[2] if len(names) > 2 else None
    if second:
        fits = fitting_block(shape, scales.shape, Block(1, NVFP4_GROUP))
        fits = fits and ckpt.tensors[second].spec in (TensorSpec("F32", ()), TensorSpec("F32", (1,)))
        block = Block(1, NVFP4_GROUP) if fits else None
    else:
        block = _block(shape, scales)
    if block:
        grid = Grid.of(names[1], scales.dtype, shape, block)
    elif not second and scales.numel == 1 and scales.dtype in FLOATS:
        grid = Grid.of_all(names[1], scales.dtype, shape)
    else:
        told = " and ".join(f"{shown(name)}, which is {ckpt.tensors[name].spec}" for name in names[1:])
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} is {stored}; its scales {told}, are not as ModelOpt has "
            "them."
        )
    recipe = Recipe(_codes(stored, shape[-1]), grid, global_scale=second)
    told_scheme = scheme(names, ckpt.tensors, ckpt.config)
    return ScaledRows(ckpt, names, TensorSpec(out_dtype(ckpt), shape), told_scheme, recipe)


def _codes(stored: TensorSpec, n_cols: int) -> Codes:
    if stored.dtype == "U8":
        return e2m1_codes(n_cols)
    if stored.dtype == "I8":
        return int8_codes(n_cols)
    return float8_codes(n_cols, getattr(torch, DTYPES[stored.dtype][1]))
