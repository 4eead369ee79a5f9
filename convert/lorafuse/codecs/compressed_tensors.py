"""compressed-tensors (quant_method "compressed-tensors"), all its schemes of weights. Under a module M:

float-quantized, int-quantized, naive-quantized
    `weight` F8 or I8 [N, K]; `weight_scale` [1] | [N, 1] | [N, G] | blocks; `weight_zero_point` I8, of that
    shape
mxfp8-quantized
    `weight` F8_E4M3; `weight_scale` U8 [N, K/32]: E8M0
pack-quantized
    `weight_packed` I32: codes of 1 to 8 bits along a row, plus 2^(bits − 1); `weight_shape` [2]: N, K;
    `weight_scale` [N, G]; `weight_zero_point` I32, packed along the rows; `weight_g_idx` I32 [K], with
    act-order: the group of each column, −1 anywhere means that it is not used
nvfp4-pack-quantized
    `weight_packed` U8 [N, K/2], low half first; `weight_scale` F8_E4M3 [N, K/16]; `weight_global_scale` F32
    [1], which divides
mxfp4-pack-quantized, mxfp6-pack-quantized
    `weight_packed` U8 [N, K/2], or [N, 3K/4]: E2M3, four codes in three bytes; `weight_scale` U8 [N, K/32]:
    E8M0

W = T((code − zero) · scale), the product in the dtype of weight_scale, or (NVFP4, MX) in bfloat16, even where
T is float16. As compressed-tensors 0.20 (compressors/, quantization/lifecycle/forward.py: dequantize)."""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from lorafuse.arithmetic.codes import (
    Codes,
    e2m1_codes,
    e2m3_codes,
    float8_codes,
    int8_codes,
    packed_codes,
)
from lorafuse.codecs.act_order import Groups, read_groups
from lorafuse.codecs.ct_config import (
    MX_GROUP,
    all_asymmetric,
    block_structure,
    group_size_by_headers,
    group_width,
    mx_bits,
    packing,
    packing_by_headers,
)
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.packed_zeros import PackedZeros
from lorafuse.codecs.run_time import run_time_tensors
from lorafuse.codecs.scaled import E8M0, Block, Grid, Recipe, ScaledRows, fitting_block
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import DTYPES, FLOATS, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("compressed-tensors",)
_KIND = "compressed-tensors"
_SCALE, _ZERO, _GLOBAL = ".weight_scale", ".weight_zero_point", ".weight_global_scale"
_SHAPE, _G_IDX = ".weight_shape", ".weight_g_idx"
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")
_NVFP4_GROUP = 16


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (codes, scales, what else there is)} where a scheme's tensors are complete."""
    weights = {}
    for scale in stored:
        module = scale.removesuffix(_SCALE)
        if module == scale:
            continue
        for codes in (f"{module}.weight_packed", f"{module}.weight"):
            if codes in stored and _is_complete(module, codes, stored):
                further = (f"{module}{end}" for end in (_ZERO, _GLOBAL, _SHAPE, _G_IDX))
                weights[f"{module}.weight"] = (codes, scale, *(name for name in further if name in stored))
    return Claims(weights, run_time_tensors(stored, weights))


def _is_complete(module: str, codes: str, stored: Mapping[str, TensorInfo]) -> bool:
    spec, scale = stored[codes].spec, stored[module + _SCALE].spec
    if len(spec.shape) < 2:
        return False
    if not codes.endswith("_packed"):
        return spec.dtype in _CODES
    if spec.dtype == "U8":
        return scale.dtype in E8M0 or (scale.dtype == "F8_E4M3" and module + _GLOBAL in stored)
    return spec.dtype == "I32" and scale.dtype in FLOATS and module + _SHAPE in stored


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns what names, headers and config tell; of packed integers they may not tell how many bits they
    have."""
    codes, scales = stored[names[0]].spec, stored[names[1]].spec
    if codes.dtype == "I32":
        layout = packing_by_headers(codes.shape[-1], scales.shape[-1], config)
        size = group_size_by_headers(codes.shape[-1], scales.shape[-1], layout, config)
        return _packed_scheme(names, layout, size, scales.shape[-1])
    if codes.dtype == "U8":
        return _small_floats(codes, scales, config)
    words = "int8" if codes.dtype == "I8" else "MXFP8" if scales.dtype in E8M0 else "FP8"
    block = _block(codes.shape, scales.shape, config, is_mx=scales.dtype in E8M0)
    if scales.numel == 1 or block is None:
        each = ", a scale for each tensor"
    elif block.height > 1:
        each = f", a scale for each {block.height} × {block.width}"
    else:
        each = ", a scale for each row" if scales.shape[-1] == 1 and words != "MXFP8" else ""
    size = block.width if block and not each else 0
    return Scheme(_KIND, blocksize=size, words=f"{_KIND} {words}{each}{_asymmetric(names)}", bits=8)


def _small_floats(codes: TensorSpec, scales: TensorSpec, config: Mapping[str, Any]) -> Scheme:
    """Of numbers of 4 or 6 bits in bytes."""
    if scales.dtype not in E8M0:
        return Scheme(_KIND, blocksize=_NVFP4_GROUP, words=f"{_KIND} NVFP4", bits=4, codes_per_byte=2)
    bits = mx_bits(codes.shape[-1], scales.shape[-1], config)
    words, per_byte = f"{_KIND} MXFP{bits}", Fraction(8, bits)
    return Scheme(_KIND, blocksize=MX_GROUP, words=words, bits=bits, codes_per_byte=per_byte)


def _asymmetric(names: tuple[str, ...]) -> str:
    return ", asymmetric" if any(name.endswith(_ZERO) for name in names) else ""


def _packed_scheme(
    names: tuple[str, ...], layout: tuple[int, bool] | None, size: int, n_groups: int
) -> Scheme:
    bits, padded = layout or (0, False)
    words = f"{_KIND} {f'{bits}-bit integers' if bits else 'packed integers'}"
    words += (", a scale for each row" if n_groups == 1 and not size else "") + _asymmetric(names)
    per_byte = Fraction(32 // bits, 4) if padded else Fraction(8, bits) if bits else 0
    return Scheme(_KIND, blocksize=size, words=words, bits=bits, codes_per_byte=per_byte)


def _block(
    shape: tuple[int, ...], grid: tuple[int, ...], config: Mapping[str, Any], *, is_mx: bool
) -> Block | None:
    """Rows and columns that share a scale; None where that cannot be told."""
    if len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return None
    if is_mx and fitting_block(shape, grid, Block(1, MX_GROUP)):
        return Block(1, MX_GROUP)
    if grid[-2] == shape[-2]:
        width = group_width(shape[-1], grid[-1], config)
        return Block(1, width) if width else None
    if grid[-2:] == (1, 1):
        return Block(*shape[-2:])
    return block_structure(shape, grid, config)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a weight. Raises CheckpointError where its tensors do not fit together."""
    stored, told = ckpt.tensors[names[0]].spec, scheme(names, ckpt.tensors, ckpt.config)
    if stored.dtype in ("I32", "I8") and all_asymmetric(ckpt.config) and not _asymmetric(names):
        _of(names, _ZERO, ckpt, ())
    if stored.dtype == "I32":
        return _open_packed(weight, names, ckpt)
    if stored.dtype == "U8":
        shape = (*stored.shape[:-1], 8 * stored.shape[-1] // told.bits)
        codes = e2m3_codes if told.bits == 6 else e2m1_codes
        recipe = Recipe(codes(shape[-1]), _grid(names, shape, ckpt), via="BF16")
        if ckpt.tensors[names[1]].spec.dtype not in E8M0:
            recipe = replace(
                recipe, global_scale=_of(names, _GLOBAL, ckpt, ("F32",), 1), combine=torch.Tensor.div
            )
    else:
        shape, scales = stored.shape, ckpt.tensors[names[1]].spec
        grid = _grid(names, shape, ckpt)
        recipe = Recipe(_codes(stored), grid, via=scales.dtype)
        if scales.dtype in E8M0:
            recipe = replace(recipe, via="BF16")
        if any(name.endswith(_ZERO) for name in names):
            zeros = _of(names, _ZERO, ckpt, ("I8",), scales.numel)
            recipe = replace(recipe, zeros=replace(grid, name=zeros, dtype="I8"))
    return ScaledRows(ckpt, names, TensorSpec(out_dtype(ckpt), shape), told, recipe)


def _codes(stored: TensorSpec) -> Codes:
    if stored.dtype == "I8":
        return int8_codes(stored.shape[-1])
    return float8_codes(stored.shape[-1], getattr(torch, DTYPES[stored.dtype][1]))


def _of(
    names: tuple[str, ...], end: str, ckpt: Checkpoint, dtypes: tuple[str, ...], numel: int | None = None
) -> str:
    """The name with that end. Raises CheckpointError where it is missing or not as it should be."""
    name = next((name for name in names if name.endswith(end)), None)
    if name is None:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(names[0])} lacks its {end[1:]}.")
    spec = ckpt.tensors[name].spec
    if spec.dtype not in dtypes or numel not in (None, spec.numel):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(name)} is {spec}; expected {' or '.join(dtypes)}"
            + (f" with {numel} elements." if numel is not None else ".")
        )
    return name


def _grid(names: tuple[str, ...], shape: tuple[int, ...], ckpt: Checkpoint) -> Grid:
    """Where the scales of a weight of that shape lie. Raises CheckpointError where they do not fit it."""
    scales = ckpt.tensors[names[1]].spec
    is_mx = scales.dtype in E8M0
    block = _block(shape, scales.shape, ckpt.config, is_mx=is_mx)
    if ckpt.tensors[names[0]].spec.dtype == "U8":
        block = Block(1, MX_GROUP if is_mx else _NVFP4_GROUP)
        block = block if fitting_block(shape, scales.shape, block) else None
    elif scales.dtype not in (*FLOATS, *E8M0):
        block = None
    elif scales.numel == 1 and len(scales.shape) < 3:
        return Grid.of_all(names[1], scales.dtype, shape)
    if block is None:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(names[0])} makes a weight of {list(shape)}, its scales "
            f"{shown(names[1])} are {scales}, which fit no scheme of compressed-tensors in config.json."
        )
    return Grid.of(names[1], scales.dtype, shape, block)


def _open_packed(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """The sources of packed integers."""
    stored, shape = ckpt.tensors[names[0]].spec, _read_shape(names, ckpt)
    layout = packing(stored.shape[-1], shape[1], ckpt.config)
    if len(stored.shape) != 2 or stored.shape[0] != shape[0] or layout is None:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(names[0])} is {stored}, which is not what num_bits in config.json "
            f"makes of a weight of {list(shape)}."
        )
    bits, padded = layout
    grid = _grid(names, shape, ckpt)
    recipe = Recipe(packed_codes(shape[1], bits, padded=padded), grid, via=grid.dtype)
    if any(name.endswith(_ZERO) for name in names):
        recipe = replace(recipe, zeros=_packed_zeros(names, grid, layout, ckpt))
    size = grid.block.width
    if grid.n_cols == 1:
        size = group_size_by_headers(stored.shape[-1], 1, layout, ckpt.config)
    told = _packed_scheme(names, layout, size, grid.n_cols)
    spec = TensorSpec(out_dtype(ckpt), shape)
    if any(name.endswith(_G_IDX) for name in names):
        g_idx = _of(names, _G_IDX, ckpt, ("I32", "I64"), shape[1])
        if read_groups(ckpt, g_idx, grid.n_cols) is not None:
            recipe = replace(recipe, groups=Groups(ckpt, g_idx, grid.n_cols))
    return ScaledRows(ckpt, names, spec, told, recipe)


def _read_shape(names: tuple[str, ...], ckpt: Checkpoint) -> tuple[int, int]:
    name = _of(names, _SHAPE, ckpt, ("I64", "I32"), 2)
    dtype = getattr(torch, DTYPES[ckpt.tensors[name].spec.dtype][1])
    n_rows, n_cols = torch.frombuffer(read_all(ckpt, name), dtype=dtype).tolist()
    if min(n_rows, n_cols) < 1:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(name)} is {[n_rows, n_cols]}.")
    return n_rows, n_cols


def _packed_zeros(
    names: tuple[str, ...], grid: Grid, layout: tuple[int, bool], ckpt: Checkpoint
) -> PackedZeros:
    bits, padded = layout
    n_words = -(-grid.height // (32 // bits)) if padded else -(-grid.height * bits // 32)
    if grid.block.height > 1:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(names[0])} has one zero point for several rows.")
    name = _of(names, _ZERO, ckpt, ("I32",), n_words * grid.n_cols)
    return PackedZeros(name, bits, padded, n_words, grid.n_cols)
