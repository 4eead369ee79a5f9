"""Layers that are no linear ones, and weights of several tiles, in modules that are no transformers models.

PEFT's unmerged answers, or its own merge in fp32, are the reference.
"""

import pytest
import torch
from layers import Chain, Convolutions, Large, save_module, seeded
from oracle import read_tensors
from peft_cases import ADALORA, FROD
from safetensors.torch import load_file
from trained import in_peft

import lorafuse
from lorafuse.errors import AdapterError

PLANES = ["plane", "point", "wide", "square", "paired"]
CONVOLUTIONS = ["line", "grouped", *PLANES]
CHAIN = {
    "boft": ("BOFT", {"boft_block_size": 3}, ["plane", "point"]),
    "boft_butterfly": ("BOFT", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, ["square"]),
    "oft": ("OFT", {"oft_block_size": 3}, ["point", "words"]),
    "oft_shared": (
        "OFT",
        {"oft_block_size": 6, "block_share": True, "use_cayley_neumann": False},
        ["point", "words"],
    ),
    "hra": ("HRA", {"r": 2}, ["plane", "point", "square"]),
    "hra_orthonormal": ("HRA", {"r": 3, "apply_GS": True}, ["plane", "point", "square"]),
    "ia3_outputs": ("IA3", {"feedforward_modules": ["plane"]}, [*PLANES, "cube"]),
    "ia3_inputs": ("IA3", {"feedforward_modules": [*PLANES, "cube"]}, [*PLANES, "cube"]),
    "loha": ("LOHA", {"r": 3, "alpha": 6}, CONVOLUTIONS),
    "lokr": ("LOKR", {"r": 2, "alpha": 6}, CONVOLUTIONS),
    "lokr_factor": (
        "LOKR",
        {"r": 1, "alpha": 2, "decompose_factor": 2},
        ["line", "grouped", "wide", "square", "paired"],
    ),
    "lokr_whole": ("LOKR", {"r": 99, "alpha": 60}, CONVOLUTIONS),
}
CHAIN |= {
    f"{name}_effective": (kind, s | {"use_effective_conv2d": True}, t)
    for name, (kind, s, t) in CHAIN.items()
    if name[:2] == "lo"
}
# PEFT's own forward pass fails on Conv1d with a core of rank 1.
CHAIN["lokr_factor_effective"] = (
    *CHAIN["lokr_factor_effective"][:2],
    ["plane", "wide", "square", "paired"],
)


@pytest.mark.parametrize("name", CHAIN)
def test_layers_of_a_chain_answer_as_in_peft(name, tmp_path):
    kind, settings, targets = CHAIN[name]
    plain, ids = seeded(Chain), torch.arange(11)[None].repeat(2, 1)
    ckpt = save_module(plain, tmp_path / "ckpt")
    with torch.no_grad():
        before = plain(ids)
        model = in_peft(plain, kind, {"target_modules": targets} | settings, spread=0.3)
        model.save_pretrained(tmp_path / "adapter")
        lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
        merged = Chain()
        merged.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
        after = model(ids)
        assert (after - before).abs().max() > 1e-2
        assert (merged(ids) - after).abs().max() < 1e-5 * after.abs().max()


def test_oft_of_a_larger_kernel_is_refused(tmp_path):
    """In PEFT the unmerged layer and its merged weight answer differently."""
    plain = seeded(Chain)
    ckpt, adapter = save_module(plain, tmp_path / "ckpt"), tmp_path / "adapter"
    in_peft(plain, "OFT", {"target_modules": ["square"], "oft_block_size": 4}).save_pretrained(adapter)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, tmp_path / "work" / "out")
    assert str(caught.value) == (
        f"{adapter}/adapter_model.safetensors: base_model.model.square.oft_R.weight turns patches of "
        "square.weight [8, 8, 3, 3]; they overlap, so no merged weight equals it."
    )
    assert not (tmp_path / "work").exists()


# name → (PEFT type, settings, model): PEFT's own merge in fp32 is the reference.
MERGED_BY_PEFT = {
    "hira, convolutions and an embedding": (
        "HIRA",
        {"r": 3, "target_modules": ["one", "two", "three", "point", "words"]},
        Convolutions,
    ),
    "lora, convolutions and an embedding": (
        "LORA",
        {"r": 3, "lora_alpha": 5, "target_modules": ["one", "two", "three", "point", "words"]},
        Convolutions,
    ),
    "adalora, convolutions": ("ADALORA", {"target_modules": ["two", "point"]} | ADALORA, Convolutions),
    "adalora": ("ADALORA", {"target_modules": ["one"]} | ADALORA, Large),
    "deft": ("DEFT", {"target_modules": ["one"]}, Large),
    "deft, qr": ("DEFT", {"target_modules": ["one"], "decomposition_method": "qr"}, Large),
    "frod": ("FROD", {"target_modules": ["one"]} | FROD, Large),
    "osf": ("OSF", {"target_modules": ["one"]}, Large),
    "supertuning": ("SUPERTUNING", {"target_modules": ["one"], "sparsity": 0.9, "r": 2}, Large),
    "tinylora": ("TINYLORA", {"target_modules": ["one", "words"]}, Large),
    "unilora": ("UNILORA", {"target_modules": ["one"], "save_indices": True}, Large),
    "trainable_tokens": (
        "TRAINABLE_TOKENS",
        {"target_modules": ["words"], "token_indices": [899, *range(810, 830), 0]},
        Large,
    ),
    "ln_tuning": ("LN_TUNING", {"target_modules": ["one", "words"]}, Large),
}


@pytest.mark.parametrize("case", MERGED_BY_PEFT)
def test_merges_as_peft_does_beyond_one_tile(case, tmp_path):
    kind, settings, make = MERGED_BY_PEFT[case]
    model = seeded(make)
    ckpt = save_module(model, tmp_path / "ckpt")
    tuned = in_peft(model, kind, settings, SPREAD_OF_CONVOLUTIONS.get(kind, 0.05))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out", memory_limit="300MB")
    expected, found = tuned.merge_and_unload().state_dict(), read_tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if kind in SPREAD_OF_CONVOLUTIONS:
            assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-6), name
        assert (found[name] - tensor).abs().max() <= 2e-6 * (1 + tensor.abs().max()), name


SPREAD_OF_CONVOLUTIONS = {"HIRA": 0.1, "LORA": 0.1}
