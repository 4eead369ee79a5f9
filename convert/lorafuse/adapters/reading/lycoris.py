"""What LoHa and LoKr share: alpha and rank, and the factors of one low-rank matrix, with or without a core
for convolutions."""

import math

import torch

from lorafuse.adapters.reading.check_config import checked, pattern_value
from lorafuse.adapters.reading.check_tensors import not_one_update, shape_of
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.adapters.reading.modules import Warn
from lorafuse.errors import shown
from lorafuse.patches.row_function import Tensors


def scaling_of(adapter: AdapterDir, module: str, rank: int | None, warn: Warn) -> float:
    """alpha / r, each by its pattern (PEFT 0.21 lycoris_utils.py). The tensors' rank is believed where they
    have one."""
    alpha = pattern_value(adapter, "alpha_pattern", module, adapter.config.get("alpha", 8))
    expected = pattern_value(adapter, "rank_pattern", module, adapter.config.get("r", 8))
    alpha = checked(adapter, f"the alpha of {shown(module)}", alpha)
    if rank is None:
        return alpha / checked(adapter, f"the rank of {shown(module)}", expected, least=1, kinds=(int,))
    if expected != rank:
        warn(
            f"{adapter.folder / CONFIG}: says rank {shown(expected)} where the tensors have rank {rank}; the "
            "tensors are believed."
        )
    return alpha / rank


class Factors:
    """left [n_rows, rank] @ right [rank, n_cols], from `a` and `b`; with a core `t` (r, r, *kernel), a is (r,
    n_rows) and b (r, d): M[p, (q, kl)] = Σ_ij a[i, p] · t[i, j, kl] · b[j, q], the CP form of FedPara's
    Proposition 3 (PEFT 0.21 loha/layer.py and lokr/layer.py, make_weight_cp)."""

    def __init__(self, adapter: AdapterDir, key_a: str, key_b: str, key_t: str | None) -> None:
        self.keys = (key_a, key_b, *([key_t] if key_t else []))
        for key in self.keys:
            check_float(adapter, key)
        a, b, *core = (shape_of(adapter, key) for key in self.keys)
        t = core[0] if core else None
        fits = len(a) == len(b) == 2 and (
            a[1] == b[0] if t is None else len(t) == 4 and (a[0], b[0]) == t[:2]
        )
        if not fits or 0 in (*a, *b, *(t or ())):
            raise not_one_update(adapter, *self.keys)
        self.kernel = t[2:] if t else None
        self.n_rows, self.rank = (a[1], t[0]) if t else a
        self.n_cols = b[1] * math.prod(self.kernel or ())
        # What `multiply_out` makes, and its float64 temporaries.
        self.begin_nbytes = (
            0 if t is None else self.rank * self.n_cols * 12 + 8 * (math.prod(t) + math.prod(b))
        )

    def is_kernel(self, shape: tuple[int, ...]) -> bool:
        """Whether the core's kernel is that of a weight of this shape; Conv1d's has a 1 more."""
        return self.kernel is None or self.kernel == (*shape[2:], 1)[:2]


def multiply_out(tensors: Tensors, a: str, b: str, t: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, right) in fp32 from the loaded tensors of these names."""
    if t not in tensors:
        return tensors[a], tensors[b]
    right = torch.einsum("ijkl,jq->iqkl", tensors[t].double(), tensors[b].double())
    return tensors[a].T, right.flatten(1).float()
