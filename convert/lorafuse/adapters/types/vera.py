"""PEFT's VeRA: Δ = diag(λ_b) · B[:out] · diag(λ_d) · A[:, :in], A and B random and shared by all modules.
Linear and HF Conv1D.

(arXiv:2310.11454; PEFT 0.21 vera/layer.py, get_delta_weight.)
"""

from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import Updates, Warn
from lorafuse.adapters.reading.vera_vectors import vector_updates

SUPPORTED = "Linear, HF Conv1D; projections saved or redrawn"
MEMORY = "tiles"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return vector_updates(adapter, scale, warn, "vera")
