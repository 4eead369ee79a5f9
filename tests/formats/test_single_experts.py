"""`--format base` and `mixed` of gpt-oss with Unsloth's names of single experts: in an adapter, onto stacks
in MXFP4; and in a base, whose experts bitsandbytes quantized one by one."""

import json

import bitsandbytes.functional as bnb
import own_grid
import pytest
import torch
from build import write_adapter
from quantized_base import write
from safetensors.torch import load_file
from small_floats import E2M1, E8M0

import lorafuse
from lorafuse.errors import UsageError

EXPERTS = "model.layers.0.mlp.experts"
N, IN, OUT = 3, 64, 12
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": N, "vocab_size": 8}
KINDS = {"gate_up": (OUT, IN), "down": (IN, IN)}  # (out, in)


def single(root, kinds=KINDS, experts=range(N)):
    """An adapter of single experts, of which some elements move far."""
    tensors = {}
    for kind in kinds:
        n_out, n_in = KINDS[kind]
        for expert in experts:
            key = f"base_model.model.{EXPERTS}.{kind}_projs.{expert}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, n_in) * torch.logspace(-3, 0, n_in)
            tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, 2) * 0.1
    return write_adapter(root / "adapter", tensors, r=2, lora_alpha=2)


def packed_stacks():
    stored = {}
    for kind, (n_out, n_in) in KINDS.items():
        stored[f"{EXPERTS}.{kind}_proj_blocks"] = torch.randint(
            0, 256, (N, n_out, n_in // 32, 16), dtype=torch.uint8
        )
        scales = torch.randint(118, 124, (N, n_out, n_in // 32), dtype=torch.uint8)
        stored[f"{EXPERTS}.{kind}_proj_scales"] = scales
        stored[f"{EXPERTS}.{kind}_proj_bias"] = torch.zeros(N, n_out).bfloat16()
    return stored


def mxfp4(root):
    dense = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16()}
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write(root / "ckpt", packed_stacks() | dense, section, **GPT_OSS)


def grid_of_stack(tensors, kind):
    """(codes [elements], values [elements, codes]) of a stack (experts, in, out) in MXFP4."""
    n_out, n_in = KINDS[kind]
    blocks, scales = (tensors[f"{EXPERTS}.{kind}_proj_{part}"].long() for part in ("blocks", "scales"))
    codes = torch.stack([blocks & 15, blocks >> 4], -1).view(N, n_out, n_in).transpose(1, 2).reshape(-1)
    of_each = E8M0[scales].repeat_interleave(32, 2).transpose(1, 2).reshape(-1, 1)
    return codes, (E2M1 * of_each).bfloat16().double()


def results(root, ckpt, adapter, **options):
    """(sums in fp32, what the base has, what was written, the receipt)."""
    lorafuse.convert(ckpt, adapter, root / "sums", dtype="float32")
    receipt = lorafuse.convert(ckpt, adapter, root / "out", **options)
    lorafuse.verify(root / "out", ckpt=ckpt, adapters=[adapter])
    return *(load_file(path / "model.safetensors") for path in (root / "sums", ckpt, root / "out")), receipt


@pytest.mark.parametrize("kinds", [["gate_up", "down"], ["down"]])
def test_names_of_single_experts_on_mxfp4(kinds, tmp_path):
    torch.manual_seed(1)
    ckpt, adapter = mxfp4(tmp_path), single(tmp_path, kinds, [0, 2])
    sums, was, found, receipt = results(tmp_path, ckpt, adapter, format="base")
    assert found.keys() == was.keys()
    for kind in KINDS:
        name = f"{EXPERTS}.{kind}_proj"
        (before, values), (after, _) = grid_of_stack(was, kind), grid_of_stack(found, kind)
        wanted = before
        if kind in kinds:
            draws = own_grid.uniform(name, len(before))
            wanted, _ = own_grid.rounded(before, values, sums[name].double().view(-1), draws)
            assert receipt["tensors"][name]["changed"] > 0
        assert torch.equal(values.gather(1, after[:, None]), values.gather(1, wanted[:, None]))
        assert torch.equal(found[f"{name}_scales"], was[f"{name}_scales"])


def test_mixed_of_mxfp4(tmp_path):
    torch.manual_seed(2)
    ckpt, adapter = mxfp4(tmp_path), single(tmp_path)
    sums, _, found, _ = results(tmp_path, ckpt, adapter, format="mixed")
    for kind in KINDS:
        name = f"{EXPERTS}.{kind}_proj"
        assert torch.equal(found[name], sums[name].bfloat16())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config  # nothing is quantized any more


def by_bitsandbytes(root, kind):
    """A base with a weight of its own for each expert."""
    stored = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16()}
    for proj, (n_out, n_in) in KINDS.items():
        for expert in range(N):
            name, matrix = f"{EXPERTS}.{proj}_projs.{expert}", torch.randn(n_out, n_in).bfloat16() * 0.1
            stored[f"{name}.bias"] = torch.zeros(n_out).bfloat16()
            if kind == "int8":
                q, scb, _ = bnb.int8_vectorwise_quant(matrix.half())
                stored |= {f"{name}.weight": q, f"{name}.SCB": scb}
                continue
            packed, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
            state = {f"{name}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            stored |= {f"{name}.weight": packed} | state
    section = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8"}
    return write(root / "ckpt", stored, section, **GPT_OSS)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("tile_numel", [1 << 18, 200])
def test_a_base_of_single_experts(kind, tile_numel, tmp_path, monkeypatch):
    """Names and companions are the base's; indexes are those of the stack (experts, in, out)."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", tile_numel)
    torch.manual_seed(3)
    ckpt, adapter = by_bitsandbytes(tmp_path, kind), single(tmp_path)
    sums, was, found, receipt = results(tmp_path, ckpt, adapter, format="base")
    assert found.keys() == was.keys()
    for proj, (n_out, n_in) in KINDS.items():
        stack = f"{EXPERTS}.{proj}_proj"
        names = [f"{EXPERTS}.{proj}_projs.{expert}.weight" for expert in range(N)]
        after = [own_grid.grid_of(found, name)[0] for name in names]
        turned = [
            [part.view(n_out, n_in, -1).transpose(0, 1).reshape(n_out * n_in, -1) for part in grid]
            for grid in (own_grid.grid_of(was, name) for name in names)
        ]
        before, values = (torch.cat(parts) for parts in zip(*turned, strict=True))
        made = torch.cat([codes.view(n_out, n_in).T.reshape(-1) for codes in after])
        draws = own_grid.uniform(stack, len(before))
        wanted, n_clipped = own_grid.rounded(before.view(-1), values, sums[stack].double().view(-1), draws)
        assert torch.equal(values.gather(1, made[:, None]), values.gather(1, wanted[:, None]))
        assert 0 < int((made != before.view(-1)).sum()) < len(made)
        assert receipt["tensors"][stack]["clipped"] == pytest.approx(n_clipped / len(made))
    for name in was:
        is_codes = "_projs." in name and name.endswith(".weight")
        assert is_codes or torch.equal(found[name], was[name]), name
    assert lorafuse.inspect(tmp_path / "out")["n_parameters"] == lorafuse.inspect(ckpt)["n_parameters"]


@pytest.mark.parametrize("options", [{"format": "mixed"}, {"format": "base", "keep_dense": ["*.down_proj"]}])
def test_no_stack_of_them_becomes_dense(options, tmp_path):
    """A reader of single experts knows no stacks."""
    ckpt, adapter = by_bitsandbytes(tmp_path, "nf4"), single(tmp_path)
    with pytest.raises(UsageError) as refused:
        lorafuse.convert(ckpt, adapter, tmp_path / "out", **options)
    assert str(refused.value) == (
        f"format='{options['format']}': {EXPERTS}.down_proj is made from several weights of the base, which "
        "keeps them apart, and would be dense as a whole: leave format out, or choose format='base' without "
        "keep_dense."
    )
