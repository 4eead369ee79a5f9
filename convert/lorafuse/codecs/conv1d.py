"""Weights of HF Conv1D, which are (in, out) where every other linear layer's are (out, in)."""

from typing import Any

# Modules of class transformers.pytorch_utils.Conv1D, whose weight is (in, out). bitsandbytes stores these as
# (out, in). From `grep 'Conv1D(' models/*/modeling_*.py` of transformers 5.23.0.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def is_conv1d(config: dict[str, Any], weight: str) -> bool:
    """Whether a weight belongs to an HF Conv1D module, by the model type and the module's name."""
    parts = weight.split(".")
    return config.get("model_type") in CONV1D_MODEL_TYPES and len(parts) > 1 and parts[-2] in CONV1D_MODULES
