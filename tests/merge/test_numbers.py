"""The values written: float64 truth rounded once, for every kind of base and every output dtype."""

import pytest
import torch
from models import LINEARS
from oracle import complaints, round_once, truth

import lorafuse

BASES = [
    "fp32", "fp16", "bf16", "bf16_odd", "nf4", "nf4_dq", "nf4_fp16", "fp4_dq", "nf4_bs256", "nf4_bf16storage",
    "fp4_fp32storage",
    "nf4_odd", "int8",
]  # fmt: skip
GPT2 = ["gpt2", "gpt2_bf16", "gpt2_nf4", "gpt2_int8"]


@pytest.mark.parametrize("kind", BASES)
def test_every_weight_is_the_truth_rounded_once(kind, base, adapter, tmp_path):
    """Base + s·B·A in float64, rounded once; everything else bit for bit."""
    lora = adapter(kind, target_modules=LINEARS)
    wanted = truth(base(kind), lora)
    for dtype in ("auto", "float32", "float16", "bfloat16"):
        lorafuse.convert(base(kind), lora, tmp_path / dtype, dtype=dtype, max_shard_size="50KB")
        assert complaints(tmp_path / dtype, wanted, dtype) == []


@pytest.mark.parametrize("kind", GPT2)
def test_conv1d_weights_keep_their_own_orientation(kind, base, adapter, tmp_path):
    """HF Conv1D weights are (in, out) in the output, though bitsandbytes stores them as (out, in)."""
    lora = adapter(kind, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    lorafuse.convert(base(kind), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base(kind), lora)) == []


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0])
def test_adapter_scale_multiplies_the_update(scale, base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=LINEARS, lora_alpha=3.5, use_rslora=True)
    lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out", adapter_scale=scale)
    assert complaints(tmp_path / "out", truth(base("nf4_dq"), lora, scale)) == []


@pytest.mark.parametrize("kind", ["fp32", "nf4_dq"])
def test_lora_bias_is_scaled(kind, base, adapter, tmp_path):
    """As in the forward pass; PEFT's bitsandbytes layers add it unscaled when they merge."""
    lora = adapter(kind, target_modules=["q_proj", "down_proj"], lora_bias=True, lora_alpha=12)
    lorafuse.convert(base(kind), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base(kind), lora)) == []


def test_the_merged_model_answers_as_the_unmerged_one(base, adapter, tmp_path):
    """End to end with transformers and PEFT, in fp32."""
    from transformers import AutoModelForCausalLM

    lora = adapter("fp32", target_modules=LINEARS)
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert (merged(ids).logits - adapter.model(ids).logits).abs().max() < 1e-4


def test_the_oracle_rounds_once():
    """A value just above a tie of bfloat16 rounds up, though its fp32 neighbour is the tie and would round to
    even."""
    tie = 1 + 2.0**-8
    x = torch.tensor([tie + 2.0**-40, tie, -tie, 0.0], dtype=torch.float64)
    assert x.float().bfloat16()[0] == 1.0
    expected = torch.tensor([1 + 2.0**-7, 1.0, -1.0, 0.0], dtype=torch.bfloat16)
    assert torch.equal(round_once(x, torch.bfloat16), expected)
