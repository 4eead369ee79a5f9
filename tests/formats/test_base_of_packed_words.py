"""`--format base` of GPTQ, AWQ and MLX affine: codes by the definition, packed by the formats' descriptions
in Python's integers; all else is the base's bytes."""

import json
from typing import NamedTuple

import own_grid
import pytest
import torch
from build import write_adapter, write_json
from packing import extreme, signed, stream
from quantized_base import DTYPES, MODULE, write
from safetensors.torch import load_file, save_file

import lorafuse

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AWQ_ORDER = (
    0,
    2,
    4,
    6,
    1,
    3,
    5,
    7,
)  # the output, of eight, that each half byte of a word holds, lowest first


class Case(NamedTuple):
    """A weight as it is stored: `values` (float64 [elements, codes]) are what its codes stand for, `read`
    finds the codes (int64 [elements]) in the tensors of a checkpoint."""

    stored: dict
    section: dict
    dtype: torch.dtype
    shape: tuple
    values: torch.Tensor
    read: object
    name: str = MODULE
    codes: str = "qweight"
    model_type: str = "llama"


def numbers_of(rows):
    """Each row of words (or bytes) as one integer."""
    return [int.from_bytes(bytes(row), "little") for row in rows.contiguous().view(torch.uint8).tolist()]


def unpacked(rows, bits, n):
    """int64 [rows, n]: codes one after another, the lowest bits first."""
    mask = (1 << bits) - 1
    return torch.tensor([[number >> (i * bits) & mask for i in range(n)] for number in numbers_of(rows)])


def through(exact, *dtypes):
    for dtype in dtypes:
        exact = exact.to(dtype)
    return exact.double()


def ones_beyond(words, n_bits):
    """Words (int32 [rows, words]) whose bits from `n_bits` on are ones."""
    width = words.shape[1]
    filled = [number | (1 << 32 * width) - (1 << n_bits) for number in numbers_of(words)]
    rows = [[signed(number >> 32 * i & 0xFFFFFFFF) for i in range(width)] for number in filled]
    return torch.tensor(rows, dtype=torch.int32)


def gptq(bits, *, dtype=F16, of_scales=F16, n_inputs=64, size=16, order=False, g_idx=True, conv1d=False):
    """Version 2, whose zero points are as they are; the codes of the last words are not all used."""
    n_outputs, name = 32, "h.0.mlp.c_fc" if conv1d else MODULE
    groups = torch.arange(n_inputs) // size
    if order:
        groups = groups[torch.randperm(n_inputs)]
    n_groups = int(groups.max()) + 1
    codes, zeros = (torch.randint(0, 1 << bits, (n_outputs, n)) for n in (n_inputs, n_groups))
    scales = extreme((n_groups, n_outputs), of_scales, "ordinary")
    stored = {
        f"{name}.qweight": ones_beyond(stream(codes, bits), n_inputs * bits).T.contiguous(),
        f"{name}.qzeros": stream(zeros.T, bits),
        f"{name}.scales": scales,
    }
    if g_idx:
        stored[f"{name}.g_idx"] = groups.int()
    every = torch.arange(1 << bits) - zeros[:, groups][:, :, None]
    exact = every * scales.double().T[:, groups][:, :, None]

    def read(found):
        read = unpacked(found[f"{name}.qweight"].T, bits, n_inputs)
        return (read.T if conv1d else read).reshape(-1)

    values = through(exact, of_scales, dtype)
    values = (values.transpose(0, 1) if conv1d else values).reshape(-1, 1 << bits)
    section = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": "gptq_v2"}
    shape = (n_inputs, n_outputs) if conv1d else (n_outputs, n_inputs)
    model_type = "gpt2" if conv1d else "llama"
    return Case(stored, section, dtype, shape, values, read, name, model_type=model_type)


def auto_round(bits):
    case = gptq(bits, g_idx=False)
    section = {"quant_method": "auto-round", "packing_format": "auto_round", "bits": bits, "group_size": 16}
    return case._replace(section=section)


def eights(codes):
    """int32 [rows, outputs / 8]: words of AWQ of codes [rows, outputs]."""
    words = codes.view(len(codes), -1, 8)[:, :, AWQ_ORDER].tolist()
    packed = [[signed(sum(code << 4 * i for i, code in enumerate(word))) for word in row] for row in words]
    return torch.tensor(packed, dtype=torch.int32)


def awq(*, dtype=F16, of_scales=F16, zeros=True):
    n_outputs, n_groups, size = 24, 3, 16
    codes = torch.randint(0, 16, (n_groups * size, n_outputs))
    zero = torch.randint(0, 16, (n_groups, n_outputs)) * int(zeros)
    scales = extreme((n_groups, n_outputs), of_scales, "ordinary")
    stored = {f"{MODULE}.qweight": eights(codes), f"{MODULE}.scales": scales}
    if zeros:
        stored[f"{MODULE}.qzeros"] = eights(zero)

    def read(found):
        halves = unpacked(found[f"{MODULE}.qweight"], 4, n_outputs).view(len(codes), -1, 8)
        in_order = torch.empty_like(halves)
        in_order[:, :, AWQ_ORDER] = halves
        return in_order.view(len(codes), -1).T.reshape(-1)

    groups = torch.arange(len(codes)) // size
    every = torch.arange(16) - zero.T[:, groups][:, :, None]
    exact = every * scales.to(dtype).double().T[:, groups][:, :, None]
    values = through(exact, dtype).view(-1, 16)
    section = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": zeros}
    return Case(stored, section, dtype, (n_outputs, len(codes)), values, read)


def mlx(bits, *, dtype=BF16, size="ordinary", name=MODULE, tall=12):
    """Of one matrix, or of a stack of two."""
    stack = name.endswith("switch_mlp.up_proj")
    shape = (2, tall, 64) if stack else (tall, 64)
    codes = torch.randint(0, 1 << bits, (shape[-2] * (1 + stack), 64))
    scales = extreme((len(codes), 2), dtype, size)
    biases = (-(scales.float() * (1 << bits - 1)) * (torch.rand(scales.shape) + 0.5)).to(dtype)
    stored = {
        f"{name}.weight": stream(codes, bits).view(torch.uint32).view(*shape[:-1], -1),
        f"{name}.scales": scales.view(*shape[:-1], 2),
        f"{name}.biases": biases.view(*shape[:-1], 2),
    }

    def read(found):
        return unpacked(found[f"{name}.weight"].view(torch.int32).view(len(codes), -1), bits, 64).view(-1)

    scales, biases = (part.double().repeat_interleave(32, 1).view(-1, 1) for part in (scales, biases))
    values = through(through(torch.arange(1 << bits) * scales, dtype) + biases, dtype)
    section = {"group_size": 32, "bits": bits, "mode": "affine"}
    return Case(stored, section, dtype, shape, values, read, name, "weight")


CASES = {
    "gptq 2": lambda: gptq(2, dtype=BF16, n_inputs=43),
    "gptq 3": lambda: gptq(3, n_inputs=43),
    "gptq 3 act-order": lambda: gptq(3, n_inputs=61, order=True, dtype=F32),
    "gptq 4": lambda: gptq(4, g_idx=False),
    "gptq 4 one group": lambda: gptq(4, size=64, of_scales=F32),
    "gptq 4 act-order": lambda: gptq(4, order=True, dtype=BF16),
    "gptq 4 ragged": lambda: gptq(4, n_inputs=60, size=25, of_scales=BF16),
    "gptq 8": lambda: gptq(8, dtype=BF16),
    "gptq Conv1D": lambda: gptq(4, conv1d=True, size=24),
    "gptq Conv1D act-order": lambda: gptq(3, conv1d=True, order=True, n_inputs=43),
    "auto-round": lambda: auto_round(4),
    "awq": awq,
    "awq bfloat16": lambda: awq(dtype=BF16, of_scales=F32),
    "awq symmetric": lambda: awq(zeros=False),
    "mlx 2": lambda: mlx(2),
    "mlx 3": lambda: mlx(3, dtype=F16),
    "mlx 4 small": lambda: mlx(4, dtype=F16, size="tiny"),
    "mlx 5": lambda: mlx(5),
    "mlx 6": lambda: mlx(6, dtype=F32),
    "mlx 8": lambda: mlx(8),
    "mlx 8 float16": lambda: mlx(8, dtype=F16),
    "mlx stack": lambda: mlx(4, name="model.layers.0.mlp.switch_mlp.up_proj"),
}


def same(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def on_disk(root, case, **config):
    dense = {"model.embed_tokens.weight": torch.randn(8, 4).to(case.dtype)}
    if case.codes == "weight":
        config["quantization"] = case.section
    return write(
        root / "ckpt", case.stored | dense, case.section, NAMES[case.dtype], vocab_size=8,
        model_type=case.model_type, **config,
    )  # fmt: skip


def lora(path, case, share=0.2):
    """An update of which some elements pass several values of the grid, and some are tiny."""
    size = float(case.values[case.values.isfinite()].abs().max()) * share
    n_rows, n_cols = case.shape[-2:]
    if len(case.shape) == 3:
        return mlx_lora(path, case, size)
    if case.model_type == "gpt2":
        n_rows, n_cols = n_cols, n_rows
    key = f"base_model.model.{case.name}"
    tensors = {
        f"{key}.lora_A.weight": torch.randn(2, n_cols) * torch.logspace(-3, 0, n_cols) * size,
        f"{key}.lora_B.weight": torch.randn(n_rows, 2),
    }
    fan = {"fan_in_fan_out": True} if case.model_type == "gpt2" else {}
    return write_adapter(path, tensors, r=2, lora_alpha=2, **fan)


def mlx_lora(path, case, size):
    """Of MLX-LM, on a stack."""
    n, n_rows, n_cols = case.shape
    factors = {
        f"{case.name}.lora_a": torch.randn(2 * n, n_cols) * torch.logspace(-3, 0, n_cols) * size,
        f"{case.name}.lora_b": torch.randn(n, n_rows, 2),
    }
    path.mkdir()
    save_file(factors, path / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0}}
    write_json(path / "adapter_config.json", fields)
    return path


def merged(root, case):
    """(the base, the adapter, sums in fp32, what was written, the weight's entry in the receipt)."""
    weight = f"{case.name}.weight"
    ckpt, adapter = on_disk(root, case), lora(root / "adapter", case)
    return ckpt, adapter, *own_grid.merged(root, ckpt, adapter, weight)


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_definition(case, tmp_path):
    torch.manual_seed(len(case))
    case = CASES[case]()
    values, was = case.values, case.read(case.stored)
    ckpt, adapter, sums, found, entry = merged(tmp_path, case)
    expected, n_clipped = own_grid.rounded(
        was, values, sums, own_grid.uniform(f"{case.name}.weight", len(sums))
    )
    made = case.read(found)
    assert torch.equal(values.gather(1, made[:, None]), values.gather(1, expected[:, None]))
    assert 0 < int((made != was).sum()) < len(was)
    assert entry["clipped"] == pytest.approx(n_clipped / len(was))
    n_moved = (values.gather(1, made[:, None]) != values.gather(1, was[:, None])).double().mean()
    assert entry["changed"] == pytest.approx(float(n_moved))
    codes = f"{case.name}.{case.codes}"
    assert all(same(found[name], tensor) for name, tensor in case.stored.items() if name != codes)
    all_bits = [numbers_of(tensors[codes].reshape(1, -1))[0] for tensors in (found, case.stored)]
    of_codes = sum((a ^ b).bit_count() for a, b in zip(made.tolist(), was.tolist(), strict=True))
    assert (all_bits[0] ^ all_bits[1]).bit_count() == of_codes  # bits of no code stay
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == case.section
    lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[adapter])
    assert lorafuse.inspect(tmp_path / "out")["n_parameters"] == len(was) + 32


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "case", ["gptq 3", "gptq 4 act-order", "gptq Conv1D act-order", "awq", "mlx 3", "mlx stack"]
)
def test_bytes_depend_on_no_tile(case, workers, tmp_path, monkeypatch):
    """Nor on threads, on what is read at once, or on what is written at once."""
    torch.manual_seed(0)
    case = CASES[case]()
    ckpt, adapter, _, expected, _ = merged(tmp_path, case)
    for name, size in (("arithmetic.on_grid.CHUNK_NUMEL", 64), ("arithmetic.on_grid.SETTLED_NUMEL", 40),
                       ("planning.plan.TILE_NUMEL", 200), ("codecs.strips.STRIP_NBYTES", 400),
                       ("codecs.bands.WINDOWS_NBYTES", 1)):  # fmt: skip
        monkeypatch.setattr(f"lorafuse.{name}", size)
    monkeypatch.setattr("lorafuse.settings.Settings.n_workers", workers)
    lorafuse.convert(ckpt, adapter, tmp_path / "again", format="base")
    found = load_file(tmp_path / "again/model.safetensors")
    assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("case", ["gptq 4", "awq", "mlx 4 small"])
def test_a_batch(case, tmp_path):
    """Several outputs of one base, whose codes are collected apart, are what each is alone."""
    torch.manual_seed(0)
    case = CASES[case]()
    ckpt = on_disk(tmp_path, case)
    for number in range(3):
        adapter = lora(tmp_path / f"adapter{number}", case, 0.05 * number + 0.05)
        lorafuse.convert(ckpt, adapter, tmp_path / f"alone{number}", format="base")
    lines = [{"adapter": str(tmp_path / f"adapter{n}"), "name": f"out{n}"} for n in range(3)]
    (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    lorafuse.batch(ckpt, tmp_path / "jobs.jsonl", tmp_path, format="base")
    results = []
    for number in range(3):
        made, alone = (load_file(tmp_path / f"{n}{number}/model.safetensors") for n in ("out", "alone"))
        assert made.keys() == alone.keys() and all(same(made[name], alone[name]) for name in made)
        results.append(made[f"{case.name}.{case.codes}"])
    assert not torch.equal(results[0].view(torch.uint8), results[1].view(torch.uint8))
