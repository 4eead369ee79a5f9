"""The loop with its tiles on a device, which is the CPU and late (late_device.py): the bytes of the CPU, what
waits for what, memory, and errors. Tests marked `gpu` do the same where there is one."""

import errno
import json
import random
import threading

import pytest
import torch
from late_device import DEVICE, LateDevice, LateLane, TooEarlyError
from models import LINEARS
from safetensors.torch import load_file, save_file

import lorafuse
from bench.support.base_kinds import KINDS
from bench.support.synthetic import write_checkpoint
from lorafuse.arithmetic import lanes
from lorafuse.arithmetic.lanes import DEVICE_NBYTES, WORKSPACE_NBYTES, Staging, lane_nbytes, n_lanes
from lorafuse.arithmetic.measure import Measures
from lorafuse.errors import UsageError
from lorafuse.files.names import RECEIPT
from lorafuse.files.safetensors_file import Shard
from lorafuse.planning.memory import on_device
from lorafuse.planning.plan import Memory

LLAMA, GPT2 = {"target_modules": LINEARS}, {"target_modules": ["c_attn", "c_proj"]}
COUNTS = ("changed", "clipped")
MODULE, ROWS, COLS, RANK = "model.layers.0.self_attn.", 256, 512, 8


@pytest.fixture
def late(monkeypatch):
    """late(…LateDevice) → a device that runs compute on from now on."""

    def begin(**settings):
        device = LateDevice(**settings)
        device.installed(monkeypatch)
        return device

    return begin


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 1 << 11)


def stored(folder):
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    return {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def same_figures(there, here):
    """Numbers of elements are the same; norms and their ratios to a millionth of what they are made from."""
    for name, entry in here["tensors"].items():
        found = there["tensors"][name]
        assert found.keys() == entry.keys()
        for key, value in entry.items():
            if isinstance(value, float) and key not in COUNTS:
                assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, key)
            else:
                assert found[key] == value, (name, key)


@pytest.mark.parametrize("kind", ["bf16", "fp32", "nf4", "nf4_dq", "nf4_odd", "fp4_dq", "int8", "gpt2_nf4"])
def test_bytes_are_those_of_the_cpu(kind, base, adapter, tmp_path, late, small_tiles):
    """And nothing waits for a tile but the end of its copies."""
    inputs = base(kind), adapter(kind, **(GPT2 if kind.startswith("gpt2") else LLAMA))
    here = lorafuse.convert(*inputs, tmp_path / "here")
    device = late()
    there = lorafuse.convert(*inputs, tmp_path / "there")
    assert stored(tmp_path / "there") == stored(tmp_path / "here")
    same_figures(there, here)
    assert not device.waiting and device.n_copies


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_other_quantized_bases(kind, tmp_path, late, small_tiles):
    """Of every kind of base that is written by the benchmarks."""
    inputs = quantized(tmp_path, KINDS[kind])
    here = lorafuse.convert(*inputs, tmp_path / "here")
    device = late()
    there = lorafuse.convert(*inputs, tmp_path / "there")
    assert stored(tmp_path / "there") == stored(tmp_path / "here")
    same_figures(there, here)
    assert not device.waiting


def quantized(path, kind):
    """A base of two weights, of which one is updated, and the adapter."""
    entries = [entry for name in ("q_proj", "o_proj") for entry in kind.stored(MODULE + name, ROWS, COLS)]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    config |= {kind.key: kind.section}
    write_checkpoint(path / "base", entries, config, 1, kind.metadata([entry.name for entry in entries]))
    return path / "base", lora(path / "lora", q_proj=(ROWS, COLS))


def lora(path, **shapes):
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, cols) in shapes.items():
        key = f"base_model.model.{MODULE}{name}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(RANK, cols, generator=generator) * 0.01
        tensors[f"{key}B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
