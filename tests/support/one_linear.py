"""An adapter of each PEFT type on one linear layer, in a checkpoint of nothing else."""

from pathlib import Path
from typing import Any

from layers import OneLinear, save_module, seeded
from trained import in_peft

# PEFT type, perhaps with a variant → settings.
ON_ONE_LINEAR: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 3, "total_step": 10},
    "BEFT": {},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 64},
    "DEFT": {"r": 8},
    "DEFT qr": {"r": 8, "decomposition_method": "qr"},
    "DELORA": {"r": 8},
    "FOURIERFT": {"n_frequency": 300},
    "FOURIERFT many": {"n_frequency": 4000},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 8, "gralora_k": 2, "hybrid_r": 4},
    "HIRA": {"r": 8},
    "HRA": {"r": 8},
    "HRA orthonormal": {"r": 8, "apply_GS": True},
    "IA3": {"feedforward_modules": []},
    "IA3 inputs": {"feedforward_modules": ["one"]},
    "LN_TUNING": {},
    "LOHA": {"r": 8, "alpha": 8},
    "LOKR": {"r": 8, "alpha": 8},
    "LOKR both": {"r": 2, "alpha": 8, "decompose_both": True},
    "LORA": {"r": 8, "lora_bias": True},
    "LORA dora": {"r": 8, "use_dora": True},
    "LORA olora": {"r": 8, "init_lora_weights": "olora"},
    "LORA pissa": {"r": 8, "init_lora_weights": "pissa"},
    "MISS": {"r": 64},
    "MISS bat": {"r": 64, "init_weights": "bat"},
    "MISS mini": {"r": 64, "mini_r": 8, "init_weights": "mini"},
    "OFT": {"oft_block_size": 32},
    "OSF": {},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 64},
    "SHIRA": {"r": 16},
    "SUPERTUNING": {"sparsity": 0.9, "r": 4},
    "TINYLORA": {},
    "UNILORA": {"r": 8, "save_indices": True},
    "VBLORA": {"r": 8, "num_vectors": 90, "vector_length": 64},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 300, "wavelet_family": "db4"},
    "WAVEFT many": {"n_frequency": 9000, "wavelet_family": "sym7"},
}


def save_one_linear(case: str, n_in: int, n_out: int, root: Path) -> None:
    """Writes root/ckpt and root/adapter of a case above."""
    layer = seeded(lambda: OneLinear(n_in, n_out))
    save_module(layer, root / "ckpt")
    tuned = in_peft(layer, case.partition(" ")[0], {"target_modules": ["one"]} | ON_ONE_LINEAR[case])
    tuned.save_pretrained(root / "adapter", save_embedding_layers=False)
