"""`--format base` of bases that bitsandbytes did not make: codes move to a neighbouring value of the base's
own grid without bias, by the definition; all else is the base's bytes."""

import json
from typing import NamedTuple

import own_grid
import pytest
import torch
from build import write_adapter
from quantized_base import MODULE, write
from safetensors.torch import load_file
from small_floats import E2M1, E2M3, E4M3, E8M0

import lorafuse

WEIGHT = f"{MODULE}.weight"
F8, BF16, F16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bfloat16", F16: "float16", F32: "float32"}
BYTES = torch.arange(256, dtype=torch.uint8)
E5M2 = BYTES.view(torch.float8_e5m2).double()
E5M2[E5M2.isinf()] = torch.nan  # no code becomes one


class Case(NamedTuple):
    """A weight as it is stored. `levels` (float64 [codes]) are what codes stand for, NaN for those that no
    code becomes; `scales` and `zeros` those of each element; values are rounded to `dtypes` in turn. The
    codes of a row have so many `bits`, the lowest first, in words of so many bits, or one after another."""

    stored: dict
    section: dict
    levels: torch.Tensor
    scales: torch.Tensor
    dtypes: tuple
    bits: int = 8
    word: int = 0
    zeros: torch.Tensor | float = 0.0
    codes: str = WEIGHT

    def read(self, found):
        """int64 [elements]: the codes."""
        rows = found[self.codes].view(torch.uint8).reshape(self.scales.shape[0], -1).tolist()
        n_cols, codes = self.scales.shape[1], []
        for row in rows:
            number = int.from_bytes(bytes(row), "little")
            for i in range(n_cols):
                word, place = divmod(i, self.word // self.bits) if self.word else (0, i)
                codes.append(number >> (word * self.word + place * self.bits) & ((1 << self.bits) - 1))
        return torch.tensor(codes)

    def values(self):
        """float64 [elements, codes]."""
        zeros = torch.as_tensor(self.zeros, dtype=torch.float64).expand(self.scales.shape).reshape(-1, 1)
        exact = ((self.levels - zeros) * self.scales.double().reshape(-1, 1)).float()
        for dtype in self.dtypes:
            exact = exact.to(dtype)
        return exact.double()


def spread(numbers, block, shape):
    """Each number at every element of its block."""
    rows, cols = (torch.arange(n) // b for n, b in zip(shape, block, strict=True))
    return numbers[rows][:, cols]


def random_bytes(*shape, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8)


def numbers(*shape, factor=0.01):
    return (torch.rand(shape) + 0.5) * factor


def no_nan(codes):
    """Codes of which a few are large."""
    return torch.where(codes & 0x7F >= 0x7C, codes & 0xF0, codes)


def fp8(dtype=BF16, block=(8, 16), sign=1.0, factor=0.01):
    scales = numbers(2, 3, factor=factor) * sign
    codes = no_nan(random_bytes(12, 40))
    stored = {WEIGHT: codes.view(F8), f"{WEIGHT}_scale_inv": scales}
    section = {"quant_method": "fp8", "weight_block_size": list(block)}
    return Case(stored, section, E4M3, spread(scales, block, (12, 40)), (dtype,))


def e5m2():
    codes, scales = no_nan(random_bytes(12, 40)), numbers(12, 1, factor=1e-3)
    stored = {WEIGHT: codes.view(torch.float8_e5m2), f"{WEIGHT}_scale": scales}
    return Case(stored, CT, E5M2, scales.expand(12, 40), (F32, F16))


CT = {"quant_method": "compressed-tensors"}
INT8 = BYTES.view(torch.int8).double()


def int8(scale_dtype=BF16, *, asymmetric=False):
    scales = numbers(12, 3, factor=0.003).to(scale_dtype)
    stored = {WEIGHT: random_bytes(12, 40).view(torch.int8), f"{WEIGHT}_scale": scales}
    said = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 16}}}}
    zeros = 0.0
    if asymmetric:
        stored[f"{MODULE}.weight_zero_point"] = random_bytes(12, 3).view(torch.int8)
        zeros = spread(stored[f"{MODULE}.weight_zero_point"].double(), (1, 16), (12, 40))
    all_scales = spread(scales, (1, 16), (12, 40))
    return Case(stored, CT | said, INT8, all_scales, (scale_dtype, BF16), zeros=zeros)


def packed(bits, *, word=0, n_cols=50, asymmetric=False, g_idx=False, dtype=F16):
    """Bits of words that no code has are ones."""
    per_row = -(-n_cols // (word // bits)) if word else -(-n_cols * bits // 32)
    width = 16 if word or bits != 8 else n_cols
    n_groups = -(-n_cols // width)
    scales = numbers(12, n_groups, factor=0.05).bfloat16()
    stored = {
        f"{MODULE}.weight_packed": random_bytes(12, per_row * 4).view(torch.int32),
        f"{MODULE}.weight_scale": scales,
        f"{MODULE}.weight_shape": torch.tensor([12, n_cols]),
    }
    groups, zeros = torch.arange(n_cols) // width, 0.0
    if g_idx:
        groups = groups[torch.randperm(n_cols)]
        stored[f"{MODULE}.weight_g_idx"] = groups.int()
    if asymmetric:  # 12 zero points in a column, one behind the other
        columns = random_bytes(n_groups, -(-12 * bits // 32) * 4)
        stored[f"{MODULE}.weight_zero_point"] = columns.view(torch.int32).T.contiguous()
        bytes_of = [int.from_bytes(bytes(column), "little") for column in columns.tolist()]
        points = [[number >> (row * bits) & ((1 << bits) - 1) for number in bytes_of] for row in range(12)]
        zeros = (torch.tensor(points).double() - (1 << bits >> 1))[:, groups]
    said = {"config_groups": {"group_0": {"weights": {"num_bits": bits, "group_size": width}}}}
    levels = torch.arange(1 << bits).double() - (1 << bits >> 1)
    return Case(
        stored, CT | said, levels, scales[:, groups], (BF16, dtype), bits, word, zeros,
        codes=f"{MODULE}.weight_packed",
    )  # fmt: skip


def four_bit_floats(kind, name=WEIGHT, scale="weight_scale", section=CT):
    """E2M1 in pairs: of 16 with a second scale that divides or is a factor, or of 32."""
    width = 32 if kind == "mx" else 16
    stored = {name: random_bytes(12, 32)}
    if kind == "mx":
        stored[f"{MODULE}.{scale}"] = random_bytes(12, 2, high=6) + 118
        scales = E8M0[stored[f"{MODULE}.{scale}"].long()]
    else:
        stored[f"{MODULE}.{scale}"] = (numbers(12, 4) * 4000).to(F8)
        second = torch.tensor([700.0]) if kind == "divides" else torch.tensor(1 / 700)
        end = "weight_global_scale" if kind == "divides" else "weight_scale_2"
        stored[f"{MODULE}.{end}"] = second
        scales = stored[f"{MODULE}.{scale}"].float()
        scales = scales / second if kind == "divides" else scales * second
    scales = spread(scales, (1, width), (12, 64))
    return Case(stored, section, E2M1, scales, (BF16,), 4, codes=name)


def mxfp6():
    """Four codes of E2M3 in three bytes."""
    name, powers = f"{MODULE}.weight_packed", random_bytes(12, 2, high=6) + 118
    stored = {name: random_bytes(12, 48), f"{MODULE}.weight_scale": powers}
    scales = spread(E8M0[powers.long()], (1, 32), (12, 64))
    return Case(stored, CT, E2M3, scales, (BF16,), 6, codes=name)


def modelopt_int8():
    scales = numbers(12, factor=0.003)
    stored = {WEIGHT: random_bytes(12, 40).view(torch.int8), f"{WEIGHT}_scale": scales}
    return Case(stored, {"quant_method": "modelopt"}, INT8, scales[:, None].expand(12, 40), (BF16,))


def fbgemm():
    case, scales = fp8(), numbers(12, 1)
    stored = {WEIGHT: case.stored[WEIGHT], f"{WEIGHT}_scale": scales}
    return Case(stored, {"quant_method": "fbgemm_fp8"}, E4M3, scales.expand(12, 40), (BF16,))


def fp4_experts():
    codes, scales = random_bytes(12, 32), random_bytes(12, 2, high=6) + 118
    stored = {WEIGHT: codes.view(torch.int8), f"{WEIGHT}_scale_inv": scales}
    section = {"quant_method": "fp8", "expert_dtype": "fp4"}
    all_scales = spread(E8M0[scales.long()], (1, 32), (12, 64))
    return Case(stored, section, E2M1, all_scales, (BF16,), 4)


def mlx():
    case = four_bit_floats("mx")
    scales = case.stored[f"{MODULE}.weight_scale"]
    stored = {WEIGHT: case.stored[WEIGHT].view(torch.uint32), f"{MODULE}.scales": scales}
    return case._replace(stored=stored, section={"group_size": 32, "bits": 4, "mode": "mxfp4"})


CASES = {
    "mlx mxfp4": mlx,
    "fp8 blocks": fp8,
    "fp8 float32": lambda: fp8(F32),
    "fp8 float16 small": lambda: fp8(F16, factor=1e-5),
    "fp8 scales below 0": lambda: fp8(sign=torch.tensor([[1.0, -1, 1], [-1, 1, -1]])),
    "fp8 e5m2": e5m2,
    "int8": int8,
    "int8 float32 asymmetric": lambda: int8(F32, asymmetric=True),
    "2 bits": lambda: packed(2),
    "3 bits asymmetric": lambda: packed(3, n_cols=61, asymmetric=True),
    "3 bits in words": lambda: packed(3, word=32, n_cols=61),
    "4 bits g_idx asymmetric": lambda: packed(4, g_idx=True, asymmetric=True, dtype=BF16),
    "4 bits whole bytes": lambda: packed(4, n_cols=48),
    "5 bits": lambda: packed(5, dtype=F32),
    "8 bits": lambda: packed(8),
    "ct nvfp4": lambda: four_bit_floats("divides", f"{MODULE}.weight_packed"),
    "ct mxfp4": lambda: four_bit_floats("mx", f"{MODULE}.weight_packed"),
    "ct mxfp6": mxfp6,
    "modelopt nvfp4": lambda: four_bit_floats("factor", section={"quant_method": "modelopt"}),
    "modelopt int8": modelopt_int8,
    "fbgemm": fbgemm,
    "fp4 experts": fp4_experts,
}


def lora(root, shape, size=1.0):
    """An update of which some elements pass several values of the grid, and some are tiny."""
    a = torch.randn(2, shape[1]) * torch.logspace(-3, 0, shape[1]) * size
    key = f"base_model.model.{MODULE}"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": torch.randn(shape[0], 2)}
    return write_adapter(root / "adapter", tensors, r=2, lora_alpha=2)


def same(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def merged(root, case, size):
    """(the base, the adapter, sums in fp32, what was written, the weight's entry in the receipt)."""
    dense = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16()}
    dtype = NAMES[case.dtypes[-1]]
    ckpt = write(root / "ckpt", case.stored | dense, case.section, dtype, vocab_size=8)
    adapter = lora(root, case.scales.shape, size)
    return ckpt, adapter, *own_grid.merged(root, ckpt, adapter, WEIGHT)


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_definition(case, tmp_path):
    torch.manual_seed(len(case))
    case = CASES[case]()
    values, was = case.values(), case.read(case.stored)
    size = float(values[values.isfinite()].abs().max()) * 0.2
    ckpt, adapter, sums, found, entry = merged(tmp_path, case, size)
    expected, n_clipped = own_grid.rounded(was, values, sums, own_grid.uniform(WEIGHT, len(sums)))
    made = case.read(found)
    assert torch.equal(values.gather(1, made[:, None]), values.gather(1, expected[:, None]))
    assert 0 < int((made != was).sum()) < len(was)
    assert entry["clipped"] == pytest.approx(n_clipped / len(was))
    n_moved = (values.gather(1, made[:, None]) != values.gather(1, was[:, None])).double().mean()
    assert entry["changed"] == pytest.approx(float(n_moved))
    for name, tensor in case.stored.items():
        assert name == case.codes or same(found[name], tensor), name
    moved = case.stored[case.codes].view(torch.uint8) ^ found[case.codes].view(torch.uint8)
    # Bits of no code stay.
    stray = case.read({case.codes: moved}).ne(0).sum()
    assert stray == (made != was).sum()
    if case.bits * case.scales.shape[1] < 8 * moved.shape[1] and not case.word:
        n_bits = case.bits * case.scales.shape[1]
        assert all(int.from_bytes(bytes(row), "little") >> n_bits == 0 for row in moved.tolist())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == case.section
    lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[adapter])


@pytest.mark.parametrize("case", ["fp8 blocks", "3 bits asymmetric", "4 bits g_idx asymmetric", "ct nvfp4"])
def test_bytes_depend_on_no_tile(case, tmp_path, monkeypatch):
    torch.manual_seed(0)
    case = CASES[case]()
    ckpt, adapter, _, expected, _ = merged(tmp_path, case, 0.1)
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 200)
    monkeypatch.setattr("lorafuse.arithmetic.on_grid.CHUNK_NUMEL", 64)
    monkeypatch.setattr("lorafuse.arithmetic.on_grid.SETTLED_NUMEL", 40)
    lorafuse.convert(ckpt, adapter, tmp_path / "again", format="base")
    found = load_file(tmp_path / "again/model.safetensors")
    assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in found)


E = "model.layers.0.mlp.experts"


def experts(root, n_rows, n_cols, kinds):
    """An adapter of experts, (2, n_rows, n_cols) in the dense model, by target_parameters."""
    tensors, key = {}, f"base_model.model.{E}"
    for _ in kinds:
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, n_rows) * torch.logspace(-3, 0, n_rows)
        tensors[f"{key}.lora_B.weight"] = torch.randn(n_cols, 4) * 0.2
        key += ".base_layer"
    parameters = [f"experts.{kind}_proj" for kind in kinds]
    return write_adapter(
        root / "adapter", tensors, r=2, lora_alpha=2, target_modules=[], target_parameters=parameters
    )


def of_stack(ckpt, adapter, root, weight):
    lorafuse.convert(ckpt, adapter, root / "sums", dtype="float32")
    receipt = lorafuse.convert(ckpt, adapter, root / "out", format="base")
    sums, found = (load_file(root / name / "model.safetensors") for name in ("sums", "out"))
    lorafuse.verify(root / "out", ckpt=ckpt, adapters=[adapter])
    return sums[weight].double().view(-1), found, receipt["tensors"][weight]


@pytest.mark.parametrize("tile_numel", [1 << 18, 64])
def test_stacks_of_gpt_oss(tile_numel, tmp_path, monkeypatch):
    """Stored (experts, out, in), the weight is (experts, in, out): indexes are those of the weight."""
    torch.manual_seed(5)
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", tile_numel)
    monkeypatch.setattr("lorafuse.codecs.mxfp4.WINDOW_NBYTES", 2 * 6 * 17 if tile_numel == 64 else 10**7)
    weight = f"{E}.down_proj"
    packed, scales = random_bytes(2, 6, 4, 16), random_bytes(2, 6, 4, high=6) + 120
    stored = {f"{weight}_blocks": packed, f"{weight}_scales": scales}
    stored |= {f"{weight}_bias": torch.zeros(2, 6, dtype=BF16)}
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    dense = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16()}
    ckpt = write(tmp_path / "ckpt", stored | dense, section, model_type="gpt_oss", num_local_experts=2)
    adapter = experts(tmp_path, 128, 6, ["down"])
    sums, found, entry = of_stack(ckpt, adapter, tmp_path, weight)

    def codes(tensors):  # int64 [elements], in the order of the weight
        bytes_ = tensors[f"{weight}_blocks"].long()
        return torch.stack([bytes_ & 15, bytes_ >> 4], -1).view(2, 6, 128).transpose(1, 2).reshape(-1)

    of_each = E8M0[scales.long()].repeat_interleave(32, 2).transpose(1, 2).reshape(-1, 1)
    values = (E2M1 * of_each).bfloat16().double()
    was, made = codes(stored), codes(found)
    expected, n_clipped = own_grid.rounded(was, values, sums, own_grid.uniform(weight, len(sums)))
    assert torch.equal(values.gather(1, made[:, None]), values.gather(1, expected[:, None]))
    assert 0 < int((made != was).sum()) < len(was)
    assert entry["clipped"] == pytest.approx(n_clipped / len(was)) and n_clipped
    assert all(same(found[name], stored[name]) for name in stored if not name.endswith("_blocks"))


def test_stacks_of_fbgemm(tmp_path):
    """A scale for each column of an expert."""
    torch.manual_seed(6)
    weight = f"{E}.gate_up_proj"
    raw, scales = no_nan(random_bytes(2, 16, 10)), numbers(2, 1, 10)
    stored = {weight: raw.view(F8), f"{weight}_scale": scales}
    dense = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16()}
    ckpt = write(tmp_path / "ckpt", stored | dense, {"quant_method": "fbgemm_fp8"})
    adapter = experts(tmp_path, 16, 10, ["gate_up"])
    sums, found, _ = of_stack(ckpt, adapter, tmp_path, weight)
    was, made = (tensors[weight].view(torch.uint8).long().view(-1) for tensors in (stored, found))
    values = (E4M3 * scales.double().expand(2, 16, 10).reshape(-1, 1)).float().bfloat16().double()
    expected, _ = own_grid.rounded(was, values, sums, own_grid.uniform(weight, len(sums)))
    assert torch.equal(values.gather(1, made[:, None]), values.gather(1, expected[:, None]))
    assert int((made != was).sum()) and same(found[f"{weight}_scale"], scales)
