"""PEFT's OFT: the inputs of a layer turned by a block-diagonal rotation, on Linear, Embedding and 1 × 1
Conv2d (arXiv 2306.07280, 2506.19847; PEFT 0.21 oft/layer.py, OFTRotationModule).

Each row of oft_R.weight is the upper triangle of a skew-symmetric Q. R is its Cayley transform (I − Q)(I +
Q)⁻¹, or by default the start of the Neumann series of (I + Q)(I − Q)⁻¹. W' = W Rᵀ, since x is turned before
the layer; an embedding's output is turned after it, W' = W R. With coft, Q is first shrunk into a ball.
Larger kernels are refused: PEFT unfolds an image into overlapping patches, turns and adds them up, and no
kernel does that.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorafuse.adapters.reading.check_config import integer, number
from lorafuse.adapters.reading.check_tensors import (
    check_shapes,
    misfit,
    n_cols_of,
    not_one_update,
    refuse_conv1d,
)
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.modules import Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.rotation import cayley_minus_identity, excess, excess_nbytes, through
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Embedding, 1 × 1 Conv2d; larger kernels have no merged form"
MEMORY = "tiles"

_LEAVES = r"oft_\w+(\.(?P<name>(?!weight$)[^.]+))?(\.weight)?"


@dataclass(frozen=True)
class _Settings:
    """The fields of the config that decide R."""

    terms: int | None  # of the Neumann series, None for the exact transform
    doubled_end: bool  # peft before 0.18 gave the last term the factor 2 too
    eps: float | None  # of coft
    shared: bool


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_rotation, adapter, scale, _settings(adapter, warn)), warn)


def _settings(adapter: AdapterDir, warn: Warn) -> _Settings:
    config = adapter.config
    terms, doubled_end = None, False
    if config.get("use_cayley_neumann", True):
        terms = integer(adapter, "num_cayley_neumann_terms", 5)
        doubled_end = _before_018(config.get("peft_version"))
    if doubled_end:
        warn(
            f"{adapter.folder / CONFIG}: was written by peft before 0.18, whose Cayley-Neumann series had "
            "another last term; it is merged as it was trained, which later releases of peft do not do."
        )
    eps = number(adapter, "eps", 6e-5, least=0) if config.get("coft") else None
    return _Settings(terms, doubled_end, eps, bool(config.get("block_share")))


def _before_018(version: Any) -> bool:
    """The config names its version since 0.18."""
    match = re.match(r"(\d+)\.(\d+)", str(version or "0.0"))
    return match is not None and (int(match[1]), int(match[2])) < (0, 18)


def _rotation(
    adapter: AdapterDir, scale: float, settings: _Settings, module: str, leaves: Leaves
) -> list[Update]:
    if "oft_r" in leaves:
        raise AdapterError(
            f"{adapter.file}: {shown(leaves['oft_r'])} is of peft before 0.16, whose OFT is not supported."
        )
    result = []
    for leaf in ("oft_R.weight", "oft_embedding_R.weight"):
        key = leaves.pop(leaf, None)
        if key is not None:
            result.append(
                _update(adapter, module, key, scale, settings, embedding=leaf.startswith("oft_embedding"))
            )
    return result


def _update(
    adapter: AdapterDir, module: str, key: str, scale: float, settings: _Settings, *, embedding: bool
) -> Update:
    n = check_shapes(adapter, (key, ("n", "b (b − 1) / 2")))
    n_blocks, triangle = n.values()
    block = (1 + math.isqrt(1 + 8 * triangle)) // 2
    if block * (block - 1) // 2 != triangle:
        raise not_one_update(adapter, key)

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, key, target)
        n_cols = n_cols_of(target)
        shared = settings.shared and n_blocks == 1 and n_cols % block == 0
        if not (shared or n_blocks * block == n_cols) or n_cols == 0:
            raise misfit(adapter, target, key)
        if math.prod(target.spec.shape[2:]) > 1:
            raise AdapterError(
                f"{adapter.file}: {shown(key)} turns patches of {shown(target.name)} "
                f"{list(target.spec.shape)}; they overlap, so no merged weight equals it."
            )
        return RowFunction(
            adapter.store,
            {"q": key},
            partial(_turn, scale=scale),
            begin=partial(_begin, block=block, settings=settings, embedding=embedding),
            begin_nbytes=excess_nbytes(n_blocks, block),
            scratch_nbytes=2 * tile_nbytes(target.spec),
            facts={"scale": scale},
        )

    return Update(f"{module}.weight", (key,), make=make)


def _begin(tensors: Tensors, block: int, settings: _Settings, embedding: bool) -> Tensors:
    upper = torch.triu_indices(block, block, 1)
    radius = None if settings.eps is None else settings.eps / math.sqrt(len(tensors["q"]))

    def minus_identity(q: torch.Tensor) -> torch.Tensor:
        if radius is not None:
            # The norm of Q, which has every element twice.
            q = q * (radius / (math.sqrt(2) * q.norm(dim=1, keepdim=True))).clamp(max=1)
        skew = q.new_zeros(len(q), block, block)
        skew[:, upper[0], upper[1]] = q
        skew -= skew.mT.clone()
        r = (
            cayley_minus_identity(skew)
            if settings.terms is None
            else _series(skew, settings.terms, settings.doubled_end)
        )
        return r if embedding else r.mT

    return {"excess": excess(tensors["q"], block, minus_identity)}


def _series(skew: torch.Tensor, terms: int, doubled_end: bool) -> torch.Tensor:
    """2 Q + 2 Q² + … + Qᵐ with m = terms − 1; but two terms are 2 Q, and three are four (PEFT 0.21
    oft/layer.py, _cayley_batch)."""
    if terms == 1:
        return torch.zeros_like(skew)
    last = terms - 1 if doubled_end else max(terms - 1, 3)
    result = 2 * skew
    if terms == 2:
        return result
    power = skew
    for k in range(2, last + 1):
        power = power @ skew
        result.add_(power, alpha=2 if k < last or doubled_end else 1)
    return result


def _turn(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    turned = through(tile, tensors["excess"])
    tile.view(turned.shape).add_(turned, alpha=scale)
