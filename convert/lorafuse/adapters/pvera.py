"""PEFT's PVeRA: VeRA whose λ_d and A have a second half for a log-variance; the first half, the mean, is the weight.

(arXiv:2512.07703; PEFT 0.21 pvera/layer.py, get_delta_weight.) Linear and HF Conv1D. `vera.py` does the work.
"""

from lorafuse.adapters.shared import Found, Warn
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.adapters.vera import vector_updates
from lorafuse.errors import AdapterError


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    if adapter.config.get("sample_at_inference"):
        raise AdapterError(
            f"{adapter.path / CONFIG}: sample_at_inference is set, which is not supported: each forward pass samples anew, so no "
            "merged weight equals it. Set it to false to merge the mean."
        )
    return vector_updates(adapter, scale, warn, "pvera", n_halves=2)
