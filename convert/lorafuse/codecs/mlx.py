"""MLX (config.json's `quantization`, repeated as a `quantization_config` without a quant_method): linear
layers, embeddings, and experts in stacks.

`M.weight` U32 [..., N, K · bits / 32]: a row is one stream of bits. `M.scales` [..., N, K / group_size]. The
config has group_size, bits and mode, and under a module's name what differs there.

    affine   `M.biases` as scales, both in S: W = S(S(code · scale) + bias)
    mxfp4    codes E2M1, scales E8M0 (as U8), groups of 32: W = T(code · scale), T the model's dtype
    mxfp8    codes E4M3, otherwise the same
    nvfp4    codes E2M1, scales E4M3 (as U8), groups of 16

As mlx 0.32 has it on the CPU (mlx/backend/cpu/quantized.cpp).
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from lorafuse.arithmetic.codes import e2m1_codes, float8_codes, packed_codes
from lorafuse.arithmetic.scaling import add_biases, scale_blocks
from lorafuse.codecs.conv1d import CHUNK_NUMEL
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.scaled import Block, Grid, Recipe, ScaledRows
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import FLOATS, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ()
AFFINE = "affine"
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
E4M3 = torch.float8_e4m3fn


class Mode(NamedTuple):
    """How codes are stored, in a mode of mlx; what a module's own section does not say is mlx's default."""

    mode: str
    bits: int
    group_size: int


DEFAULTS = {mode.mode: mode for mode in (Mode(AFFINE, 4, 64), Mode("mxfp4", 4, 32), Mode("mxfp8", 8, 32),
                                         Mode("nvfp4", 4, 16))}  # fmt: skip


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (M.weight, M.scales, and M.biases where they are stored)}."""
    weights = {}
    for scales in stored:
        module = scales.removesuffix(".scales")
        weight, biases = f"{module}.weight", f"{module}.biases"
        if module != scales and weight in stored and f"{module}.qbiases" not in stored:
            names = (weight, scales, biases) if biases in stored else (weight, scales)
            if _fit([stored[name].spec for name in names]):
                weights[weight] = names
    return Claims(weights)


def _fit(specs: list[TensorSpec]) -> bool:
    codes, scales, *biases = specs
    if codes.dtype != "U32" or len(codes.shape) < 2 or codes.shape[:-1] != scales.shape[:-1]:
        return False
    if 0 in codes.shape or 0 in scales.shape:
        return False
    return scales.dtype in FLOATS and biases == [scales] if biases else scales.dtype == "U8"


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns what the config says of a weight; nothing but the kind where it does not fit."""
    try:
        return _scheme(_mode(names, stored, config))
    except ValueError:
        return Scheme("mlx", words="MLX")


def _scheme(mode: Mode) -> Scheme:
    words = f"MLX, {mode.bits} bit" if mode.mode == AFFINE else f"MLX, {mode.mode}"
    per_byte = Fraction(8, mode.bits)
    return Scheme("mlx", blocksize=mode.group_size, words=words, bits=mode.bits, codes_per_byte=per_byte)


def _mode(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Mode:
    """How a weight is stored. Raises ValueError where the config does not say it, or not as it is."""
    module = names[0].removesuffix(".weight")
    section = config.get("quantization") or config.get("quantization_config")
    if not isinstance(section, dict):
        raise ValueError("its tensors are those of MLX, and config.json has no section `quantization`.")
    own = section.get(module)
    said = own if isinstance(own, dict) else section
    default = DEFAULTS.get(str(said.get("mode", AFFINE)))
    if default is None:
        raise ValueError(f"MLX's mode {shown(said['mode'])} is not read, only {', '.join(DEFAULTS)}.")
    mode = Mode(default.mode, said.get("bits", default.bits), said.get("group_size", default.group_size))
    known = AFFINE_BITS if mode.mode == AFFINE else (default.bits,)
    if type(mode.bits) is not int or type(mode.group_size) is not int or mode.bits not in known:
        raise ValueError(f"{shown(mode.bits)} bit in groups of {shown(mode.group_size)} are not read.")
    codes, scales, *biases = (stored[name].spec for name in names)
    fits = 32 * codes.shape[-1] == mode.bits * mode.group_size * scales.shape[-1]
    if not fits or bool(biases) != (mode.mode == AFFINE):
        raise ValueError(
            f"config.json says {mode.mode}, {mode.bits} bit in groups of {mode.group_size}; {codes} with "
            f"scales {scales} and {'its' if biases else 'no'} biases are not so."
        )
    return mode


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a weight. Raises CheckpointError where the config does not fit what is
    stored."""
    try:
        mode = _mode(names, ckpt.tensors, ckpt.config)
        further = f"{weight.removesuffix('.weight')}.global_scale"
        if further in ckpt.tensors:
            raise ValueError(f"{shown(further)} is not read. Dequantize the model with mlx-lm first.")
    except ValueError as e:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)}: {e}") from None
    stored, scales = (ckpt.tensors[name].spec for name in names[:2])
    shape = (*stored.shape[:-1], scales.shape[-1] * mode.group_size)
    block = Block(1, mode.group_size)
    if mode.mode == AFFINE:
        grids = [Grid.of(name, scales.dtype, shape, block) for name in names[1:]]
        recipe = Recipe(packed_codes(shape[-1], mode.bits, offset=0), grids[0], zeros=grids[1])
        return AffineRows(ckpt, names, TensorSpec(scales.dtype, shape), _scheme(mode), recipe)
    grid = Grid.of(names[1], "F8_E4M3" if mode.mode == "nvfp4" else "U8", shape, block)
    codes = float8_codes(shape[-1], E4M3) if mode.bits == 8 else e2m1_codes(shape[-1])
    return ScaledRows(ckpt, names, TensorSpec(out_dtype(ckpt), shape), _scheme(mode), Recipe(codes, grid))


class AffineRows(ScaledRows):
    """Rows of which each value is rounded twice: after it is scaled, and after its bias is added. Their codes
    are not written anew."""

    grid_rows = 0

    def _scale(self, matrix: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
        assert zeros is not None, "affine weights have biases"
        width, dtype = self._recipe.scales.block.width, getattr(torch, self.spec.torch_name)
        step = max(CHUNK_NUMEL // matrix.shape[1], 1)
        for first in range(0, len(matrix), step):
            part = slice(first, first + step)
            chunk = matrix[part]
            scale_blocks(chunk, scales[part], width)
            if dtype != torch.float32:
                chunk.copy_(chunk.to(dtype))
            add_biases(chunk, zeros[part], width)
