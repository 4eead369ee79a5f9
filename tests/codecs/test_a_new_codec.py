"""A codec is one file and one word: one from outside the package is inspected and merged, end to end."""

import importlib
import sys

import pytest
import torch
from build import CONFIG, write_adapter, write_checkpoint
from safetensors.torch import load_file

import lorafuse
from lorafuse import codecs
from lorafuse.errors import CheckpointError

CODEC = '''
"""Whole multiples of a step: `X.codes` int8 (out, in) and `X.step` fp32 (1,) make `X.weight`."""

import torch

from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import TensorSpec

QUANT_METHODS = ("steps",)


def claim(stored, config):
    modules = [name.removesuffix(".codes") for name in stored if name.endswith(".codes")]
    inputs = {f"{module}.input_step": "a step of activations" for module in modules}
    return Claims(
        {f"{module}.weight": (f"{module}.codes", f"{module}.step") for module in modules},
        {name: reason for name, reason in inputs.items() if name in stored},
    )


def scheme(names, stored, config):
    return Scheme("steps", words="steps of " + config["quantization_config"]["unit"], bits=8)


def open_sources(weight, names, ckpt):
    return Steps(names, ckpt)


class Steps(Sources):
    def __init__(self, names, ckpt):
        self.names, self.store, self.scheme = names, ckpt, scheme(names, {}, ckpt.config)
        self.spec, self.out_dtype = TensorSpec("F32", ckpt.tensors[names[0]].spec.shape), "BF16"
        self.step = torch.frombuffer(read_all(ckpt, names[1]), dtype=torch.float32)

    def fetch(self, box, arena):
        start, stop = box.run
        return (arena.fetch("steps", self.store, self.names[0], start, stop - start).view(torch.int8),)

    def decode(self, raw, box, arena):
        return arena.place(raw[0]) * arena.place(self.step)
'''
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """(checkpoint, what its only quantized weight decodes to), with the codec in the table."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "steps_codec.py").write_text(CODEC)
    monkeypatch.syspath_prepend(tmp_path / "outside")
    monkeypatch.setattr(codecs, "CODECS", (importlib.import_module("steps_codec"), *codecs.CODECS))
    torch.manual_seed(0)
    codes = torch.randint(-99, 99, (48, 32), dtype=torch.int8)
    stored = {
        "model.embed_tokens.weight": torch.randn(8, 32).bfloat16(),
        f"{MODULE}.codes": codes,
        f"{MODULE}.step": torch.tensor([0.01]),
        f"{MODULE}.input_step": torch.tensor([0.2]),
    }
    path = write_checkpoint(
        tmp_path / "ckpt",
        stored,
        config=CONFIG | {"vocab_size": 8, "quantization_config": {"quant_method": "steps", "unit": "metres"}},
    )
    yield path, codes * torch.tensor([0.01])
    del sys.modules["steps_codec"]


def test_it_is_merged(steps, tmp_path):
    """The update is added, the result is dense, and the config no longer says how it was quantized. The
    receipt says how it was, and what was dropped."""
    path, values = steps
    key, A, B = f"base_model.model.{MODULE}", torch.randn(4, 32), torch.randn(48, 4)
    adapter = write_adapter(
        tmp_path / "adapter", {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, r=4, lora_alpha=4
    )
    receipt = lorafuse.convert(path, adapter, tmp_path / "out", dtype="float32")
    assert receipt["base_semantics"] == "stored in steps of metres"
    assert receipt["dropped"] == {f"{MODULE}.input_step": "a step of activations"}
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert set(made) == {"model.embed_tokens.weight", f"{MODULE}.weight"}
    assert torch.allclose(made[f"{MODULE}.weight"], values + B @ A, atol=1e-5)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    lorafuse.verify(tmp_path / "out", ckpt=path, adapters=[adapter])


def test_it_is_inspected(steps):
    """With its sources."""
    facts = lorafuse.inspect(steps[0])
    assert facts["problems"] == [] and facts["n_weights"] == 2
    (row,) = [row for row in facts["storage"] if row["quantized"] == "steps"]
    assert (row["n_parameters"], row["nbytes"], row["dtype"]) == (48 * 32, 48 * 32 + 4, "float32")
    assert (row["scheme"], row["bits"]) == ("steps of metres", 8)


def test_it_is_inspected_by_its_headers(steps, monkeypatch):
    """Where its sources cannot be opened; no stored tensor has the weight's name."""

    def refuse(*_):
        raise CheckpointError("no good")

    monkeypatch.setattr(sys.modules["steps_codec"], "open_sources", refuse)
    facts = lorafuse.inspect(steps[0])
    assert facts["problems"] == ["no good"] and facts["n_weights"] == 2
    (row,) = [row for row in facts["storage"] if row["quantized"] == "steps"]
    assert (row["n_parameters"], row["nbytes"], row["dtype"]) == (48 * 32, 48 * 32 + 4, None)
    assert (row["scheme"], row["bits"]) == ("steps of metres", 8)


def test_its_quantization_is_unknown_without_it(steps, monkeypatch):
    monkeypatch.setattr(codecs, "CODECS", codecs.CODECS[1:])
    assert "is quantized with steps" in lorafuse.inspect(steps[0])["problems"][0]
