"""FP8 of FBGEMM (quant_method "fbgemm_fp8": Llama-3.1-405B-FP8, Llama 4).

`M.weight` F8_E4M3 [N, K] with `M.weight_scale` F32 [N, 1]. Experts of Llama 4 in stacks are as in the dense
model, (experts, in, out): `gate_up_proj` F8_E4M3 [E, in, out] with `gate_up_proj_scale` F32 [E, 1, out], and
`down_proj` with `down_proj_scale` F32 [E, out, 1]: a scale for each output of an expert.

W = T(fp32(code) · scale). As transformers 5.23, integrations/fbgemm_fp8.py.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lorafuse.arithmetic.codes import float8_codes
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.other_formats import quantizations
from lorafuse.codecs.run_time import run_time_tensors
from lorafuse.codecs.scaled import Block, Grid, Recipe, ScaledRows
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("fbgemm_fp8",)
_SCALE = "_scale"


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {X: (X, X_scale)}: stacks, and matrices where the config names FBGEMM."""
    named = any(section.get("quant_method") in QUANT_METHODS for section in quantizations(config))
    weights = {}
    for scale in stored:
        weight = scale.removesuffix(_SCALE)
        if weight == scale or weight not in stored or stored[weight].spec.dtype != "F8_E4M3":
            continue
        n_dims = len(stored[weight].spec.shape)
        if (n_dims == 2 and named) or (n_dims == 3 and not weight.endswith(".weight")):
            weights[weight] = (weight, scale)
    return Claims(weights, run_time_tensors(stored, weights))


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the scheme of every weight."""
    return Scheme("fbgemm_fp8", words="FBGEMM FP8, a scale for each output", bits=8)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a weight. Raises CheckpointError where its scales do not fit."""
    stored, scales = (ckpt.tensors[name].spec for name in names)
    shape = stored.shape
    if len(shape) == 2:
        block, expected = Block(1, shape[1]), [TensorSpec("F32", (shape[0], 1))]
    else:
        block, n_outputs = Block(shape[1], 1), shape[2]
        grids = ((shape[0], 1, n_outputs), (shape[0], n_outputs, 1))
        expected = [TensorSpec("F32", grid) for grid in grids]
    if scales not in expected or not stored.numel:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} is {stored}, its scales {shown(names[1])} are {scales}; "
            f"expected {expected[0]}."
        )
    recipe = Recipe(
        float8_codes(shape[-1], torch.float8_e4m3fn), Grid.of(names[1], scales.dtype, shape, block)
    )
    told = scheme(names, ckpt.tensors, ckpt.config)
    return ScaledRows(ckpt, names, TensorSpec(out_dtype(ckpt), shape), told, recipe)
