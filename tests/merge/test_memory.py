"""Peak memory: a constant beyond `import torch`, whatever the size of a tensor."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from large_pair import nf4, write_pair
from processes import beyond_torch, of_torch


def nf4_matrix(tmp_path):
    """A checkpoint of an NF4 matrix of 268 M elements and an embedding of 268 MB, and an adapter for the
    matrix."""
    rows, cols, w = 8192, 32768, "model.layers.0.mlp.up_proj.weight"
    tensors = {"model.embed_tokens.weight": ("BF16", [32768, 4096], bytes(1 << 20), 256)}
    return write_pair(tmp_path, w, (rows, cols), 64, tensors | nf4(w, rows, cols))


def test_peak_memory_is_bounded(tmp_path):
    """They take less than 100 MB beyond `import torch`."""
    beyond = beyond_torch("convert", "-q", *nf4_matrix(tmp_path), tmp_path / "out")
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"


def test_peak_memory_of_new_codes_and_scales(tmp_path):
    """Nor does one of 67 M elements take more that gets codes and scales of its own."""
    rows, cols, w = 2048, 32768, "model.layers.0.mlp.up_proj.weight"
    ckpt, lora = write_pair(tmp_path, w, (rows, cols), 64, nf4(w, rows, cols))
    beyond = beyond_torch("convert", "-q", ckpt, lora, tmp_path / "out", "--format", "w4a16")
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"


@pytest.mark.soak
def test_peak_memory_of_a_transposed_matrix(tmp_path, share_s):
    """So does an NF4 matrix that is stored transposed, of which a tile is a band of columns: of 218 M
    elements, and in `make soak` of 872 M, as the largest models have them."""
    rows, cols, w = 16384 if share_s else 4096, 53248, "h.0.mlp.c_fc.weight"
    ckpt, lora = write_pair(tmp_path, w, (cols, rows), 16, nf4(w, rows, cols), model_type="gpt2")
    beyond = beyond_torch("convert", "-q", ckpt, lora, tmp_path / "out")
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"


def full_update(tmp_path, weight, rows, cols):
    """An adapter that changes every element of a weight."""
    factors = {"lora_A": np.full((16, cols), 0.1), "lora_B": np.full((rows, 16), 0.001)}
    key = f"base_model.model.{weight.removesuffix('.weight')}"
    tensors = {f"{key}.{n}.weight": torch.from_numpy(f).float() for n, f in factors.items()}
    return write_adapter(tmp_path / "all", tensors)


def test_peak_memory_of_a_weight_that_stays_on_its_grid(tmp_path):
    """So does a matrix of 34 M elements of which every code may move."""
    rows, cols, w = 2048, 16384, "model.layers.0.mlp.down_proj.weight"
    ckpt, _ = write_pair(tmp_path, w, (rows, cols), 16, nf4(w, rows, cols))
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config = json.loads((ckpt / "config.json").read_text()) | quantized
    (ckpt / "config.json").write_text(json.dumps(config))
    lora = full_update(tmp_path, w, rows, cols)
    beyond = beyond_torch("convert", "-q", ckpt, lora, tmp_path / "out", "--format", "base")
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"


@pytest.mark.parametrize(
    "options",
    [
        ("--format", "nf4", "--rounding", "unbiased", "--quant-blocksize", "4096"),
        ("--format", "int8", "--rounding", "unbiased"),
        ("--format", "base", "--base-quant", "nf4"),
    ],
    ids=" ".join,
)
def test_peak_memory_of_a_matrix_that_is_quantized(options, tmp_path):
    """So does a bf16 matrix of 34 M elements that is quantized here, of which every code may move."""
    rows, cols, w = 2048, 16384, "model.layers.0.mlp.down_proj.weight"
    piece = torch.randn(1 << 19, dtype=torch.float32).mul_(0.02).bfloat16().view(torch.uint8)
    tensors = {w: ("BF16", [rows, cols], piece.numpy().tobytes(), rows * cols >> 19)}
    ckpt, _ = write_pair(tmp_path, w, (rows, cols), 16, tensors)
    lora = full_update(tmp_path, w, rows, cols)
    beyond = beyond_torch("convert", "-q", ckpt, lora, tmp_path / "out", *options)
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"


def mxfp4(w, n_experts, rows, n_groups):
    """The stored tensors of a stack of experts."""
    piece = np.random.default_rng(0).integers(0, 256, rows * n_groups * 16, dtype=np.uint8).tobytes()
    return {
        f"{w}_blocks": ("U8", [n_experts, rows, n_groups, 16], piece, n_experts),
        f"{w}_scales": ("U8", [n_experts, rows, n_groups], b"\x78" * (rows * n_groups), n_experts),
    }


def packed_integers(w, rows, n_groups):
    """The stored tensors of compressed-tensors' 4-bit integers in groups of 32, asymmetric."""
    module, cols = w.removesuffix(".weight"), 32 * n_groups
    piece = np.random.default_rng(0).integers(0, 256, cols * 8, dtype=np.uint8).tobytes()
    zeros = np.random.default_rng(1).integers(0, 256, rows * n_groups // 2, dtype=np.uint8).tobytes()
    return {
        f"{module}.weight_packed": ("I32", [rows, cols // 8], piece, rows // 16),
        f"{module}.weight_scale": ("BF16", [rows, n_groups], b"\x00\x3c" * (n_groups * 16), rows // 16),
        f"{module}.weight_zero_point": ("I32", [rows // 8, n_groups], zeros, 1),
        f"{module}.weight_shape": ("I64", [2], np.array([rows, cols], np.int64).tobytes(), 1),
    }


def fp8_blocks(w, rows, cols):
    """The stored tensors of an FP8 matrix with a scale for each 128 × 128."""
    piece = np.random.default_rng(0).integers(0, 120, cols * 16, dtype=np.uint8).tobytes()
    grid = [rows // 128, cols // 128]
    return {
        w: ("F8_E4M3", [rows, cols], piece, rows // 16),
        f"{w}_scale_inv": ("F32", grid, np.full(grid[0] * grid[1], 0.01, np.float32).tobytes(), 1),
    }


QUANTIZED = {
    "fp8": (fp8_blocks, (4096, 16384)),
    "compressed-tensors": (packed_integers, (4096, 512)),
    "mxfp4": (mxfp4, (3, 5760, 90)),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_peak_memory_of_other_quantizations(kind, tmp_path):
    """Of matrices of 67 M elements, and of a stack of gpt-oss's size, whose experts are read whole."""
    make, shape = QUANTIZED[kind]
    w = "model.layers.0.mlp.up_proj.weight"
    stack = make("model.layers.0.mlp.experts.gate_up_proj", *shape) if kind == "mxfp4" else make(w, *shape)
    small = {w: ("BF16", [64, 64], bytes(8192), 1)} if kind == "mxfp4" else {}
    out = (64, 64) if kind == "mxfp4" else (4096, 16384)
    ckpt, lora = write_pair(tmp_path, w, out, 16, stack | small)
    beyond = beyond_torch("convert", "-q", ckpt, lora, tmp_path / "out")
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"


@contextmanager
def cgroup(nbytes):
    """The command line's first words, for a command that may use so many bytes, page cache included."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else v1.parent) / f"lorafuse-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(nbytes))
    except OSError as e:
        pytest.skip(f"may not make a memory cgroup here: {e}")
    try:
        yield ["sh", "-c", 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"', "sh", str(group)]
    finally:
        group.rmdir()


def test_in_a_container_with_little_memory(tmp_path):
    """What `import torch` takes and 100 MB are enough, though much more is read and written. With less the
    kernel kills the run, and nothing is under OUT_DIR's name; with more again the same command does it
    all."""
    inputs, out, floor = nf4_matrix(tmp_path), tmp_path / "out", of_torch()

    def status(nbytes):
        command = [sys.executable, "-m", "lorafuse.cli", "convert", "-q", *map(str, inputs), str(out)]
        with cgroup(nbytes) as limited:
            return subprocess.run([*limited, *command], check=False).returncode

    assert status(floor + 100_000_000) == 0
    shutil.rmtree(out)
    too_little, enough = floor // 2, floor
    while not any(tmp_path.glob(".out.lorafuse-*/out/*.part")):  # killed while it writes
        assert enough - too_little > 1_000_000
        nbytes = (too_little + enough) // 2
        ended = status(nbytes)
        assert ended in (0, -signal.SIGKILL) and out.exists() == (ended == 0)
        if ended == 0:
            shutil.rmtree(out)
            enough = nbytes
        else:
            too_little = nbytes
    assert status(floor) == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "lora", "out"]


def test_peak_memory_of_a_batch_is_bounded(tmp_path):
    """However many jobs there are: what a pass held is gone before the next one."""
    tensors = checkpoint_tensors(n_layers=1, hidden=1024)
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors)
    own = {k: t for k, t in adapter_tensors(tensors).items() if "q_proj" in k}
    adapter = write_adapter(tmp_path / "adapter", own, target_modules=["q_proj"])
    lines = [json.dumps({"adapter": str(adapter), "name": str(i), "scale": i + 1}) for i in range(14)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    limits = ("--memory-limit", "60MB", "--max-shard-size", "4MB")
    beyond = beyond_torch("batch", "-v", ckpt, tmp_path / "jobs.jsonl", tmp_path / "out", *limits)
    assert beyond < 60e6, f"{beyond / 1e6:.0f} MB beyond import torch"
    assert len(list((tmp_path / "out").iterdir())) == 14


def test_peak_memory_of_a_base_that_is_quantized_anew(tmp_path):
    """So does a bfloat16 matrix of as many, with a pass over it for double quantization."""
    rows, cols = 8192, 32768
    piece = (
        (np.random.default_rng(0).standard_normal(1 << 20, np.float32).view(np.uint32) >> 16)
        .astype(np.uint16)
        .tobytes()
    )
    w = "model.layers.0.mlp.up_proj.weight"
    tensors = {w: ("BF16", [rows, cols], piece, rows * cols >> 20)}
    ckpt, lora = write_pair(tmp_path, w, (rows, cols), 16, tensors)
    beyond = beyond_torch(
        "convert", "-q", ckpt, lora, tmp_path / "out", "--base-quant", "nf4", "--quant-blocksize", "32"
    )
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"
