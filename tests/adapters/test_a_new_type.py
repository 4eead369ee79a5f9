"""Adding an adapter type is one file and one word in ADAPTERS: a toy type in its own package is merged."""

import importlib
import json
import sys

import pytest
import torch
from oracle import read_tensors
from safetensors.torch import save_file

import lorafuse
from lorafuse.adapters import ADAPTERS
from lorafuse.errors import AdapterError

Q = "model.layers.0.self_attn.q_proj"

# All that a type needs: it adds `toy_shift` to each element of a row.
TOY = '''"""A toy: a number for each output is added to its row."""

from functools import partial

from lorafuse.adapters.reading.check_tensors import check_shapes, misfit
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors
from lorafuse.patches.target import Target

import torch

SUPPORTED = "matrices"
MEMORY = "tiles"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, rf"toy_shift{NAMED}", partial(_shifted, adapter, scale), warn)


def _shifted(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    key = leaves.pop("toy_shift", None)
    if key is None:
        return []
    n_out = check_shapes(adapter, (key, ("out",)))["out"]

    def make(target: Target) -> Patch:
        if target.spec.shape[0] != n_out:
            raise misfit(adapter, target, key)
        return RowFunction(adapter.store, {"shift": key}, partial(_add, scale=scale), facts={"scale": scale})

    return [Update(f"{module}.weight", (key,), make=make)]


def _add(tile: torch.Tensor, first_row: int, tensors: Tensors, scale: float) -> None:
    tile.add_(tensors["shift"][first_row : first_row + tile.shape[0], None], alpha=scale)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy type's module, known under its word while the test runs."""
    package = tmp_path / "toy_types"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("toy_types.toy")
    monkeypatch.setitem(ADAPTERS, "TOY", module)
    yield module
    for name in ("toy_types", "toy_types.toy"):
        del sys.modules[name]


def write_toy(path, shift):
    path.mkdir()
    save_file({f"base_model.model.{Q}.toy_shift": shift}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "TOY"}))
    return path


@pytest.mark.parametrize("kind", ["fp32", "nf4_dq"])
def test_a_new_type_is_merged(kind, base, toy, tmp_path, monkeypatch):
    """In tiles of a few rows, with a scale, and verified against its inputs."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 160)
    n_out = read_tensors(base("fp32"))[f"{Q}.weight"].shape[0]
    shift = torch.linspace(-1, 1, n_out)
    adapter = write_toy(tmp_path / "adapter", shift)
    # The base alone, decoded, is what an update of nothing gives.
    none = write_toy(tmp_path / "none", torch.zeros(n_out))
    lorafuse.convert(base(kind), none, tmp_path / "before", dtype="float32")
    receipt = lorafuse.convert(base(kind), adapter, tmp_path / "out", dtype="float32", adapter_scale=0.5)
    before, after = read_tensors(tmp_path / "before"), read_tensors(tmp_path / "out")
    assert torch.equal(after[f"{Q}.weight"], before[f"{Q}.weight"] + 0.5 * shift[:, None])
    assert [name for name in after if not torch.equal(after[name], before[name])] == [f"{Q}.weight"]
    assert receipt["adapter_tensors"]["used"] == [f"base_model.model.{Q}.toy_shift"]
    lorafuse.verify(tmp_path / "out", ckpt=base(kind), adapters=[adapter])


def test_it_is_summed_with_another(base, adapter, toy, tmp_path):
    """Types know nothing of each other."""
    lora = adapter("fp32", target_modules=["q_proj"])
    lorafuse.convert(base("fp32"), lora, tmp_path / "lora")
    alone = read_tensors(tmp_path / "lora")[f"{Q}.weight"]
    shift = torch.linspace(-1, 1, len(alone))
    lorafuse.convert(
        base("fp32"), lora, tmp_path / "out", adapters=[(write_toy(tmp_path / "toy", shift), 0.5)]
    )
    found = read_tensors(tmp_path / "out")[f"{Q}.weight"]
    assert torch.allclose(found, alone + 0.5 * shift[:, None], rtol=0, atol=1e-6)


def test_its_refusals_are_the_adapters(base, toy, tmp_path):
    with pytest.raises(AdapterError, match=r"toy_shift \[3\] does not fit .*q_proj\.weight"):
        lorafuse.convert(
            base("fp32"), write_toy(tmp_path / "adapter", torch.ones(3)), tmp_path / "work" / "out"
        )
    assert not (tmp_path / "work").exists()


def test_without_its_word_it_is_not_known(base, tmp_path):
    with pytest.raises(AdapterError, match="peft_type TOY is not supported"):
        lorafuse.convert(base("fp32"), write_toy(tmp_path / "adapter", torch.ones(3)), tmp_path / "out")
