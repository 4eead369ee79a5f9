"""A base that training saw quantized, stored on its own grid by a run on a GPU: bitsandbytes' kernels make
what the sums start from, the host makes what is stored. Kernels and host agree bit for bit on a CPU, where
the same code is run here."""

from threading import get_ident

import pytest
import torch
from late_device import LateDevice, same_figures
from safetensors.torch import load_file

import lorafuse
from lorafuse.arithmetic.arena import Arena
from lorafuse.trained_base.on_gpu import ByKernels

LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "lora", "options"),
    [
        ("bf16", LLAMA, {"base_quant": "nf4", "format": "base"}),
        ("bf16", LLAMA, {"base_quant": "fp4", "double_quant": False, "format": "light"}),
        ("bf16_odd", LLAMA, {"base_quant": "int8", "format": "base"}),
        ("gpt2_bf16", GPT2, {"base_quant": "nf4", "format": "base"}),
        ("gpt2_bf16", GPT2, {"base_quant": "int8", "format": "base", "rounding": "nearest"}),
    ],
)
def test_bytes_are_those_of_the_host(kind, lora, options, base, adapter, tmp_path, monkeypatch):
    inputs = base(kind), adapter(kind, **lora)
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 1 << 11)  # several tiles to a weight
    of_host = lorafuse.convert(*inputs, tmp_path / "host", **options)
    LateDevice().installed(monkeypatch)
    by_kernels, unfinished = [], {}  # by the thread that makes it: a weight
    quantized, decode, settle = ByKernels._quantized, ByKernels.decode, Arena.settle

    def made(sources, weight):
        by_kernels.append(1)
        unfinished[get_ident()] = sources
        return quantized(sources, weight)

    def decoded(sources, *args):  # by any worker: whoever made the weight has waited for it
        assert sources not in unfinished.values()
        return decode(sources, *args)

    monkeypatch.setattr(ByKernels, "_quantized", made)
    monkeypatch.setattr(ByKernels, "decode", decoded)
    monkeypatch.setattr(Arena, "settle", lambda arena: settle(arena) or unfinished.pop(get_ident(), None))
    of_gpu = lorafuse.convert(*inputs, tmp_path / "gpu", **options)
    found, expected = stored(tmp_path / "gpu"), stored(tmp_path / "host")
    assert found.keys() == expected.keys() and by_kernels
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), found[name].view(-1).view(torch.uint8)), name
    same_figures(of_gpu, of_host)
