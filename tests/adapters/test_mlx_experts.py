"""MLX-LM's LoRA on stacks of experts, `switch_mlp`, against the forward pass of its layer, written here."""

import pytest
import torch
from build import write_checkpoint, write_json
from packing import stream
from safetensors.torch import load_file, save_file

import lorafuse

MODULE = "model.layers.0.mlp.switch_mlp.gate_proj"
WEIGHT = f"{MODULE}.weight"
N_EXPERTS, N_OUT, N_IN, RANK, SCALE = 3, 8, 64, 2, 1.5


def checkpoint(path, *, quantized):
    """(folder of a stack beside a dense weight, the stack's values)."""
    dense = {"model.embed_tokens.weight": torch.randn(8, N_IN)}
    config = {"model_type": "qwen3_moe", "vocab_size": 8, "dtype": "float32"}
    if not quantized:
        values = torch.randn(N_EXPERTS, N_OUT, N_IN)
        return write_checkpoint(path, dense | {WEIGHT: values}, config=config), values
    codes = torch.randint(0, 16, (N_EXPERTS, N_OUT, N_IN))
    scales, biases = torch.rand(N_EXPERTS, N_OUT, 1), torch.randn(N_EXPERTS, N_OUT, 1)
    stored = {
        WEIGHT: stream(codes.view(-1, N_IN), 4).view(torch.uint32).view(N_EXPERTS, N_OUT, -1),
        f"{MODULE}.scales": scales,
        f"{MODULE}.biases": biases,
    }
    config["quantization"] = {"group_size": 64, "bits": 4}
    return write_checkpoint(path, dense | stored, config=config), codes * scales + biases


def adapter(path, a, b):
    path.mkdir()
    save_file({f"{MODULE}.lora_a": a, f"{MODULE}.lora_b": b}, path / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": RANK, "scale": SCALE}}
    write_json(path / "adapter_config.json", fields)
    return path


@pytest.mark.parametrize("quantized", [True, False])
def test_the_merged_stack_answers_as_mlx_computes(quantized, tmp_path):
    """y = W[e] x + scale · lora_b[e] (z, those of lora_a x that are of expert e)."""
    path, values = checkpoint(tmp_path / "ckpt", quantized=quantized)
    a, b = torch.randn(RANK * N_EXPERTS, N_IN), torch.randn(N_EXPERTS, N_OUT, RANK)
    lorafuse.convert(path, adapter(tmp_path / "adapter", a, b), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")[WEIGHT]
    assert made.shape == values.shape
    for x in torch.randn(5, N_IN).double():
        of_experts = (x @ a.double().T).reshape(N_EXPERTS, RANK)
        for expert in range(N_EXPERTS):
            wanted = values[expert].double() @ x + SCALE * (b[expert].double() @ of_experts[expert])
            assert torch.allclose(made[expert].double() @ x, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ((6, 64), (3, 9, 2), f"{MODULE}.lora_b [3, 9, 2] does not fit {WEIGHT} [3, 8, 64]"),
        ((8, 64), (4, 8, 2), f"{MODULE}.lora_b [4, 8, 2] does not fit"),
        ((6, 32), (3, 8, 2), f"{MODULE}.lora_b [3, 8, 2] does not fit"),
        ((5, 64), (3, 8, 2), "they are not the two factors of one update of stacked experts"),
        ((0, 64), (0, 8, 2), "they are not the two factors of one update of stacked experts"),
    ],
)
def test_other_shapes(a, b, text, tmp_path):
    path, _ = checkpoint(tmp_path / "ckpt", quantized=False)
    lora = adapter(tmp_path / "adapter", torch.ones(a), torch.ones(b))
    with pytest.raises(lorafuse.AdapterError) as caught:
        lorafuse.convert(path, lora, tmp_path / "out")
    assert text in str(caught.value)
