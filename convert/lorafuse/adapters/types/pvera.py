"""PEFT's PVeRA: VeRA whose λ_d and A have a second half for a log-variance; the first half, the mean, is the
weight.

(arXiv:2512.07703; PEFT 0.21 pvera/layer.py, get_delta_weight.) Linear and HF Conv1D.
"""

from lorafuse.adapters.reading.check_config import refuse_fields
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import Updates, Warn
from lorafuse.adapters.reading.vera_vectors import vector_updates

SUPPORTED = "as VERA, with the mean; not sample_at_inference"
MEMORY = "tiles"
REFUSED_FIELDS = {
    "sample_at_inference": "each forward pass samples anew, so no merged weight equals it. Set it to false "
    "to merge the mean",
}


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    refuse_fields(adapter, REFUSED_FIELDS)
    return vector_updates(adapter, scale, warn, "pvera", n_halves=2)
