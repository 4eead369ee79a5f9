"""A table of merges that other tools make, right and wrong, of each base, size of update, rank and dtype:
what `lorafuse verify` calls each."""

import json
import re
from itertools import product
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from click.testing import CliRunner
from quantized import four_bit, write
from safetensors.torch import save_file

import lorafuse
from lorafuse import cli
from lorafuse.verification.relations import EXPLAINED, GOOD

SHAPE = (128, 256)
SIZES = (0.003, 0.03, 0.3)  # ‖Δ‖ / ‖W‖
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BASES = ("float32", "bfloat16", "float16", "nf4", "fp4", "int8")
QUANTIZED = BASES[3:]
FORGOTTEN = 16  # rows


class Case:
    """A weight of each size of update, in a checkpoint and an adapter on disk. Per name, in float64: `full`
    is the base before it was quantized, `base` as it is stored, `delta` the update."""

    def __init__(self, root, kind, rank):
        self.kind, self.root = kind, root
        self.ckpt, self.adapter = root / "ckpt", root / "adapter"
        self.full, self.base, self.delta = {}, {}, {}
        torch.manual_seed(0)
        tensors, factors = {}, {}
        for number, size in enumerate(SIZES):
            name = f"model.layers.{number}.self_attn.q_proj"
            dtype = DTYPES.get(kind, torch.float32 if kind == "int8" else torch.bfloat16)
            full = (torch.randn(SHAPE) * 0.05).to(dtype)
            stored, base = self._stored(name, full)
            A, B = torch.randn(rank, SHAPE[1]), torch.randn(SHAPE[0], rank)
            B *= size * full.float().norm() / (B @ A).norm()
            tensors |= stored
            prefix = f"base_model.model.{name}.lora_"
            factors |= {f"{prefix}A.weight": A, f"{prefix}B.weight": B}
            weight = f"{name}.weight"
            self.full[weight], self.base[weight] = full.double(), base.double()
            self.delta[weight] = B.double() @ A.double()
        self.norm = torch.randn(64).to(torch.bfloat16)
        config = {"quantization_config": {"quant_method": "bitsandbytes"}} if kind in QUANTIZED else {}
        write(self.ckpt, tensors | {"model.norm.weight": self.norm}, **config)
        self.adapter.mkdir()
        save_file(factors, self.adapter / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
        (self.adapter / "adapter_config.json").write_text(json.dumps(settings))

    def _stored(self, name, full):
        if self.kind == "int8":
            scale = full.abs().amax(1)
            codes = (full * 127 / scale[:, None]).round().to(torch.int8)
            marks = {f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
            return {f"{name}.weight": codes, f"{name}.SCB": scale, **marks}, codes * scale[:, None] / 127
        if self.kind in QUANTIZED:
            double = self.kind == "nf4"
            stored, decoded = four_bit(full, quant_type=self.kind, compress_statistics=double)
            return {key.replace("w.weight", f"{name}.weight"): t for key, t in stored.items()}, decoded
        return {f"{name}.weight": full}, full

    def relations(self, merge, dtype):
        """{size of the update: what is said}, of a directory that holds merge(full, base, delta)."""
        made = {
            name: merge(self.full[name], self.base[name], self.delta[name]).to(DTYPES[dtype])
            for name in self.base
        }
        merged = write(self.root / "merged", made | {"model.norm.weight": self.norm})
        related = lorafuse.verify(merged, ckpt=self.ckpt, adapters=[self.adapter])["related"]
        assert related.pop("model.norm.weight")["relation"] == "equal"
        return {size: related[name] for size, name in zip(SIZES, self.base, strict=True)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {
        (kind, rank): Case(tmp_path_factory.mktemp(f"{kind}-{rank}"), kind, rank)
        for kind in BASES
        for rank in (4, 48)
    }


def in_dtype(dtype):
    """As PEFT merges a model of that dtype: base and update rounded, then their sum."""
    return lambda full, base, delta: base.to(dtype) + delta.to(dtype)


def quantized_again(full, base, delta):
    packed, state = bnb.quantize_4bit((base + delta).to(torch.bfloat16), quant_type="nf4")
    return bnb.dequantize_4bit(packed, state)


def without_some_rows(full, base, delta):
    return base + torch.cat([torch.zeros(FORGOTTEN, delta.shape[1]), delta[FORGOTTEN:]])


def with_wrong_elements(full, base, delta):
    merged = (base + delta).clone()
    merged.view(-1)[:: merged.numel() // 3] *= -3
    return merged


def one_of(value):
    def merge(full, base, delta):
        merged = (base + delta).clone()
        merged[3, 5] = value
        return merged

    return merge


def relative(full, base, delta):
    """A further trained model, in the place of the base."""
    torch.manual_seed(1)
    return full + 0.2 * full.std() * torch.randn(full.shape)


# What was done → (the merge in float64, what is to be said).
MERGES = {
    "rounded once": (lambda full, base, delta: base + delta, {"equal"}),
    "fp32 sums in another order": (
        lambda full, base, delta: (base.float() + delta.float() * (1 + 1e-7)), {"equal"},
    ),
    "in bfloat16": (in_dtype(torch.bfloat16), {"equal", "rounded twice"}),
    "in float16": (in_dtype(torch.float16), {"equal", "rounded twice"}),
    "rounded twice": (
        lambda full, base, delta: (base + delta).half().bfloat16(), {"equal", "rounded twice"},
    ),
    "forgotten": (lambda full, base, delta: base, {"untouched"}),
    "forgotten, through float16": (lambda full, base, delta: base.half().bfloat16(), {"untouched"}),
    "merged twice": (lambda full, base, delta: base + 2 * delta, {"merged twice"}),
    "scale 1.5": (lambda full, base, delta: base + 1.5 * delta, {"wrong scale"}),
    "scale 1/2": (lambda full, base, delta: base + delta / 2, {"wrong scale"}),
    "scale 8": (lambda full, base, delta: base + 8 * delta, {"wrong scale"}),
    "subtracted": (lambda full, base, delta: base - delta, {"wrong scale"}),
    "rows forgotten": (without_some_rows, {"partly merged"}),
    "a few wrong elements": (with_wrong_elements, {"damaged"}),
    "a NaN": (one_of(torch.nan), {"not finite"}),
    "an infinity": (one_of(-torch.inf), {"not finite"}),
    "all NaN": (lambda full, base, delta: delta * torch.nan, {"not finite"}),
    "something else": (lambda full, base, delta: full.flip(0), {"unrelated"}),
}  # fmt: skip
SCALES = {"merged twice": 2, "scale 1.5": 1.5, "scale 1/2": 0.5, "scale 8": 8, "subtracted": -1}


@pytest.mark.parametrize(
    ("kind", "dtype", "rank"),
    [(kind, dtype, (4, 48)[number % 2]) for number, (kind, dtype) in enumerate(product(BASES, DTYPES))],
)
def test_what_each_merge_is_called(kind, dtype, rank, cases):
    wrong = []
    for merge, (make, right) in MERGES.items():
        for size, facts in cases[kind, rank].relations(make, dtype).items():
            scale = facts.get("scale", 1)
            expected = SCALES.get(merge, 1)
            if facts["relation"] not in right or abs(scale / expected - 1) > 0.1:
                wrong.append((merge, size, facts))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_merge_into_the_base_before_it_was_quantized(kind, dtype, cases):
    """Its elements are where the codes say, with the update or without. An update that is small beside the
    quantization error of so few elements cannot be told from none."""
    merged = cases[kind, 4].relations(lambda full, base, delta: full + delta, dtype)
    alone = cases[kind, 4].relations(lambda full, base, delta: full, dtype)
    assert [merged[0.3]["relation"], alone[0.3]["relation"]] == ["other base", "other base, untouched"]
    assert [merged[0.03]["relation"], alone[0.03]["relation"]] == ["other base", "other base, untouched"]
    # Rounding to bfloat16 moves a value by as much as half a cell of int8.
    sure = "likely" if (kind, dtype) == ("int8", "bfloat16") else "certain"
    assert merged[0.3]["sure"] == sure
    assert not {merged[0.003]["relation"], alone[0.003]["relation"]} & {*GOOD, "requantized", "unrelated"}


@pytest.mark.parametrize("kind", BASES)
def test_a_merge_into_a_relative_of_the_base(kind, cases):
    facts = cases[kind, 4].relations(lambda *parts: relative(*parts) + parts[2], "bfloat16")
    assert facts[0.3]["relation"] == "other base"
    facts = cases[kind, 4].relations(relative, "bfloat16")
    assert facts[0.3]["relation"] == "other base, untouched" and facts[0.003]["relation"] not in GOOD


def on_the_quantized_base(full, base, delta):
    packed, state = bnb.quantize_4bit(base.to(torch.bfloat16), quant_type="nf4")
    return bnb.dequantize_4bit(packed, state) + delta


def test_a_merge_into_the_quantized_base_against_the_one_before(cases):
    """An update that is small beside the error of the quantization leaves the weight on the grid."""
    facts = cases["bfloat16", 4].relations(on_the_quantized_base, "bfloat16")
    assert [facts[size]["relation"] for size in SIZES] == ["requantized", "other base", "other base"]
    facts = cases["bfloat16", 4].relations(relative, "bfloat16")
    assert facts[0.003]["relation"] == "other base, unclear"
    cases["bfloat16", 4].relations(on_the_quantized_base, "bfloat16")
    merged, ckpt, adapter = (str(cases["bfloat16", 4].root / name) for name in ("merged", "ckpt", "adapter"))
    shown = CliRunner().invoke(cli.verify, [merged, "--ckpt", ckpt, "--adapter", adapter])
    assert shown.exit_code == 8
    assert shown.stderr.splitlines()[-1] == (
        f"Error: {merged}: 3 of 4 weights are not base + update: this was merged into another base "
        "(16-bit?). An update fits the weights that it was trained on: see `--base-quant`."
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "bfloat16"])
def test_a_merge_that_was_quantized_again(kind, dtype, cases):
    facts = cases[kind, 4].relations(quantized_again, dtype)
    assert facts[0.03]["relation"] == facts[0.3]["relation"] == "requantized"
    # A small update of a weight that lies on the grid leaves it where it was: that is the base again.
    small = {"requantized", "untouched"} if kind == "nf4" else {"requantized"}
    assert facts[0.003]["relation"] in small


def test_weights_that_belong_to_nothing(cases, tmp_path):
    """They are reported; a copy of a weight, as tied embeddings are, is what that weight is."""
    case = cases["bfloat16", 4]
    name = next(iter(case.base))
    made = {weight: (case.base[weight] + case.delta[weight]).bfloat16() for weight in case.base}
    further = {
        "lm_head.weight": made[name].clone(),
        "model.layers.0.self_attn.q_proj.lora_A": torch.ones(4, 4),
    }
    merged = write(tmp_path / "merged", made | {"model.norm.weight": case.norm} | further)
    related = lorafuse.verify(merged, ckpt=case.ckpt, adapters=[case.adapter])["related"]
    assert next(iter(related)) == "model.layers.0.self_attn.q_proj.lora_A"
    assert {
        weight: facts["relation"] for weight, facts in related.items() if facts["relation"] != "equal"
    } == {"model.layers.0.self_attn.q_proj.lora_A": "extra"}


def test_every_verdict_has_its_words():
    """The words of verdict.py and other_tools.py are those that are explained."""
    sources = "".join(
        Path(lorafuse.__file__).parent.joinpath("verification", file).read_text()
        for file in ("verdict.py", "other_tools.py")
    )
    said = {
        word for call in re.findall(r"Verdict\(([^)]*)", sources) for word in re.findall(r'"([^"]+)"', call)
    }
    assert said - {"certain", "likely"} == {*EXPLAINED}
