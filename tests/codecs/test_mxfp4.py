"""MXFP4 of gpt-oss, against a decoder that is written here from the format."""

import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
from build import write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_base import CPU, DTYPES, check_decoding, dtypes, refusal, write
from safetensors.torch import load_file
from small_floats import E2M1, E8M0, of_codes, same_bits

import lorafuse
from lorafuse.codecs import Arena, mxfp4, open_weights
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box

QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
EXPERTS = "model.layers.0.mlp.experts"
STACK = f"{EXPERTS}.down_proj"
ATTENTION = "model.layers.0.self_attn.q_proj"


def stack(n_experts, n_outputs, n_groups, dtype, name=STACK, scales=(110, 130)):
    """(stored tensors, the stack of (in, out) that they are)."""
    blocks = torch.randint(0, 256, (n_experts, n_outputs, n_groups, 16), dtype=torch.uint8)
    exponents = torch.randint(*scales, (n_experts, n_outputs, n_groups), dtype=torch.uint8)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).view(n_experts, n_outputs, n_groups, 32)
    values = (of_codes(E2M1, codes) * of_codes(E8M0, exponents)[..., None]).float().to(dtype)
    stored = {f"{name}_blocks": blocks, f"{name}_scales": exponents}
    return stored, values.view(n_experts, n_outputs, -1).transpose(1, 2).contiguous()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 4)),
    dtype=dtypes,
    window=st.sampled_from([1, 200, 10**7]),
    scales=st.sampled_from([(0, 3), (110, 130), (250, 255)]),
)
def test_decoded(shape, dtype, window, scales):
    """Any shape, in windows of any size, also where values are subnormal or overflow."""
    torch.manual_seed(sum(shape))
    stored, expected = stack(*shape, DTYPES[dtype], scales=scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mxfp4, "WINDOW_NBYTES", window)
        patch.setattr(mxfp4, "CHUNK_NUMEL", 200)
        check_decoding(stored, QUANTIZATION, expected, STACK, dtype=dtype)


def test_it_is_read_once(tmp_path, monkeypatch):
    """An expert at a time, however small the tiles are."""
    stored, _ = stack(3, 40, 2, torch.bfloat16)
    path = write(tmp_path / "ckpt", stored, QUANTIZATION)
    with closing(Checkpoint(LocalFolder(path))) as ckpt:
        sources, arena, reads = open_weights(ckpt)[STACK], Arena(CPU), []
        read = ckpt.read_into
        monkeypatch.setattr(ckpt, "read_into", lambda *a: (reads.append(memoryview(a[2]).nbytes), read(*a)))
        for row in range(0, 192, 4):
            sources.values(Box(range(row, row + 4), range(40), 192, 40), arena)
    assert sorted(reads) == [80] * 3 + [1280] * 3


def gpt_oss(path, dtype=torch.bfloat16):
    """(folder, its weights as values)."""
    stored, values = {}, {}
    for name, n_outputs, n_groups in ((f"{EXPERTS}.gate_up_proj", 8, 2), (STACK, 64, 1)):
        part, expected = stack(2, n_outputs, n_groups, dtype, name, scales=(115, 122))
        stored |= part
        values[name] = expected
    dense = {
        "model.embed_tokens.weight": torch.randn(8, 64).to(dtype),
        f"{ATTENTION}.weight": torch.randn(16, 64).to(dtype),
        f"{EXPERTS}.gate_up_proj_bias": torch.randn(2, 8).to(dtype),
    }
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": 2}
    path = write(
        path, stored | dense, QUANTIZATION, str(dtype).removeprefix("torch."), vocab_size=8, **config
    )
    return path, values | dense


def pair(key, rank, n_inputs, n_outputs):
    key = f"base_model.model.{key}"
    A, B = torch.randn(rank, n_inputs) * 0.2, torch.randn(n_outputs, rank) * 0.2
    return {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, A, B


def check(tmp_path, path, values, adapter, merged):
    """The result: `merged` (weight → values) and all others as they are."""
    receipt = lorafuse.convert(path, adapter, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == values.keys()
    for name in values:
        if name in merged:
            assert torch.allclose(made[name].float(), merged[name].float(), rtol=0.01, atol=0.01), name
            assert not torch.equal(made[name], values[name])
        else:
            assert same_bits(made[name], values[name]), name
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    lorafuse.verify(tmp_path / "out", ckpt=path, adapters=[adapter])
    return receipt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_alone(dtype, tmp_path):
    path, values = gpt_oss(tmp_path / "ckpt", dtype)
    lora, A, B = pair(ATTENTION, 2, 64, 16)
    adapter = write_adapter(tmp_path / "adapter", lora, r=2, lora_alpha=2, target_modules=["q_proj"])
    name = f"{ATTENTION}.weight"
    receipt = check(tmp_path, path, values, adapter, {name: values[name].float() + B @ A})
    assert receipt["base_semantics"] == "stored in full precision"


def test_target_parameters(tmp_path):
    """PEFT's factors of a stack: of all experts in one, (rank · experts)."""
    path, values = gpt_oss(tmp_path / "ckpt")
    lora, A, B = pair(EXPERTS, 2 * 2, 32, 64)
    adapter = write_adapter(
        tmp_path / "adapter",
        lora,
        r=2,
        lora_alpha=2,
        target_modules=[],
        target_parameters=["mlp.experts.down_proj"],
    )
    delta = torch.einsum("ore,eri->eio", B.view(64, 2, 2), A.view(2, 2, 32))
    receipt = check(tmp_path, path, values, adapter, {STACK: values[STACK].float() + delta})
    assert receipt["base_semantics"] == "stored in MXFP4, block size 32"
    assert lorafuse.inspect(path)["problems"] == []


def test_unsloths_names(tmp_path):
    """An adapter of linear layers for each expert, trained on Unsloth's copy of the model."""
    path, values = gpt_oss(tmp_path / "ckpt")
    lora, A, B = pair(f"{EXPERTS}.down_projs.1", 2, 32, 64)
    adapter = write_adapter(tmp_path / "adapter", lora, r=2, lora_alpha=2, target_modules=["down_projs.1"])
    merged = values[STACK].float()
    merged[1] += (B @ A).T
    check(tmp_path, path, values, adapter, {STACK: merged})


DAMAGED = {
    "scales gone": ({f"{STACK}_scales": None}, f"{STACK}_blocks"),
    "scales of another shape": ({f"{STACK}_scales": torch.zeros(2, 64, 2, dtype=torch.uint8)}, STACK),
    "blocks of another shape": ({f"{STACK}_blocks": torch.zeros(2, 64, 1, 8, dtype=torch.uint8)}, STACK),
    "blocks of another dtype": ({f"{STACK}_blocks": torch.zeros(2, 64, 1, 16, dtype=torch.int8)}, STACK),
    "no experts": (
        {
            f"{STACK}_blocks": torch.zeros(0, 64, 1, 16, dtype=torch.uint8),
            f"{STACK}_scales": torch.zeros(0, 64, 1, dtype=torch.uint8),
        },
        f"{STACK}_blocks is empty",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("quantization", [QUANTIZATION, {}])
def test_damaged(case, quantization):
    change, text = DAMAGED[case]
    other, _ = stack(2, 8, 1, torch.bfloat16, f"{EXPERTS}.gate_up_proj")
    stored = stack(2, 64, 1, torch.bfloat16)[0] | other | change
    present = {name: tensor for name, tensor in stored.items() if tensor is not None}
    assert text in refusal(present, quantization, model_type="gpt_oss")


def test_inspected_by_its_headers():
    """As many parameters as the dense model has."""
    with tempfile.TemporaryDirectory() as d:
        stored, values = stack(2, 64, 3, torch.bfloat16)
        path = write(Path(d) / "ckpt", stored, QUANTIZATION)
        info = Checkpoint(LocalFolder(path))
        told = mxfp4.scheme((f"{STACK}_blocks",), info.tensors, {})
        assert told.numel_of(info.tensors[f"{STACK}_blocks"].spec) == values.numel()
        info.close()
