"""What `lorafuse verify` says of a merge that another tool made."""

import json
import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
from click.testing import CliRunner
from models import LINEARS
from oracle import decode, read_tensors
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse import cli

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def merge(base, adapter, tmp_path):
    """A function (kind of base, dtype) → (checkpoint, adapter, merged directory as another tool leaves it: no
    receipt)."""

    def make(kind, dtype="bfloat16"):
        lora = adapter(kind, target_modules=LINEARS)
        lorafuse.convert(base(kind), lora, tmp_path / "out", dtype=dtype)
        (tmp_path / "out/lorafuse_receipt.json").unlink()
        return base(kind), lora, tmp_path / "out"

    return make


def change(out, **tensors):
    stored = load_file(out / "model.safetensors")
    save_file(stored | tensors, out / "model.safetensors", metadata={"format": "pt"})


def relations(ckpt, lora, out):
    return lorafuse.verify(out, ckpt=ckpt, adapters=[lora])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4_dq", "fp4_dq", "int8", "bf16", "gpt2"])
def test_a_merge_that_rounded_once(kind, dtype, merge, base, adapter, tmp_path):
    if kind == "gpt2":
        lora = adapter(kind, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        lorafuse.convert(base(kind), lora, tmp_path / "out", dtype=dtype)
        (tmp_path / "out/lorafuse_receipt.json").unlink()
        found = relations(base(kind), lora, tmp_path / "out")
    else:
        found = relations(*merge(kind, dtype))
    assert found["relations"] == {"equal": len(found["related"])}


def test_a_second_rounding(merge):
    """Merged in fp16, then saved as bf16: every element is at most two roundings away."""
    ckpt, lora, out = merge("nf4_dq", "float32")
    stored = load_file(out / "model.safetensors")
    change(out, **{WEIGHT: stored[WEIGHT].bfloat16().to(torch.float16) * (1 + 2**-9)})
    found = relations(ckpt, lora, out)
    assert found["related"][WEIGHT]["relation"] == "rounded twice"
    assert found["relations"] == {"equal": len(found["related"]) - 1, "rounded twice": 1}


def test_a_weight_that_was_forgotten(merge):
    """The base without its update: kept is 0 but for rounding."""
    ckpt, lora, out = merge("nf4_dq")
    change(out, **{WEIGHT: decode(ckpt)[WEIGHT][0].bfloat16()})
    found = relations(ckpt, lora, out)["related"]
    assert (
        next(iter(found)) == WEIGHT
        and found[WEIGHT]["relation"] == "untouched"
        and abs(found[WEIGHT]["kept"]) < 1e-9
    )


@pytest.mark.parametrize(
    ("kind", "quant"), [("nf4_dq", "nf4"), ("nf4", "nf4"), ("fp4_dq", "fp4"), ("bf16", "nf4")]
)
def test_a_merge_that_was_quantized_again(kind, quant, merge):
    """As by PEFT into a 4-bit model, or by a merge that was saved in 4 bits and dequantized later."""
    ckpt, lora, out = merge(kind, "float32")
    double = kind.endswith("dq")
    packed, state = bnb.quantize_4bit(
        load_file(out / "model.safetensors")[WEIGHT], quant_type=quant, compress_statistics=double
    )
    change(out, **{WEIGHT: bnb.dequantize_4bit(packed, state).bfloat16()})
    found = relations(ckpt, lora, out)
    assert found["related"][WEIGHT]["relation"] == "requantized"
    assert found["relations"] == {"equal": len(found["related"]) - 1, "requantized": 1}


def test_a_directory_that_is_still_quantized(merge, base):
    """PEFT's merge into a 4-bit model, saved as it is."""
    ckpt, lora, _ = merge("nf4_dq")
    found = relations(ckpt, lora, base("nf4_dq"))  # the base itself: quantized, and without any update
    assert set(found["relations"]) == {"equal", "untouched"}
    assert {name for name, facts in found["related"].items() if facts["relation"] == "untouched"} == {
        name for name in read_tensors(ckpt) if name.endswith("_proj.weight")
    }


def test_noise_and_other_shapes(merge):
    ckpt, lora, out = merge("nf4_dq")
    stored = load_file(out / "model.safetensors")
    torch.manual_seed(0)
    other = "model.layers.1.mlp.up_proj.weight"
    change(
        out,
        **{
            WEIGHT: stored[WEIGHT] + torch.randn(stored[WEIGHT].shape) * 0.05,
            other: stored[other][:-1].clone(),
        },
    )
    found = relations(ckpt, lora, out)
    assert list(found["related"])[:2] == [other, WEIGHT], "the worst come first"
    assert found["relations"] == {"equal": len(found["related"]) - 2, "unrelated": 1, "missing": 1}


def test_the_figures_are_those_of_the_files(merge):
    """kept and noise in float64, from the files alone."""
    ckpt, lora, out = merge("nf4_dq")
    facts = relations(ckpt, lora, out)["related"][WEIGHT]
    factors = load_file(lora / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{WEIGHT[:-7]}.lora_{x}.weight"].double() for x in "AB")
    W, S, D = decode(ckpt)[WEIGHT][0], load_file(out / "model.safetensors")[WEIGHT].double(), 2 * B @ A
    assert facts["kept"] == pytest.approx(((S - W) * D).sum().item() / (D * D).sum().item(), rel=1e-4)
    assert facts["noise"] == pytest.approx(((S - W - D).norm() / D.norm()).item(), rel=1e-3)


def test_the_command(merge):
    ckpt, lora, out = merge("nf4_dq")
    arguments = [str(out), "--ckpt", str(ckpt), "--adapter", str(lora)]
    result = CliRunner().invoke(cli.verify, arguments)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "    35 equal          base + update, rounded once"
    change(out, **{WEIGHT: decode(ckpt)[WEIGHT][0].bfloat16()})
    result = CliRunner().invoke(cli.verify, arguments)
    assert result.exit_code == 8
    assert result.stdout.splitlines()[:2] == [
        "    34 equal          base + update, rounded once",
        "     1 untouched      the base without its update",
    ]
    assert result.stdout.splitlines()[2].startswith(f"untouched      {WEIGHT}  kept ")
    assert result.stderr.endswith(f"Error: {out}: 1 of 35 weights are not base + update.\n")
    found = json.loads(CliRunner().invoke(cli.verify, [*arguments, "--json"]).stdout)
    assert (
        found["relations"] == {"equal": 34, "untouched": 1}
        and found["related"][WEIGHT]["relation"] == "untouched"
    )


def test_a_checkpoint_that_is_broken(merge, tmp_path):
    ckpt, lora, out = merge("nf4_dq")
    shutil.rmtree(out)
    out.mkdir()
    result = CliRunner().invoke(cli.verify, [str(out), "--ckpt", str(ckpt), "--adapter", str(lora)])
    assert result.exit_code == 3 and "Traceback" not in result.output


def without_head(out):
    """As a program that ties embeddings saves it."""
    kept = {name: t for name, t in load_file(out / "model.safetensors").items() if name != "lm_head.weight"}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(("targets", "relation"), [(["q_proj"], "equal"), (["lm_head"], "untouched")])
def test_a_tied_head_that_is_not_stored_is_the_embedding(targets, relation, base, adapter, tmp_path):
    """The checkpoint stores both; the second update is the head's alone, and is lost with it."""
    ckpt = tmp_path / "ckpt"
    shutil.copytree(base("fp32_tied"), ckpt)
    stored = load_file(ckpt / "model.safetensors")
    head = {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(stored | head, ckpt / "model.safetensors", metadata={"format": "pt"})
    lora = adapter("fp32_tied", target_modules=targets)
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    (tmp_path / "out/lorafuse_receipt.json").unlink()
    without_head(tmp_path / "out")
    found = relations(ckpt, lora, tmp_path / "out")["related"]
    assert found["lm_head.weight"]["relation"] == relation
    assert {facts["relation"] for name, facts in found.items() if name != "lm_head.weight"} == {"equal"}
