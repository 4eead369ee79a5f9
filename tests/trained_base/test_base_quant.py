"""--base-quant makes of a weight, bit for bit, what bitsandbytes makes of it on the CPU."""

import json
import tempfile
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from build import write_adapter, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.arithmetic import quantize
from lorafuse.codecs import Arena, open_weights
from lorafuse.errors import CheckpointError, UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.on_gpu import ByKernels
from lorafuse.trained_base.simulated import simulated

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FOUR_BIT = st.builds(
    BaseQuant,
    kind=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    blocksize=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
)


def ours(weight, quant, *, dtype=None, transposed=False, tile_rows=None):
    """The weight after simulated quantization, a tile of rows at a time."""
    with tempfile.TemporaryDirectory() as d:
        save_file({"w": weight.contiguous()}, Path(d) / "model.safetensors")
        (Path(d) / "config.json").write_text("{}")
        ckpt = Checkpoint(LocalFolder(Path(d)))
        name = str(dtype or weight.dtype).removeprefix("torch.")
        sources, arena = simulated(open_weights(ckpt)["w"], quant, name, transposed=transposed), Arena(CPU)
        numel, tile = weight.numel(), (tile_rows or weight.shape[0]) * weight.shape[1]
        spans = [(start, min(start + tile, numel)) for start in range(0, numel, tile)]
        made = torch.cat([sources.values(Box.of_run(sources.spec, *span), arena).clone() for span in spans])
        ckpt.close()
    return made.view(weight.shape)


def theirs(weight, quant):
    """What bitsandbytes' CPU kernels make of it: the order of a sum in one thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if quant.kind == "int8":
            return bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(weight.half())[:2])
        settings = {
            "quant_type": quant.kind,
            "blocksize": quant.blocksize,
            "compress_statistics": quant.double_quant,
        }
        packed, state = bnb.quantize_4bit(weight, **settings)
        # As bytes in a column: bitsandbytes takes one row, of however few elements, for a transposed weight.
        return bnb.dequantize_4bit(packed.reshape(-1, 1), state).view(weight.shape)
    finally:
        torch.set_num_threads(n_threads)


def same(a, b):
    """But for the sign of a zero: FP4 has two, which bitsandbytes' quant_map, unlike its kernel, does not
    tell apart."""
    return a.dtype == b.dtype and torch.equal(a, b)


@st.composite
def weights(draw):
    """Of any dtype and shape: normal, with zero blocks, tiny and denormal values, or values on the midpoints
    between levels."""
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 150)))
    torch.manual_seed(draw(st.integers(0, 9999)))
    weight = torch.randn(shape) * draw(st.sampled_from([1.0, 0.02, 1e-6, 1e-39]))
    flat = weight.view(-1)
    if draw(st.booleans()):
        flat[: draw(st.integers(0, flat.numel()))] = 0
    if draw(st.booleans()):
        ties = torch.from_numpy(quantize.midpoints(draw(st.sampled_from(["nf4", "fp4"]))))
        for start in range(0, flat.numel(), 64):
            block = flat[start : start + 64]
            some = ties[torch.randint(len(ties), (len(block) // 2,))]
            block[: len(some)] = some * 2.0 ** torch.randint(-3, 3, (1,))
            block[-1:] = 2.0 ** torch.randint(-3, 3, (1,))
    return weight.to(draw(st.sampled_from(FLOATS)))


@settings(max_examples=200, deadline=None)
@given(weights(), FOUR_BIT, st.booleans(), st.integers(1, 40))
def test_four_bit_as_bitsandbytes(weight, quant, transposed, tile_rows):
    """Any dtype, shape, block size, in any tiles; transposed, as bitsandbytes stores HF Conv1D."""
    expected = theirs(weight.T.contiguous(), quant).T if transposed else theirs(weight, quant)
    assert same(ours(weight, quant, transposed=transposed, tile_rows=tile_rows), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-42, 1e-44])
def test_denormal_scales_are_quantized_as_bitsandbytes_does(scale, transposed):
    """The reciprocal of their own scale overflows, and the scale that is the mean of all has no quotient."""
    weight, quant = torch.ones(96, 64), BaseQuant(kind="nf4", double_quant=True, blocksize=64)
    weight[::3], weight[1::3] = 2, 3
    weight *= scale
    expected = theirs(weight.T.contiguous(), quant).T if transposed else theirs(weight, quant)
    assert same(ours(weight, quant, transposed=transposed, tile_rows=7), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [64, 63])
def test_values_next_to_a_midpoint(n, kind, transposed):
    """Whole blocks multiply by a reciprocal and a short one divides, which now and then sets a value on
    another side."""
    ties, generator = torch.from_numpy(quantize.midpoints(kind)), torch.Generator().manual_seed(0)
    quant, n_differing = BaseQuant(kind=kind, double_quant=False), 0
    for _ in range(100):
        absmax = torch.rand((), generator=generator)
        weight = (ties * absmax).repeat(5)[:n].view(1, -1).contiguous()
        weight[0, -1] = absmax
        n_differing += int(
            (weight / absmax > ties.repeat(5)[:n]).ne(weight * (1 / absmax) > ties.repeat(5)[:n]).sum()
        )
        expected = theirs(weight, quant)
        made = ours(weight.T, quant, transposed=True).T if transposed else ours(weight, quant)
        assert same(made.contiguous(), expected)
    assert n_differing > 50


@settings(max_examples=100, deadline=None)
@given(weights(), st.booleans(), st.integers(1, 40))
def test_int8_as_bitsandbytes(weight, transposed, tile_rows):
    """Rows of zeros too; a transposed weight's rows are columns."""
    quant = BaseQuant(kind="int8")
    expected = theirs(weight.T.contiguous(), quant).T if transposed else theirs(weight, quant)
    made = ours(weight, quant, transposed=transposed, tile_rows=tile_rows)
    assert same(made, expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_many_nested_blocks(kind):
    """More than 256 scales, chunks and tiles, of which none is the others' multiple."""
    weight = torch.randn(700, 999).bfloat16()
    quant = BaseQuant(kind=kind)
    for tile_rows in (700, 512, 131):
        assert same(ours(weight, quant, tile_rows=tile_rows), theirs(weight, quant))


@pytest.mark.parametrize("quant", [BaseQuant(kind="nf4"), BaseQuant(kind="int8")], ids=str)
def test_the_weight_is_cast_to_the_dtype_of_the_model_first(quant):
    weight = torch.randn(64, 100)
    assert same(ours(weight, quant, dtype=torch.bfloat16), theirs(weight.bfloat16(), quant))


def test_tables_are_those_of_bitsandbytes():
    assert torch.equal(quantize.dynamic_map(), bnb.create_dynamic_map())
    for kind in ("nf4", "fp4"):
        assert torch.equal(quantize.levels(kind).unique(), bnb.get_4bit_type(kind, device="cpu").unique())


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.integers(1, 300), st.integers(1, 600_000)), st.integers(0, 9999), st.data())
def test_the_sum_is_torchs(n, seed, data):
    """In one thread, however the numbers are fed."""
    values = np.random.default_rng(seed).random(n).astype(np.float32)
    total = quantize.CascadeSum(n)
    for piece in np.split(values, sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))):
        total.add(piece)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = torch.from_numpy(values).mean().item()
    torch.set_num_threads(n_threads)
    assert total.mean() == np.float32(expected)


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "quant",
    [BaseQuant(kind="nf4"), BaseQuant(kind="fp4", double_quant=False), BaseQuant(kind="int8")],
    ids=str,
)
def test_bitsandbytes_own_kernels(quant, transposed, device, tmp_path):
    """The whole weight on the device, by calls of bitsandbytes; on the CPU these are what the rest of this
    file compares with."""
    weight = torch.randn(96, 130).bfloat16()
    ckpt = Checkpoint(LocalFolder(write_checkpoint(tmp_path / "ckpt", {"w": weight})))
    sources, arena = open_weights(ckpt)["w"], Arena(device)
    by_kernels = ByKernels(sources, quant, torch.bfloat16, transposed=transposed)
    made = by_kernels.values(Box.whole(by_kernels.spec), arena)
    weight = weight.to(device)
    expected = theirs(weight.T.contiguous(), quant).T if transposed else theirs(weight, quant)
    assert torch.equal(made.view(weight.shape), expected)


def merged(ckpt, adapter, out, **options):
    receipt = lorafuse.convert(ckpt, adapter, out, **options)
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return receipt, tensors


@pytest.mark.parametrize(
    ("dense", "stored", "options"),
    [
        ("bf16", "nf4_dq", {"base_quant": "nf4"}),
        ("bf16", "nf4", {"base_quant": "nf4", "double_quant": False}),
        ("fp16", "nf4_fp16", {"base_quant": "nf4"}),
        ("bf16", "nf4_bs256", {"base_quant": "nf4", "quant_blocksize": 256}),
        ("bf16_odd", "nf4_odd", {"base_quant": "nf4"}),
        ("bf16", "fp4_dq", {"base_quant": "fp4"}),
        ("bf16", "int8", {"base_quant": "int8"}),
        ("gpt2_bf16", "gpt2_nf4", {"base_quant": "nf4", "double_quant": False}),
        ("gpt2_bf16", "gpt2_int8", {"base_quant": "int8"}),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_equal_to_merging_into_the_quantized_checkpoint(
    dense, stored, options, use_dora, base, adapter, tmp_path
):
    """Every tensor, to the bit, with an update that adds and one that reads the base first."""
    targets = ["c_attn", "c_fc"] if "gpt2" in dense else ["q_proj", "down_proj"]
    lora = adapter(dense, target_modules=targets, use_dora=use_dora)
    receipt, made = merged(base(dense), lora, tmp_path / "a", **options)
    _, expected = merged(base(stored), lora, tmp_path / "b")
    assert made.keys() == expected.keys()
    bits = {
        name: (tensor.view(torch.uint8), expected[name].view(torch.uint8)) for name, tensor in made.items()
    }
    assert [name for name, pair in bits.items() if not torch.equal(*pair)] == []
    assert receipt["base_semantics"].startswith(f"simulated: {options['base_quant']}")
    assert receipt["settings"]["base_quant"]["kind"] == options["base_quant"]


def test_a_quantized_checkpoint_is_refused(base, adapter, tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"is quantized already, so this checkpoint is what training saw: leave base_quant out",
    ):
        lorafuse.convert(
            base("nf4"), adapter("nf4", target_modules=["q_proj"]), tmp_path / "out", base_quant="nf4"
        )
    assert not (tmp_path / "out").exists()


def test_bytes_do_not_depend_on_threads_or_memory(tmp_path, monkeypatch):
    """Many small weights, each with its pass, ahead of its turn or not."""
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    made = []
    for n, limit in ((1, "60MB"), (4, "1GB")):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=n: range(n))
        out = tmp_path / f"out{n}"
        lorafuse.convert(ckpt, lora, out, base_quant="nf4", memory_limit=limit)
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_without_it_nothing_about_it_is_in_the_receipt(tmp_path):
    receipt = lorafuse.convert(
        write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora"), tmp_path / "out"
    )
    assert receipt["base_semantics"] == "stored in full precision"
    assert "base_quant" not in json.dumps(receipt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_quant": "nf5"}, "base_quant is nf5; expected one of none, auto, nf4, fp4, int8."),
        (
            {"base_quant": "nf4", "quant_blocksize": 63},
            "quant_blocksize is 63; expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096.",
        ),
        (
            {"base_quant": "nf4", "quant_skip": ["("]},
            "quant_skip: '(' is no name or regular expression of modules: ",
        ),
        (
            {"quant_skip": ["lm_head"]},
            "quant_skip says how the base was quantized, but base_quant is none; expected nf4, fp4 or int8.",
        ),
        (
            {"double_quant": False},
            "double_quant=False says how the base was quantized, but base_quant is none; ",
        ),
    ],
)
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(UsageError) as e:
        lorafuse.convert("nowhere", "nowhere", tmp_path / "out", **options)
    assert str(e.value).startswith(message)
