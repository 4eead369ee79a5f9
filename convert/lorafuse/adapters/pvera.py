"""PEFT's PVeRA: VeRA whose λ_d and A have a second half for a log-variance; the first half, the mean, is the weight.

(arXiv:2512.07703; PEFT 0.21 pvera/layer.py, get_delta_weight.) Linear and HF Conv1D. `vera.py` does the work.
"""

from lorafuse.adapters.fields import refuse_fields
from lorafuse.adapters.store import AdapterDir
from lorafuse.adapters.vera import vector_updates
from lorafuse.adapters.walk import Found, Warn

SUPPORTED = "as VERA, with the mean; not sample_at_inference"
REFUSED_FIELDS = {
    "sample_at_inference": "each forward pass samples anew, so no merged weight equals it. Set it to false to merge the mean",
}


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    refuse_fields(adapter, REFUSED_FIELDS)
    return vector_updates(adapter, scale, warn, "pvera", n_halves=2)
