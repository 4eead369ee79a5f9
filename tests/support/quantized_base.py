"""A small checkpoint whose weights are stored in some format, and what is made of it."""

import json
import tempfile
from contextlib import closing
from pathlib import Path

import torch
from build import write_adapter, write_checkpoint
from click.testing import CliRunner
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_floats import same_bits

import lorafuse
from lorafuse import cli
from lorafuse.codecs import Arena, open_weights
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box

MODULE = "model.layers.0.mlp.up_proj"
CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
dtypes = st.sampled_from(sorted(DTYPES))


def write(path, stored, quantization, /, dtype="bfloat16", metadata=None, **config):
    """Returns a folder with these tensors, and `metadata` in the header of their file."""
    config = {"model_type": "llama", "dtype": dtype, "quantization_config": quantization, **config}
    return write_checkpoint(path, stored, config=config, metadata=metadata)


def decoded(path, name, *, rows=None):
    """The weight as it is decoded: whole, or in tiles of so many rows of its last dimension."""
    with closing(Checkpoint(LocalFolder(path))) as ckpt:
        sources, arena = open_weights(ckpt)[name], Arena(CPU)
        spec = sources.spec
        n_cols, numel = spec.shape[-1], spec.numel
        n_rows = numel // n_cols
        parts = []
        for first in range(0, n_rows, rows or n_rows):
            last = min(first + (rows or n_rows), n_rows)
            box = Box(range(first, last), range(n_cols), n_rows, n_cols)
            parts.append(sources.values(box, arena).clone())
        sources.release()
        return torch.cat(parts).view(spec.shape)


def check_decoding(stored, quantization, expected, name=f"{MODULE}.weight", /, **config):
    """`expected` is what the weight decodes to, whole and in tiles."""
    with tempfile.TemporaryDirectory() as d:
        path = write(Path(d) / "ckpt", stored, quantization, **config)
        for rows in (None, 1, 3, 7):
            made = decoded(path, name, rows=rows)
            assert same_bits(made, expected), (rows, made, expected)


def check_merging(tmp_path, stored, quantization, expected, /, **config):
    """An adapter on one weight: every other one is what it decodes to, all is dense, and the config says
    nothing of quantization. `expected`: weight → values; two matrices at least. Returns the receipt."""
    dense = {"model.embed_tokens.weight": torch.randn(8, 4).to(next(iter(expected.values())).dtype)}
    path = write(tmp_path / "ckpt", {**stored, **dense}, quantization, vocab_size=8, **config)
    target, W = min(expected.items())
    key = f"base_model.model.{target.removesuffix('.weight')}"
    A, B = torch.randn(2, W.shape[1]), torch.randn(W.shape[0], 2)
    adapter = write_adapter(
        tmp_path / "adapter", {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, r=2, lora_alpha=2
    )
    receipt = lorafuse.convert(path, adapter, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert set(made) == {*expected, *dense}
    assert torch.allclose(made[target].double(), W.double() + (B @ A).double(), rtol=0.01, atol=0.05)
    assert made[target].dtype == W.dtype
    for name, values in {**expected, **dense}.items():
        assert name == target or same_bits(made[name], values), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "compression_config"} & config.keys()
    assert receipt["tensors"][target]["action"] == "merged"
    lorafuse.verify(tmp_path / "out", ckpt=path, adapters=[adapter])
    facts = lorafuse.inspect(path)
    assert facts["problems"] == [] and facts["n_parameters"] == sum(
        t.numel() for t in [*expected.values(), *dense.values()]
    )
    return receipt


def refusal(stored, quantization, /, **config):
    """What the command line says of a checkpoint that is damaged; nothing is written."""
    with tempfile.TemporaryDirectory() as d:
        path = write(Path(d) / "ckpt", stored, quantization, **config)
        adapter = write_adapter(Path(d) / "adapter")
        try:
            lorafuse.convert(path, adapter, Path(d) / "out")
        except lorafuse.CheckpointError as e:
            assert not (Path(d) / "out").exists()
            return str(e).removeprefix(f"{path}: ")
        raise AssertionError("it was merged")


def refusal_of_format(tmp_path, form, make, quantization):
    """What the command says of a light format of a base whose codes are not written anew, with exit code 2.
    `make`: a module's name → (its stored tensors, its values)."""
    stored, values = make(MODULE)
    stored |= make("model.layers.0.mlp.down_proj")[0]
    base, key = write(tmp_path / "ckpt", stored, quantization), f"base_model.model.{MODULE}"
    lora = {f"{key}.lora_A.weight": torch.randn(2, values.shape[1])}
    lora |= {f"{key}.lora_B.weight": torch.randn(values.shape[0], 2)}
    adapter = write_adapter(tmp_path / "adapter", lora, r=2, lora_alpha=2)
    words = ["convert", *map(str, (base, adapter, tmp_path / "out")), "--format", form]
    result = CliRunner().invoke(cli.lorafuse, words)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    return result.output
