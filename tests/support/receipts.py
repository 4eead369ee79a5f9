"""Receipts of models that nobody has to merge: as many layers and experts as a test wants."""

import json
import math
import random
from pathlib import Path

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")


def merged_entry(rng: random.Random, shape=(16, 16)) -> dict:
    """A merged weight with figures of any size."""
    delta_rel = 0.01 * math.exp(rng.gauss(0, 1))
    return {
        "action": "merged", "dtype": "bfloat16", "shape": [*shape], "rank": 4, "scale": 2.0,
        "delta_norm": delta_rel * rng.uniform(1, 9), "delta_rel": delta_rel, "kept": rng.uniform(0.9, 1.01),
        "noise": rng.uniform(0, 0.5), "changed": 0.5,
    }  # fmt: skip


def receipt_of(tensors: dict, **fields: object) -> dict:
    """A receipt of schema 1 with these weights."""
    sha256 = "a" * 64
    inputs = [("checkpoint", "ckpt/config.json"), ("checkpoint", "ckpt/model.safetensors"),
              ("adapter", "adapter/adapter_config.json")]  # fmt: skip
    return {
        "schema": 1,
        "tool": {"name": "lorafuse", "version": "0.1.0", "torch": "2", "python": "3"},
        "settings": {"dtype": "auto", "max_shard_size": 5 * 10**9, "adapter_scale": 1.0},
        "plan_id": "b" * 64,
        "inputs": [{"role": role, "path": path, "size": 9, "sha256": sha256} for role, path in inputs],
        "outputs": [{"file": "model.safetensors", "size": 9, "sha256": sha256}],
        "tensors": tensors,
        "adapter_tensors": {"used": [], "ignored": {}},
        "base_semantics": "stored in full precision",
        "timing": {"wall_s": 1.0, "compute_cpu_s": 1.0, "stats_cpu_s": 0.1, "read_s": 0.1, "write_s": 0.1},
        "peak_rss": 300_000_000,
    } | fields


def mixture(n_layers: int, n_experts: int) -> dict:
    """The weights of a mixture of experts, all of them merged."""
    rng = random.Random(1)
    experts = (f"mlp.experts.{i}.{part}_proj" for i in range(n_experts) for part in ("down", "gate", "up"))
    modules = [*(f"self_attn.{name}" for name in ATTENTION), *experts]
    return {f"model.layers.{i}.{m}.weight": merged_entry(rng) for i in range(n_layers) for m in modules}


def write_receipt(path: Path, receipt: dict) -> Path:
    """A directory with that receipt alone."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "lorafuse_receipt.json").write_text(json.dumps(receipt))
    return path
