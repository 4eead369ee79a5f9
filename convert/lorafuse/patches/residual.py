"""Bases that training changed before its first step: PiSSA, OLoRA and KaSA take a part L of the weight out of
it.

    W := dtype(W − L), once, and then the update on top        (PEFT 0.21 lora/layer.py and variants.py)
    pissa   L = U_r S_r V_r of the largest r singular values             (pissa_init)
    olora   L = scale · Q_r R_r of a QR decomposition                    (olora_init)
    kasa    L = U_r S_r V_r of the smallest r        (KasaLinearVariant._truncate_base_weight)

L is the same for every sign and rotation that a library may choose. The decomposition is fp32 and holds the
weight whole.
"""

from collections.abc import Callable
from functools import partial

import torch

from lorafuse.files.stores import Store
from lorafuse.patches.patch import Base
from lorafuse.patches.row_function import (
    RowFunction,
    Tensors,
    product_added,
    read_whole,
    reading_nbytes,
    tile_nbytes,
)
from lorafuse.patches.target import Target

BasePart = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def largest(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(U_r S_r, V_r), [n_rows, rank] and [rank, n_cols], of the largest singular values."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def smallest(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(U_r S_r, V_r), [n_rows, rank] and [rank, n_cols], of the smallest singular values."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u[:, -rank:] * s[-rank:], v[-rank:]


def leading_qr(scale: float, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale · Q_r, R_r), [n_rows, rank] and [rank, n_cols]."""
    q, r = torch.linalg.qr(weight)
    return scale * q[:, :rank], r[:rank]


def take_out(store: Store, part: BasePart, rank: int, strength: float, target: Target) -> RowFunction:
    """The patch W := dtype(W − L), where (left, right) = part(W, rank) and L = left @ right; with a
    `strength` x other than 1, W − x · L. The update comes after it."""
    n_rows, n_cols = target.spec.shape[0], target.spec.n_cols
    least = min(n_rows, n_cols)
    return RowFunction(
        store,
        {},
        partial(_take_out, strength=strength, dtype=getattr(torch, target.spec.torch_name)),
        begin_from=partial(_begin, part=part, rank=rank),
        # The weight, LAPACK's copy, U and V, and its workspace (gesdd, 4 · least² and smaller parts).
        begin_nbytes=4 * (4 * n_rows * n_cols + 6 * least * least) + reading_nbytes(target.spec),
        scratch_nbytes=tile_nbytes(target.spec) // 2,
        holds_weight=True,
        facts={"rank": rank},
    )


def _begin(_: Tensors, base: Base, part: BasePart, rank: int) -> Tensors:
    left, right = part(read_whole(base), rank)
    return {"left": left.contiguous(), "right": right.clone()}


def _take_out(
    tile: torch.Tensor, first_row: int, tensors: Tensors, strength: float, dtype: torch.dtype
) -> None:
    product_added(tile, first_row, tensors, -strength)
    if strength == 1.0:
        tile.copy_(tile.to(dtype))


# init_lora_weights, or "kasa" → the part, given the scaling of the update.
PARTS: dict[str, Callable[[float], BasePart]] = {
    "pissa": lambda _: largest,
    "olora": lambda scale: partial(leading_qr, scale),
    "kasa": lambda _: smallest,
}
