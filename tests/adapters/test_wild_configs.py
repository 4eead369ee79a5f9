"""Thirty adapter configs out of public repositories, with neutral names of base models (wild_configs.json).

Each gets an adapter for the modules that PEFT itself finds by it, and is merged to the float64 formula, or
refused with exact text.
"""

import json
from pathlib import Path

import build
import pytest
import torch
from mlx_adapters import factors
from mlx_adapters import truth as mlx_truth
from oracle import complaints, truth
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file

import lorafuse
from lorafuse.errors import AdapterError

WILD = [
    json.loads(line.rstrip(","))
    for line in (Path(__file__).parent / "wild_configs.json").read_text().splitlines()[1:-1]
]
HIDDEN, WIDE = 16, 24

ATTENTION = [f"self_attn.{p}_proj" for p in "qkvo"]
GATED = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
CLIP = [*ATTENTION[:3], "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
GLM = ["query_key_value", "dense"]
LINEAR_ATTENTION = [
    f"linear_attn.{p}" for p in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
]
QWEN_VISION = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
# model_type → {where layers lie: their modules}, as the checkpoints on the hub name them; layer 31 is that of
# the dotted targets.
ARCHITECTURES = {
    "llama": {"model.layers.0": GATED, "model.layers.31": GATED},
    "baichuan": {"model.layers.0": ["self_attn.W_pack", "self_attn.o_proj", *GATED[4:]]},
    "chatglm": {
        "transformer.layers.0": [*(f"attention.{m}" for m in GLM), "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    },
    "glm4": {
        "transformer.encoder.layers.0": [
            *(f"self_attention.{m}" for m in GLM),
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ]
    },
    "dinov3": {"blocks.0": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]},
    "gemma3": {"language_model.model.layers.0": GATED, "vision_tower.vision_model.encoder.layers.0": CLIP},
    "gemma4": {"model.language_model.layers.0": GATED, "model.vision_tower.encoder.layers.0": GATED},
    "llava": {"language_model.model.layers.0": GATED, "vision_tower.vision_model.encoder.layers.0": CLIP},
    "qwen2_5_vl": {"model.layers.0": GATED, "visual.blocks.0": QWEN_VISION},
    "qwen3_vl": {
        "model.language_model.layers.0": GATED,
        "model.visual.blocks.0": ["attn.qkv", "attn.proj", "mlp.linear_fc1"],
    },
    "qwen3_5": {
        "model.language_model.layers.0": [*LINEAR_ATTENTION, *GATED[4:]],
        "model.language_model.layers.3": GATED,
    },
    "smolvlm": {
        "model.text_model.layers.0": GATED,
        "model.vision_model.encoder.layers.0": CLIP,
        "model.connector": ["proj"],
    },
    "whisper": {f"model.{part}.layers.0": [*CLIP[:4], "fc1", "fc2"] for part in ("encoder", "decoder")},
    "unet": {
        "down_blocks.0.attentions.0": [
            "proj_in",
            "proj_out",
            *(f"transformer_blocks.0.attn1.to_{p}" for p in ("q", "k", "v", "out.0")),
        ]
    },
}
# Models of which transformers 5 renames modules on loading, and how: adapters have the new names.
RENAMED = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "visual.": "model.visual.",
    "model.layers.": "model.language_model.layers.",
}
NOT_PEFT = "CONFIG: has no peft_type; it was written neither by PEFT nor by MLX-LM."


def write_base(path, architecture):
    """A checkpoint with the modules of an architecture, square and not, and {module: its name in memory}."""
    generator = torch.Generator().manual_seed(4)
    layers = ARCHITECTURES[architecture]
    modules = [f"{layer}.{module}" for layer, names in layers.items() for module in names]
    shapes = {
        name: (WIDE, HIDDEN)
        if any(p in name for p in ("up", "gate", "fc1", "to_4h", "qkv"))
        else (HIDDEN,) * 2
        for name in modules
    }
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }
    config = {
        "model_type": architecture,
        "architectures": [RENAMED.get(architecture, "ForCausalLM")],
        "torch_dtype": "bfloat16",
    }
    build.write_checkpoint(path, tensors, config=config)
    return {name: in_memory(name) if architecture in RENAMED else name for name in modules}, shapes


def in_memory(name):
    old = next(prefix for prefix in IN_MEMORY if name.startswith(prefix))
    return IN_MEMORY[old] + name.removeprefix(old)


def write_config(path, wild):
    path.mkdir()
    text = json.dumps(wild["config"], indent=2)
    (path / "adapter_config.json").write_bytes(
        (text.replace("\n", "\r\n") if wild.get("crlf") else text).encode()
    )


def lora_tensors(named, shapes, rank):
    """lora_A and lora_B for modules, with the names that `named` gives them."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, name in named.items():
        n_out, n_in = shapes[module]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = (
            torch.randn(n_out, rank, generator=generator) * 0.1
        )
    return tensors


def is_peft(wild):
    return "peft_type" in wild["config"]


def test_the_sample_is_what_it_should_be():
    assert len(WILD) == 30
    assert sum(map(is_peft, WILD)) == 28
    assert sum(wild.get("crlf", False) for wild in WILD) == 2


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("wild", filter(is_peft, WILD), ids=lambda wild: wild["architecture"])
def test_a_config_of_peft(wild, tmp_path):
    named, shapes = write_base(tmp_path / "ckpt", wild["architecture"])
    write_config(tmp_path / "lora", wild)
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    targeted = {module: name for module, name in named.items() if check_target_module_exists(config, name)}
    assert targeted
    tensors, magnitudes = lora_tensors(targeted, shapes, config.r), {}
    if config.use_dora:
        magnitudes = {
            module: torch.rand(shapes[module][0], generator=torch.Generator().manual_seed(6)) + 1
            for module in targeted
        }
        tensors |= {
            f"base_model.model.{targeted[module]}.lora_magnitude_vector": m
            for module, m in magnitudes.items()
        }
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    lorafuse.convert(tmp_path / "ckpt", tmp_path / "lora", tmp_path / "out")
    write_config(tmp_path / "as_stored", wild)
    save_file(
        lora_tensors({m: m for m in targeted}, shapes, config.r),
        tmp_path / "as_stored/adapter_model.safetensors",
    )
    wanted = truth(tmp_path / "ckpt", tmp_path / "as_stored")
    for module, m in magnitudes.items():  # DoRA: rows scaled to these lengths
        w = wanted[f"{module}.weight"]
        scale = m.double()[:, None] / torch.linalg.vector_norm(w.value, dim=1, keepdim=True)
        w.value, w.slack = w.value * scale, (w.slack + 2.0**-21 * w.value.abs()) * scale
    assert complaints(tmp_path / "out", wanted) == []


def assert_refused(tmp_path, says):
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(tmp_path / "ckpt", tmp_path / "lora", tmp_path / "out")
    assert str(caught.value) == says.replace("CONFIG", f"{tmp_path}/lora/adapter_config.json")
    assert not (tmp_path / "out").exists()


def test_the_config_of_mlx(tmp_path):
    (wild,) = [wild for wild in WILD if "fine_tune_type" in wild["config"]]
    _, shapes = write_base(tmp_path / "ckpt", wild["architecture"])
    write_config(tmp_path / "lora", wild)
    parameters = wild["config"]["lora_parameters"]
    targeted = {
        name: shape[::-1] for name, shape in shapes.items() if name.split(".", 3)[3] in parameters["keys"]
    }
    tensors = factors(targeted)
    save_file(tensors, tmp_path / "lora/adapters.safetensors")
    lorafuse.convert(tmp_path / "ckpt", tmp_path / "lora", tmp_path / "out")
    assert len(targeted) == 8
    assert complaints(tmp_path / "out", mlx_truth(tmp_path / "ckpt", tensors, parameters["scale"])) == []


def test_the_config_of_another_library(tmp_path):
    (wild,) = [wild for wild in WILD if wild["architecture"] == "jax"]
    named, shapes = write_base(tmp_path / "ckpt", "llama")
    write_config(tmp_path / "lora", wild)
    save_file(lora_tensors(named, shapes, 4), tmp_path / "lora/adapter_model.safetensors")
    assert_refused(tmp_path, NOT_PEFT)
