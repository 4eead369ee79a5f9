"""PEFT's LoRA: scaling, orientation, layer kinds, replacements and refusals, each against PEFT itself."""

import pytest
import torch
from build import refusal, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LINEARS
from oracle import complaints, read_adapter, read_tensors, truth
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from trained import assert_same_answers

import lorafuse
from lorafuse.adapters.reading.module_patterns import ModulePatterns
from lorafuse.errors import AdapterError

NAMES = st.sampled_from(
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        r".*\.1\..*",
        r"self_attn\.[qk]_proj",
        "1",
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(NAMES, unique=True),
    st.sampled_from(["model.layers.1.self_attn.q_proj", "q_proj", "model.layers.11.mlp.up_proj"]),
)
def test_patterns_match_as_in_peft(keys, module):
    """The first key in file order that matches, as a regex anchored at the end."""
    pattern = {key: i for i, key in enumerate(keys)}
    assert ModulePatterns(pattern).value(module, "default") == pattern.get(
        get_pattern_key(keys, module), "default"
    )


def test_patterns_scale_each_module(base, adapter, tmp_path):
    """rank_pattern and alpha_pattern give the merged model the answers of the unmerged one."""
    lora = adapter(
        "fp32",
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, r"^model\.layers\.0\..*": 6},
        alpha_pattern={"q_proj": 5, "layers.1.mlp.down_proj": 1.5},
        use_rslora=True,
    )
    receipt = lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    found = {n: (e["rank"], e["scale"]) for n, e in receipt["tensors"].items() if e["action"] == "merged"}
    assert found == {
        "model.layers.0.self_attn.q_proj.weight": (6, 5 / 6**0.5),
        "model.layers.1.self_attn.q_proj.weight": (2, 5 / 2**0.5),
        "model.layers.0.mlp.down_proj.weight": (6, 8 / 6**0.5),
        "model.layers.1.mlp.down_proj.weight": (4, 1.5 / 4**0.5),
    }
    assert_same_answers(tmp_path / "out", adapter.model)


def test_null_patterns_mean_none(base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"])
    rewrite(lora, rank_pattern=None, alpha_pattern=None)
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base("fp32"), lora)) == []


def test_square_conv1d_is_decided_by_the_architecture(base, adapter, tmp_path):
    """GPT-2's attention c_proj is square, and the saved fan_in_fan_out is that of the last layer PEFT
    touched."""
    lora = adapter("gpt2", target_modules=["c_proj"], fan_in_fan_out=True)
    rewrite(lora, fan_in_fan_out=False)
    lorafuse.convert(base("gpt2"), lora, tmp_path / "out")
    assert_same_answers(tmp_path / "out", adapter.model)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_those_of_the_base(bias, base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj", "v_proj"], bias=bias)
    receipt = lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert receipt["tensors"]["model.layers.0.self_attn.q_proj.bias"]["action"] == "replaced"
    assert_same_answers(tmp_path / "out", adapter.model)


def test_modules_to_save_replace_weights_in_their_dtype(base, adapter, tmp_path):
    """PEFT saves them in fp32; the output keeps the dtype of the base."""
    lora = adapter("bf16", target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    receipt = lorafuse.convert(base("bf16"), lora, tmp_path / "out")
    saved, found = read_adapter(lora), read_tensors(tmp_path / "out")
    # PEFT matches by the end of the name: "norm" also is post_attention_layernorm.
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.1.post_attention_layernorm.weight"):
        assert torch.equal(found[name], saved[f"base_model.model.{name}"].bfloat16())
        assert receipt["tensors"][name]["action"] == "replaced"
    assert receipt["adapter_tensors"]["ignored"] == {}


def test_copies_of_replaced_modules_are_ignored_with_a_reason(base, adapter, tmp_path):
    """bias="all" beside modules_to_save writes original_module.bias too."""
    lora = adapter("fp32", target_modules=["q_proj"], bias="all", modules_to_save=["o_proj"])
    receipt = lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    used, ignored = receipt["adapter_tensors"]["used"], receipt["adapter_tensors"]["ignored"]
    assert sorted([*used, *ignored]) == sorted(read_adapter(lora))
    assert all(".original_module." in key or "o_proj" in key for key in ignored) and ignored
    assert_same_answers(tmp_path / "out", adapter.model)


@pytest.mark.parametrize("segment", ["default", "my_adapter"])
def test_the_adapter_name_in_a_key_is_accepted(segment, base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"])
    named = {key.replace(".weight", f".{segment}.weight"): t for key, t in read_adapter(lora).items()}
    wanted = truth(base("fp32"), lora)
    save_file(named, lora / "adapter_model.safetensors")
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", wanted) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters_are_computed_in_fp32(dtype, base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=LINEARS)
    save_file({key: t.to(dtype) for key, t in read_adapter(lora).items()}, lora / "adapter_model.safetensors")
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base("fp32"), lora)) == []


def test_a_bin_adapter_gives_the_same_bytes(base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=LINEARS)
    lorafuse.convert(base("nf4_dq"), lora, tmp_path / "a")
    torch.save(read_adapter(lora), lora / "adapter_model.bin")
    (lora / "adapter_model.safetensors").unlink()
    lorafuse.convert(base("nf4_dq"), lora, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_rank_that_the_config_contradicts_is_said_once(base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=LINEARS)
    rewrite(lora, r=16)
    events = []
    lorafuse.convert(base("fp32"), lora, tmp_path / "out", on_event=events.append)
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        f"{lora}/adapter_config.json: says rank 16 where the tensors have rank 4; the tensors are believed."
    ]


REFUSED_FIELDS = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": "2"},
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 1},
    "megatron_config": {"x": 1},
    "trainable_token_indices": [1],
    "init_lora_weights": "pissa_niter_4",
    "peft_type": "XLORA",
    "lora_alpha": "16",
    "r": 0,
    "alpha_pattern": {"(": 1},
    "rank_pattern": [1],
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_what_is_not_supported_is_refused_by_name(field, base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"])
    rewrite(lora, **{field: REFUSED_FIELDS[field]})
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(base("fp32"), lora, tmp_path / "work" / "out")
    assert field in str(caught.value) and str(lora / "adapter_config.json") in str(caught.value)
    assert not (tmp_path / "work").exists()


A, B = torch.zeros(4, 64), torch.zeros(64, 4)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
MISFITS = {
    "no partner": (
        {f"{Q}.lora_A.weight": A},
        "model.layers.0.self_attn.q_proj has lora_A.weight but no lora_B.weight.",
    ),
    "wrong layer": (
        {f"{Q.replace('.0.', '.7.')}.lora_A.weight": A, f"{Q.replace('.0.', '.7.')}.lora_B.weight": B},
        f"{Q.replace('.0.', '.7.')}.lora_A.weight belongs to model.layers.7.self_attn.q_proj.weight, which "
        "the checkpoint does not have (nearest: model.layers.1.self_attn.q_proj.weight, "
        "model.layers.0.self_attn.q_proj.weight).",
    ),
    "wrong size": (
        {f"{Q}.lora_A.weight": torch.zeros(4, 72), f"{Q}.lora_B.weight": B},
        f"{Q}.lora_A.weight [4, 72] and {Q}.lora_B.weight [64, 4] do not fit "
        "model.layers.0.self_attn.q_proj.weight [64, 64]; is the adapter for another base?",
    ),
    "two ranks": (
        {f"{Q}.lora_A.weight": torch.zeros(5, 64), f"{Q}.lora_B.weight": B},
        f"{Q}.lora_A.weight is F32 [5, 64] and {Q}.lora_B.weight is F32 [64, 4]; they are not the two "
        "factors of one update.",
    ),
    "empty": (
        {f"{Q}.lora_A.weight": torch.zeros(0), f"{Q}.lora_B.weight": torch.zeros(0)},
        f"{Q}.lora_A.weight, {Q}.lora_B.weight of shape [0]: DeepSpeed ZeRO-3 saved placeholders in their "
        "place. Save the adapter with the parameters gathered (stage3_gather_16bit_weights_on_model_save), "
        "or make it from the training state with zero_to_fp32.py.",
    ),
    "no rows": (
        {f"{Q}.lora_A.weight": torch.zeros(0, 64), f"{Q}.lora_B.weight": torch.zeros(64, 0)},
        f"{Q}.lora_A.weight is F32 [0, 64] and {Q}.lora_B.weight is F32 [64, 0]; they are not the two "
        "factors of one update.",
    ),
    "a stranger": (
        {"base_model.model.something": torch.zeros(4)},
        "base_model.model.something belongs to something, which the checkpoint does not have.",
    ),
    "unknown leaf": (
        {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.lora_lambda": torch.zeros(4)},
        f"{Q}.lora_lambda is of a kind that is not supported.",
    ),
    "a bias that the base lacks": (
        {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.lora_B.bias": torch.zeros(63)},
        f"{Q}.lora_B.bias is F32 [63], but model.layers.0.self_attn.q_proj.bias is F32 [64].",
    ),
    "another size of norm": (
        {"base_model.model.model.norm.weight": torch.zeros(65)},
        "base_model.model.model.norm.weight is [65], but model.norm.weight is [64]; is the adapter for "
        "another base?",
    ),
    "integers": (
        {f"{Q}.lora_A.weight": A.int(), f"{Q}.lora_B.weight": B},
        f"{Q}.lora_A.weight has the dtype I32; expected one of F32, F16, BF16.",
    ),
    "the same tensor twice": (
        {f"{Q}.lora_A.weight": A, f"{Q}.lora_A.default.weight": A.clone(), f"{Q}.lora_B.weight": B},
        "are the same tensor; which is meant?",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_tensor_without_its_place_is_refused(case, base, adapter, tmp_path):
    """Exit 4 before writing, naming the tensor and what was looked for."""
    tensors, message = MISFITS[case]
    lora = adapter("fp32", target_modules=["q_proj"])
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(base("fp32"), lora, tmp_path / "work" / "out")
    assert str(caught.value).startswith(f"{lora}/adapter_model.safetensors: ") and refusal(caught).endswith(
        message
    )
    assert not (tmp_path / "work").exists()


class Canary:
    """Pickles to a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path(self.path),)


@pytest.mark.parametrize("kind", ["zip", "pickle", "garbage", "lfs", "list"])
def test_a_bin_adapter_is_never_executed(kind, base, adapter, tmp_path):
    """Only weights_only loading; code in the file does not run."""
    import pickle

    lora = adapter("fp32", target_modules=["q_proj"])
    (lora / "adapter_model.safetensors").unlink()
    path, canary = lora / "adapter_model.bin", tmp_path / "canary"
    if kind == "zip":
        torch.save({"x": Canary(canary)}, path)
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    else:
        content = {
            "pickle": pickle.dumps({"x": Canary(canary)}),
            "garbage": b"PK\x03\x04 no",
            "lfs": b"version https://git-lfs.x",
        }
        path.write_bytes(content[kind])
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        lorafuse.convert(base("fp32"), lora, tmp_path / "work" / "out")
    assert not canary.exists() and not (tmp_path / "work").exists()
