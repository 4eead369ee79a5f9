"""What is particular to single types that add to W."""

import pytest
import torch
from formulas_added import shira
from oracle import decode, read_adapter
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.wavelet import Wavelet
from refusals import MODULE, Q, refusal_of
from safetensors.torch import save_file
from trained import assert_weights, weights_in_float64

import lorafuse
from lorafuse.arithmetic.seeded import _inside_out, first_of_randperm
from lorafuse.arithmetic.wavelets import FAMILIES, reconstruction_filters
from lorafuse.patches.lowrank import LowRank


def test_shira_indices_of_windows_and_repeated_ones(trained, tmp_path):
    """float32 indices are exact; values of the same element add up, in whatever order the file has them."""
    made = trained("shira")
    adapter = made.copy(tmp_path / "adapter")
    tensors = read_adapter(adapter)
    for key in [key for key in tensors if key.endswith("shira_indices")]:
        tensors[key][:, 5] = tensors[key][:, 300]
        tensors[key] = tensors[key].float()
    save_file(tensors, adapter / "adapter_model.safetensors")
    lorafuse.convert(made.ckpt, adapter, tmp_path / "out")
    wanted = weights_in_float64(made.ckpt, adapter, shira)
    before = {name: value for name, (value, _) in decode(made.ckpt).items()}
    assert_weights(tmp_path / "out", wanted, before, lambda value, w: 1e-6 * value.abs().max())


def test_shira_indices_outside_the_weight_are_refused(trained, tmp_path):
    def change(stored):
        stored[f"{Q}.shira_indices"][1, 7] = 64

    assert refusal_of(trained("shira"), tmp_path, {}, change) == (
        f"{{file}}: {Q}.shira_indices has the position 64, outside of the 64 columns of {MODULE}.weight; is "
        "the adapter for another base?"
    )


@pytest.mark.parametrize("left_nbytes", [0, 1 << 20])
@pytest.mark.parametrize("case", ["randlora", "randlora_wide", "randlora_gpt2"])
def test_randlora_bases_that_do_not_fit_are_read_again(case, left_nbytes, trained, tmp_path, monkeypatch):
    """The bytes are those of a run that holds them."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 640)
    monkeypatch.setattr("lorafuse.patches.lowrank.RIGHT_CHUNK_NUMEL", 640)
    monkeypatch.setattr("lorafuse.patches.lowrank.LEFT_RESIDENT_NBYTES", left_nbytes)
    made = trained(case)
    ckpt, adapter = made.ckpt, made.adapter
    lorafuse.convert(ckpt, adapter, tmp_path / "a")
    monkeypatch.setitem(LowRank.__init__.__kwdefaults__, "right_resident", False)
    lorafuse.convert(ckpt, adapter, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_randlora_bases_saved_with_each_module_suffice(trained, tmp_path):
    """PEFT saves them with every module besides."""
    made = trained("randlora")
    ckpt, adapter = made.ckpt, made.copy(tmp_path / "adapter")
    receipt = lorafuse.convert(ckpt, adapter, tmp_path / "a")
    assert set(receipt["adapter_tensors"]["ignored"].values()) == {
        "a copy of the bases that all modules share"
    }
    kept = {key: t for key, t in read_adapter(adapter).items() if not key.startswith("base_model.randlora_")}
    save_file(kept, adapter / "adapter_model.safetensors")
    lorafuse.convert(ckpt, adapter, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("n", "n_first", "seed"), [(1, 1, 0), (100, 100, 777), (6144, 301, 2**40 + 1), (10**6, 1000, 0)]
)
def test_places_are_those_of_randperm(n, n_first, seed):
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_first]
    assert torch.equal(first_of_randperm(n, n_first, seed), expected)


def test_places_of_a_large_weight_come_from_the_other_shuffle():
    """From 214748364 elements on torch.randperm shuffles inside out; compared with the plain loop, since
    randperm takes 1.7 GB."""
    draws, shuffled = torch.Generator().manual_seed(7), []
    for i in range(1000):
        word = int(torch.empty(1, dtype=torch.int64).random_(-(2**63), None, generator=draws)) % 2**64
        shuffled.append(i)
        shuffled[i], shuffled[word % (i + 1)] = shuffled[word % (i + 1)], i
    assert _inside_out(1000, 40, torch.Generator().manual_seed(7)).tolist() == shuffled[:40]


def test_filters_are_those_of_peft():
    for family in FAMILIES:
        wavelet = Wavelet(family)
        expected = torch.tensor([wavelet.rec_lo, wavelet.rec_hi], dtype=torch.float64)
        assert (reconstruction_filters(family) - expected).abs().max() < 1e-11, family
        assert WAVELET_REDUCTIONS[family] == (expected.shape[1] - 2,) * 2


def test_a_module_without_rank_is_ignored_with_the_reason(trained, tmp_path):
    made = trained("adalora, ranks reduced")
    receipt = lorafuse.convert(made.ckpt, made.adapter, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    assert receipt["tensors"][f"{name}.weight"]["action"] == "copied"
    assert receipt["adapter_tensors"]["ignored"] == {
        f"base_model.model.{name}.lora_{x}": "the rank of the module was reduced to 0" for x in "ABE"
    }
    assert receipt["tensors"][f"{MODULE}.weight"]["rank"] == 3


def test_unilora_without_indices_is_refused(trained, tmp_path):
    made = trained("unilora", save_indices=False, target_modules=["q_proj", "down_proj"])
    assert refusal_of(made, tmp_path) == (
        "{file}: has no unilora_indices_A (save_indices was off), so it is not known which elements of "
        "unilora_theta_d belong to which module."
    )
