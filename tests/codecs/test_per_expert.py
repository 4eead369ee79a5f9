"""gpt-oss as Unsloth's bitsandbytes copies store it: the output has transformers' own names, values and
layout."""

import json

import bitsandbytes.functional as bnb
import build
import pytest
import torch
from models import spread
from moe_models import MODELS, load
from quantized import write
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.codecs import open_weights
from lorafuse.errors import CheckpointError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder

KINDS = {
    "dense": None,
    "nf4": {"quant_type": "nf4"},
    "fp4 nested": {"quant_type": "fp4", "compress_statistics": True},
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """The checkpoint as transformers writes it."""
    path = tmp_path_factory.mktemp("gpt-oss") / "fused"
    torch.manual_seed(0)
    spread(MODELS["gpt_oss"]().bfloat16()).save_pretrained(path)
    return path


def one_by_one(path, out, settings):
    """Writes Unsloth's layout. Returns what it decodes to, under transformers' names."""
    stored, decoded = {}, load_file(path / "model.safetensors")
    for name, tensor in list(decoded.items()):
        stem, _, leaf = name.rpartition(".")
        if "experts" not in name:
            stored[name.replace("router.", "router.linear.")] = tensor
            continue
        kind = "gate_up_projs" if "gate_up" in leaf else "down_projs"
        for expert, matrix in enumerate(tensor):
            own = f"{stem}.{kind}.{expert}.{'bias' if 'bias' in leaf else 'weight'}"
            if settings is None or matrix.dim() == 1:
                stored[own] = matrix.clone() if matrix.dim() == 1 else matrix.T.contiguous()
                continue
            packed, state = bnb.quantize_4bit(matrix.T.contiguous(), blocksize=64, **settings)
            stored |= {own: packed} | {f"{own}.{k}": v for k, v in state.as_dict(packed=True).items()}
            tensor[expert] = bnb.dequantize_4bit(packed, state).T
    out.mkdir()
    config = json.loads((path / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    build.write_json(out / "config.json", config)
    save_file(stored, out / "model.safetensors")
    return decoded


def attention_adapter(path):
    generator = torch.Generator().manual_seed(3)
    module = "base_model.model.model.layers.1.self_attn.o_proj"
    return build.write_adapter(
        path,
        {
            f"{module}.lora_A.weight": torch.randn(4, 32, generator=generator),
            f"{module}.lora_B.weight": torch.randn(32, 4, generator=generator),
        },
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_has_the_stacks(kind, fused, tmp_path):
    """All names and values are those of the fused checkpoint; transformers loads every one of them."""
    decoded = one_by_one(fused, tmp_path / "ckpt", KINDS[kind])
    adapter = attention_adapter(tmp_path / "adapter")
    lorafuse.convert(tmp_path / "ckpt", adapter, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    changed = "model.layers.1.self_attn.o_proj.weight"
    assert made.keys() == decoded.keys()
    for name, tensor in decoded.items():
        assert torch.equal(made[name], tensor) == (name != changed), name
    load(tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    lorafuse.verify(tmp_path / "out", ckpt=tmp_path / "ckpt", adapters=[adapter])
    facts = lorafuse.inspect(tmp_path / "ckpt")
    assert facts["problems"] == [] and facts["n_weights"] == len(decoded)
    assert facts["n_parameters"] == sum(tensor.numel() for tensor in decoded.values())


def test_tiles_across_experts_and_widths(tmp_path, monkeypatch):
    """Tiles of any size, windows of few columns: the same values."""
    from lorafuse.codecs import conv1d
    from lorafuse.planning import plan

    torch.manual_seed(1)
    matrices = [torch.randn(48, 200).bfloat16() for _ in range(5)]
    stored = {f"m.experts.down_projs.{n}.weight": matrix for n, matrix in enumerate(matrices)}
    stored |= {f"m.experts.down_projs.{n}.bias": matrix[:, 0].clone() for n, matrix in enumerate(matrices)}
    path = write(tmp_path / "ckpt", stored, model_type="gpt_oss")
    adapter = build.write_adapter(
        tmp_path / "adapter",
        {
            "base_model.model.m.experts.down_projs.1.lora_A.weight": torch.ones(1, 200),
            "base_model.model.m.experts.down_projs.1.lora_B.weight": torch.zeros(48, 1),
        },
    )
    for number, (tile, window) in enumerate([(1 << 19, 1 << 24), (700, 10_000), (48 * 333, 20_000)]):
        monkeypatch.setattr(plan, "TILE_NUMEL", tile)
        monkeypatch.setattr(conv1d, "WINDOWS_NBYTES", window)
        out = tmp_path / f"out{number}"
        lorafuse.convert(path, adapter, out)
        made = load_file(out / "model.safetensors")
        assert torch.equal(made["m.experts.down_proj"], torch.stack([m.T for m in matrices]))
        assert torch.equal(made["m.experts.down_proj_bias"], torch.stack([m[:, 0] for m in matrices]))


PROJ = "m.experts.gate_up_projs"
STACK = "m.experts.gate_up_proj"
BROKEN = {
    "a gap": (
        {f"{PROJ}.0.weight": (2, 4), f"{PROJ}.2.weight": (2, 4)},
        {},
        f"{STACK} is made from {PROJ}.0.weight and others, but that of expert 1 is missing.",
    ),
    "too few": (
        {f"{PROJ}.0.weight": (2, 4)},
        {"num_local_experts": 2},
        f"{STACK} is made from 1 experts, but num_local_experts in config.json is 2.",
    ),
    "another shape": (
        {f"{PROJ}.0.weight": (2, 4), f"{PROJ}.1.weight": (4, 2)},
        {},
        f"{STACK} cannot be made from {PROJ}.0.weight, which is F32 [2, 4], and {PROJ}.1.weight, which is "
        "F32 [4, 2].",
    ),
    "twice": (
        {f"{PROJ}.0.weight": (2, 4), STACK: (1, 4, 2)},
        {},
        f"{STACK} is stored in two ways.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_stacks_are_refused(case, tmp_path):
    shapes, config, text = BROKEN[case]
    stored = {name: torch.zeros(shape) for name, shape in shapes.items()}
    path = write(tmp_path / "ckpt", stored, model_type="gpt_oss", **config)
    with pytest.raises(CheckpointError) as caught:
        open_weights(Checkpoint(LocalFolder(path)))
    assert str(caught.value) == f"{path}: {text}"


def test_other_models_keep_their_names(tmp_path):
    """The layout is gpt-oss': elsewhere nothing says what the stacks would be."""
    path = write(tmp_path / "ckpt", {f"{PROJ}.0.weight": torch.zeros(2, 4)}, model_type="mixtral")
    assert set(open_weights(Checkpoint(LocalFolder(path)))) == {f"{PROJ}.0.weight"}
