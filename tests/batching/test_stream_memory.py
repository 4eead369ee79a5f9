"""Peak memory while a base is fetched from a hub on this machine: what it is without."""

import json
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from processes import beyond_torch
from safetensors.numpy import save_file

N_SHARDS, ROWS, COLS = 4, 2048, 2048


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A base of 4 files of 25 MB on the hub, and an adapter for all of its matrices."""
    ckpt, lora = tmp_path / "ckpt", tmp_path / "lora"
    ckpt.mkdir()
    lora.mkdir()
    weight_map, factors = {}, {}
    rng = np.random.default_rng(0)
    for shard in range(N_SHARDS):
        file = f"model-{shard + 1:05d}-of-{N_SHARDS:05d}.safetensors"
        tensors = {}
        for part in ("q", "k", "v"):
            name = f"model.layers.{shard}.self_attn.{part}_proj"
            tensors[f"{name}.weight"] = rng.integers(0, 1000, (ROWS, COLS), np.int16).view(np.float16)
            factors[f"base_model.model.{name}.lora_A.weight"] = np.full((4, COLS), 0.01, np.float32)
            factors[f"base_model.model.{name}.lora_B.weight"] = np.full((ROWS, 4), 0.01, np.float32)
            weight_map[f"{name}.weight"] = file
        save_file(tensors, ckpt / file)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (ckpt / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (ckpt / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(factors, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "org/base"}'
    )
    hub.add("org/base", ckpt)
    hub.add("me/tuned", lora)
    for name, value in hub.environ(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    return ["convert", "-q", "org/base", "me/tuned", tmp_path / "out"]


@pytest.mark.parametrize("options", [["--stream", "--push-to-hub", "me/merged"], []])
def test_peak_memory(pair: list[object], options: list[str]) -> None:
    """The limit holds while files come and go, as it does for files that are here."""
    beyond = beyond_torch(*pair, *options)
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"


def test_peak_memory_of_a_batch(pair: list[object], tmp_path: Path) -> None:
    """Of three jobs in a few passes, streamed, whose results go to the hub."""
    lines = [json.dumps({"adapter": "me/tuned", "name": name, "scale": n}) for n, name in enumerate("abc", 1)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    words = ["batch", "-q", "auto", tmp_path / "jobs.jsonl", tmp_path / "out", "--stream"]
    beyond = beyond_torch(*words, "--push-to-hub", "me/{name}", "--memory-limit", "150MB")
    assert beyond < 150e6, f"{beyond / 1e6:.0f} MB beyond import torch"
