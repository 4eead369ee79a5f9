"""The warning of keys that PEFT itself would not load is given for those alone."""

import json
from contextlib import closing

import pytest
import torch
from safetensors.torch import save_file

from lorafuse.adapters import AdapterDir
from lorafuse.adapters.reading.keys import plain_name, unusual_prefixes
from lorafuse.files.local_folder import LocalFolder

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
# What PEFT 0.21 keeps beside the model, since all modules share it.
SHARED = {
    "FROD": ["frod_V.self_attn_q_proj", "frod_s_indices.self_attn_q_proj", "frod_s_size.q_proj"],
    "PVERA": ["pvera_A", "pvera_B"],
    "RANDLORA": ["randlora_A", "randlora_B"],
    "TINYLORA": ["tinylora_v.0", "tinylora_v.13"],
    "UNILORA": ["unilora_theta_d"],
    "VBLORA": ["vblora_vector_bank"],
    "VERA": ["vera_A", "vera_B"],
}


def said_of(tmp_path, kind, *keys):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with closing(AdapterDir(LocalFolder(tmp_path))) as adapter:
        return unusual_prefixes(adapter)


@pytest.mark.parametrize("kind", SHARED)
def test_what_modules_share_is_no_unusual_key(kind, tmp_path):
    shared = [f"base_model.{name}" for name in SHARED[kind]]
    assert said_of(tmp_path, kind, f"{MODULE}.{kind.lower()}_x", *shared) is None


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapped_it_is_said(kind, prefix, tmp_path):
    """DistributedDataParallel and torch.compile put their names before both kinds of keys."""
    said = said_of(tmp_path, kind, f"{prefix}{MODULE}.{kind.lower()}_x")
    assert said is not None and said.endswith("PEFT itself would not load keys of this form.")
    assert said_of(tmp_path, kind, f"{prefix}base_model.{SHARED[kind][0]}") is not None


INSIDE = "layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"base_model.lm_q.model.{INSIDE}", f"model.{INSIDE}"),
        (f"base_model.model.lm_q.{INSIDE}", INSIDE),
        (f"base_model.model.pretrained_model.model.{INSIDE}", f"model.{INSIDE}"),
        (f"pretrained_model.base_model.model.model.{INSIDE}", f"model.{INSIDE}"),
        (f"language_model.base_model.model.model.{INSIDE}", f"language_model.model.{INSIDE}"),
        (f"base_model.model.llm.base_model.model.model.{INSIDE}", f"llm.model.{INSIDE}"),
        (f"base_model.model.model.pretrained_model.{INSIDE}", f"model.pretrained_model.{INSIDE}"),
    ],
)
def test_what_holds_the_model_is_taken_off(key, name):
    """NeMo's biencoder, TRL's value head, PEFT around a part of the model."""
    assert plain_name(key) == name
