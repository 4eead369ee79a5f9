"""MLX's quantized weights, against a packer and a decoder that are written here from the format."""

import pytest
import torch
from build import write_adapter, write_checkpoint, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import SIZES, extreme, stream
from quantized_base import DTYPES, MODULE, check_decoding, check_merging, dtypes, refusal
from safetensors.torch import load_file, save_file
from small_floats import E2M1, E4M3, E8M0, of_codes, same_bits

import lorafuse

WEIGHT = f"{MODULE}.weight"
EMBEDDING = "model.embed_tokens.weight"
AFFINE_BITS = [2, 3, 4, 5, 6, 8]
# mode → bits, group size, what codes and scales stand for
FLOATS = {"mxfp4": (4, 32, E2M1, E8M0), "mxfp8": (8, 32, E4M3, E8M0), "nvfp4": (4, 16, E2M1, E4M3)}


def stacked(packed, shape):
    return packed.view(torch.uint32).view(*shape, packed.shape[-1])


def affine(shape, bits, group_size, dtype=torch.bfloat16, size="ordinary", name=MODULE):
    """(stored tensors of a random weight, its values)."""
    codes = torch.randint(0, 1 << bits, shape)
    grid = (*shape[:-1], shape[-1] // group_size)
    scales, biases = extreme(grid, dtype, size), extreme(grid, dtype, size)
    stored = {
        f"{name}.weight": stacked(stream(codes.view(-1, shape[-1]), bits), shape[:-1]),
        f"{name}.scales": scales,
        f"{name}.biases": biases,
    }
    spread = [part.double().repeat_interleave(group_size, dim=-1) for part in (scales, biases)]
    products = (codes * spread[0]).to(dtype).double()
    return stored, (products + spread[1]).to(dtype)


def floats(shape, mode, dtype=torch.bfloat16, name=MODULE):
    bits, group_size, of_code, of_scale = FLOATS[mode]
    codes = torch.randint(0, 1 << bits, shape)
    # No NaN; E8M0 such that all products are numbers of the dtype.
    scales = torch.randint(110, 126, (*shape[:-1], shape[-1] // group_size), dtype=torch.uint8)
    stored = {
        f"{name}.weight": stacked(stream(codes.view(-1, shape[-1]), bits), shape[:-1]),
        f"{name}.scales": scales,
    }
    spread = of_codes(of_scale, scales).repeat_interleave(group_size, dim=-1)
    return stored, (of_codes(of_code, codes) * spread).to(dtype)


def check(stored, section, expected, name=WEIGHT, **config):
    """As convert, with MLX's `quantization` in place of a quantization_config."""
    check_decoding(stored, section, expected, name, quantization=section, **config)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_affine(data):
    """Any shape, stacks, all bits and dtypes, extreme scales."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bits, group_size = data.draw(st.sampled_from(AFFINE_BITS)), data.draw(st.sampled_from([32, 64]))
    shape = (data.draw(st.integers(1, 12)), group_size * data.draw(st.integers(1, 3)))
    shape = (2, *shape) if data.draw(st.booleans()) else shape
    dtype = DTYPES[data.draw(dtypes)]
    stored, expected = affine(shape, bits, group_size, dtype, data.draw(st.sampled_from(SIZES)))
    check(stored, {"group_size": group_size, "bits": bits}, expected)


@settings(max_examples=8, deadline=None)
@given(st.data())
@pytest.mark.parametrize("mode", FLOATS)
def test_floats(mode, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bits, group_size, _, _ = FLOATS[mode]
    shape = (data.draw(st.integers(1, 9)), group_size * 2 * data.draw(st.integers(1, 3)))
    dtype = data.draw(dtypes)
    stored, expected = floats(shape, mode, DTYPES[dtype])
    check(stored, {"group_size": group_size, "bits": bits, "mode": mode}, expected, dtype=dtype)


@pytest.mark.parametrize(
    ("section", "made"),
    [
        ({"group_size": 64, "bits": 4, MODULE: {"group_size": 32, "bits": 6}}, (6, 32)),
        ({"group_size": 64, "bits": 2, MODULE: {"bits": 8}}, (8, 64)),
        ({"group_size": 64, "bits": 2, MODULE: {"group_size": 32}}, (4, 32)),
        ({"group_size": 64, "bits": 5, MODULE: True}, (5, 64)),
        ({"group_size": 64, "bits": 5, "model.layers.0.mlp.down_proj": {"bits": 8}}, (5, 64)),
    ],
)
def test_bits_of_a_module(section, made):
    """Its own section counts, and what this does not say is MLX's default, not the model's."""
    stored, expected = affine((6, 128), *made)
    check(stored, section, expected)


def test_bits_of_the_copy_alone():
    """`quantization_config` without a method."""
    stored, expected = affine((6, 128), 3, 64)
    check_decoding(stored, {"group_size": 64, "bits": 3}, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged(dtype, tmp_path):
    """Linear layers of different bits, a stack of experts, a head, and a bias."""
    kind, section = DTYPES[dtype], {"group_size": 64, "bits": 4, "mode": "affine"}
    bias = {f"{MODULE}.bias": torch.randn(32).to(kind)}
    stored, expected = dict(bias), dict(bias)
    experts = "model.layers.1.mlp.switch_mlp.gate_proj"
    shapes = {MODULE: ((32, 64), 4), "model.layers.0.mlp.down_proj": ((64, 128), 6), experts: ((3, 8, 64), 4)}
    for name, (shape, bits) in shapes.items():
        tensors, expected[f"{name}.weight"] = affine(shape, bits, 64, kind, name=name)
        stored |= tensors
    section["model.layers.0.mlp.down_proj"] = {"group_size": 64, "bits": 6}
    receipt = check_merging(tmp_path, stored, section, expected, quantization=section, dtype=dtype)
    assert receipt["base_semantics"] == "stored in MLX, 6 bit, block size 64"
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()


def quantized_model(path, tied):
    """(folder, its values): a quantized embedding and head."""
    stored, values = affine((16, 64), 4, 64, name="model.embed_tokens")
    values = {EMBEDDING: values}
    if not tied:
        head, values["lm_head.weight"] = affine((16, 64), 8, 64, name="lm_head")
        stored |= head
    layer, values[WEIGHT] = affine((32, 64), 4, 64)
    section = {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16}
    config |= {"tie_word_embeddings": tied, "dtype": "bfloat16", "hidden_size": 64}
    return write_checkpoint(path, stored | layer, config=config | {"quantization": section}), values


@pytest.mark.parametrize("tied", [True, False])
def test_an_mlx_adapter(tied, tmp_path):
    """Of MLX-LM, on a linear layer and on the embedding, which a tied head shares."""
    path, values = quantized_model(tmp_path / "ckpt", tied)
    factors = {
        f"{MODULE}.lora_a": torch.randn(64, 2) * 0.3,
        f"{MODULE}.lora_b": torch.randn(2, 32) * 0.3,
        "model.embed_tokens.lora_a": torch.randn(16, 2) * 0.3,
        "model.embed_tokens.lora_b": torch.randn(2, 64) * 0.3,
    }
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0}}
    write_json(tmp_path / "adapter" / "adapter_config.json", fields)
    lorafuse.convert(path, tmp_path / "adapter", tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == values.keys()
    deltas = {
        WEIGHT: (factors[f"{MODULE}.lora_a"] @ factors[f"{MODULE}.lora_b"]).T,
        EMBEDDING: factors["model.embed_tokens.lora_a"] @ factors["model.embed_tokens.lora_b"],
    }
    for name, delta in deltas.items():
        wanted = values[name].float() + 2 * delta
        assert torch.allclose(made[name].float(), wanted, rtol=0.01, atol=0.01), name
    assert tied or same_bits(made["lm_head.weight"], values["lm_head.weight"])
    assert lorafuse.inspect(path)["problems"] == []


def test_a_peft_adapter_on_an_embedding(tmp_path):
    """PEFT leaves the tied head as it was; the result stores it apart, decoded."""
    path, values = quantized_model(tmp_path / "ckpt", True)
    key = "base_model.model.model.embed_tokens"
    A, B = torch.randn(2, 16), torch.randn(64, 2)
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B},
        r=2,
        lora_alpha=2,
        target_modules=["embed_tokens"],
    )
    lorafuse.convert(path, adapter, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.allclose(
        made[EMBEDDING].float(), values[EMBEDDING].float() + (B @ A).T, rtol=0.01, atol=0.02
    )
    assert same_bits(made["lm_head.weight"], values[EMBEDDING])


def u32(*shape):
    return torch.zeros(shape, dtype=torch.int32).view(torch.uint32)


SECTION = {"group_size": 64, "bits": 4}
DAMAGED = {
    "no scales": ({"scales": None}, SECTION, WEIGHT),
    "no codes": ({"weight": None}, SECTION, f"{MODULE}.biases"),
    "no biases": ({"biases": None}, SECTION, f"{MODULE}.scales"),
    "biases of another shape": ({"biases": torch.zeros(8, 1).bfloat16()}, SECTION, f"{MODULE}.scales"),
    "biases of another dtype": ({"biases": torch.zeros(8, 2).half()}, SECTION, f"{MODULE}.scales"),
    "scales of another shape": ({"scales": torch.zeros(7, 2).bfloat16()}, SECTION, f"{MODULE}.scales"),
    "scales of another dtype": ({"scales": torch.zeros(8, 2).int()}, SECTION, f"{MODULE}.scales"),
    "codes of another dtype": ({"weight": torch.zeros(8, 16).int()}, SECTION, f"{MODULE}.scales"),
    "no columns": ({"weight": u32(8, 0)}, SECTION, f"{MODULE}.scales"),
    "codes of another shape": (
        {"weight": u32(8, 17)},
        SECTION,
        f"{WEIGHT}: config.json says affine, 4 bit in groups of 64; U32 [8, 17] with scales BF16 [8, 2]",
    ),
    "no section": ({}, None, f"{WEIGHT}: its tensors are those of MLX, and config.json has no section"),
    "another mode": ({}, SECTION | {"mode": "nf4"}, f"{WEIGHT}: MLX's mode nf4 is not read, only affine"),
    "a mode that is no text": ({}, SECTION | {"mode": []}, f"{WEIGHT}: MLX's mode [] is not read"),
    "a mode without biases": ({}, {"mode": "mxfp4"}, f"{WEIGHT}: config.json says mxfp4"),
    "7 bit": ({}, SECTION | {"bits": 7}, f"{WEIGHT}: 7 bit in groups of 64 are not read."),
    "bits that are no number": ({}, SECTION | {"bits": "4"}, f"{WEIGHT}: 4 bit in groups of 64"),
    "groups of another size": ({}, SECTION | {"group_size": 32}, f"{WEIGHT}: config.json says affine"),
    "a further scale": ({"global_scale": torch.ones(1)}, SECTION, f"{MODULE}.global_scale is not read."),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case):
    changes, section, text = DAMAGED[case]
    stored = affine((8, 128), 4, 64)[0]
    stored |= {f"{MODULE}.{name}": tensor for name, tensor in changes.items()}
    present = {name: tensor for name, tensor in stored.items() if tensor is not None}
    assert text in refusal(present, section, quantization=section)


@pytest.mark.parametrize(("section", "scheme", "numel"), [(SECTION, "MLX, 4 bit, block size 64", 8 * 128),
                                                          (None, "MLX", 8 * 16)])  # fmt: skip
def test_inspected_by_its_headers(section, scheme, numel, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.inspection.checkpoint.open_weights", lambda ckpt: {})
    config = {"model_type": "llama", "quantization": section}
    path = write_checkpoint(tmp_path / "ckpt", affine((8, 128), 4, 64)[0], config=config)
    (row,) = lorafuse.inspect(path)["storage"]
    assert (row["scheme"], row["n_parameters"]) == (scheme, numel)
