"""Decoding is bit-identical to bitsandbytes, for any part of any weight; and broken companions are
refused."""

import json
import tempfile
from contextlib import closing

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import four_bit, write

from lorafuse.codecs import CODECS, Arena, open_weights
from lorafuse.errors import CheckpointError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def decoded(path, name, start=0, stop=None):
    ckpt = Checkpoint(LocalFolder(path))
    sources = open_weights(ckpt)[name]
    arena = Arena(CPU)
    box = Box.of_run(sources.spec, start, sources.spec.numel if stop is None else stop)
    values = sources.values(box, arena).clone()
    ckpt.close()
    return sources.spec, values


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    blocksize=st.sampled_from([64, 128, 2048]),
    kind=st.sampled_from(["nf4", "fp4"]),
)
def test_the_judge_is_right(shape, blocksize, kind):
    """bitsandbytes' kernel, as these tests call it, agrees with the code that it has for processors without
    one."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    torch.manual_seed(0)
    packed, state = bnb.quantize_4bit(torch.randn(shape), blocksize=blocksize, quant_type=kind)
    column = packed.reshape(-1, 1)
    expected = _dequantize_4bit_compute(
        column.view(-1), state.absmax, state.code, blocksize, shape, torch.float32
    )
    # A column of one byte is one row too.
    assert torch.equal(bnb.dequantize_4bit(column, state).reshape(shape), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_four_bit_decodes_any_rows_as_bitsandbytes(data):
    """NF4 and FP4, double-quantized or not, every block size and storage dtype, odd element counts, rows that
    share blocks."""
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150)))
    dtype = data.draw(st.sampled_from(FLOATS))
    settings = {
        "quant_type": data.draw(st.sampled_from(["nf4", "fp4"])),
        "blocksize": data.draw(st.sampled_from([64, 128, 256, 512, 1024, 2048, 4096])),
        "compress_statistics": data.draw(st.booleans()),
    }
    numel = shape[0] * shape[1]
    storages = [torch.uint8] + [d for d in FLOATS if numel % (2 * d.itemsize) == 0]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    stored, expected = four_bit(
        torch.randn(shape).to(dtype), quant_storage=data.draw(st.sampled_from(storages)), **settings
    )
    first = data.draw(st.integers(0, shape[0] - 1))
    last = data.draw(st.integers(first + 1, shape[0]))
    with tempfile.TemporaryDirectory() as d:
        spec, values = decoded(write(d, stored), "w.weight", first * shape[1], last * shape[1])
    assert (spec.shape, spec.torch_name) == (shape, str(dtype).removeprefix("torch."))
    assert torch.equal(values, expected[first:last].flatten())


def test_many_nested_blocks_decode_as_bitsandbytes(tmp_path):
    """More than 256 blocks, so that a tile starts inside a block of the double quantization."""
    stored, expected = four_bit(torch.randn(300, 200).bfloat16(), quant_type="nf4", compress_statistics=True)
    path = write(tmp_path / "ckpt", stored)
    for first, last in ((0, 300), (83, 84), (99, 271), (299, 300)):
        assert torch.equal(
            decoded(path, "w.weight", first * 200, last * 200)[1], expected[first:last].flatten()
        )


@pytest.mark.parametrize("shape", [(48, 64), (48, 33), (7, 9)])
@pytest.mark.parametrize("double", [True, False])
def test_four_bit_conv1d_is_transposed_back(shape, double, tmp_path):
    """Rows of the output are columns of what is stored, also where two of them share a byte."""
    packed, expected = four_bit(torch.randn(shape).bfloat16(), quant_type="nf4", compress_statistics=double)
    stored = {name.replace("w.weight", "h.0.c_fc.weight"): t for name, t in packed.items()}
    path = write(tmp_path / "ckpt", stored, model_type="gpt2")
    spec, values = decoded(path, "h.0.c_fc.weight")
    assert spec.shape == shape[::-1]
    assert torch.equal(values.view(spec.shape), expected.T)
    rows = slice(2, 5)
    part = decoded(path, "h.0.c_fc.weight", rows.start * shape[0], rows.stop * shape[0])[1]
    assert torch.equal(part.view(-1, shape[0]), expected.T[rows])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.booleans(), st.data())
def test_int8_decodes_as_bitsandbytes(rows, cols, conv1d, data):
    """q · SCB · fp32(1/127) in fp32, transposed back for HF Conv1D."""
    q, scb, _ = bnb.int8_vectorwise_quant(torch.randn(rows, cols).half())
    expected = bnb.int8_vectorwise_dequant(q, scb)
    expected = expected.T if conv1d else expected
    first = data.draw(st.integers(0, expected.shape[0] - 1))
    stored = {
        "a.c_fc.weight": q,
        "a.c_fc.SCB": scb,
        "a.c_fc.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    with tempfile.TemporaryDirectory() as d:
        path = write(d, stored, model_type="gpt2" if conv1d else "llama")
        spec, values = decoded(path, "a.c_fc.weight", first * expected.shape[1])
    assert spec.shape == tuple(expected.shape)
    assert torch.equal(values.view(-1, expected.shape[1]), expected[first:])


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.__name__.rpartition(".")[2])
def test_a_codec_claims_nothing_it_cannot_open(codec, base):
    """Contract of the table: claims name stored tensors, each at most once, and every claim opens."""
    for kind in ("bf16", "nf4_dq", "int8", "gpt2_nf4"):
        ckpt = Checkpoint(LocalFolder(base(kind)))
        claims, dropped = codec.claim(ckpt.tensors, ckpt.config)
        claimed = [*dropped, *(name for names in claims.values() for name in names)]
        assert len(claimed) == len(set(claimed)) and set(claimed) <= ckpt.tensors.keys()
        for weight, names in claims.items():
            assert codec.open_sources(weight, names, ckpt).names == names
        ckpt.close()


@pytest.mark.parametrize("kind", ["bf16", "nf4_dq", "fp4_dq", "int8", "gpt2_int8"])
def test_every_stored_tensor_is_claimed_exactly_once(kind, base):
    ckpt = Checkpoint(LocalFolder(base(kind)))
    claimed = [name for sources in open_weights(ckpt).values() for name in sources.names]
    assert sorted(claimed) == sorted(ckpt.tensors)
    ckpt.close()


def drop(companion):
    return lambda stored: stored.pop(f"w.weight.{companion}")


def shorten(companion):
    return lambda stored: stored.update({f"w.weight.{companion}": stored[f"w.weight.{companion}"][:-1]})


def rewrite(**fields):
    def change(stored):
        name = "w.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(stored[name].tolist())) | fields
        stored[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def garble(stored):
    stored["w.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b"{nope"), dtype=torch.uint8)


BROKEN = [
    (drop("absmax"), "absmax is missing, expected U8 with 20 elements"),
    (drop("quant_map"), "quant_map is missing, expected F32 with 16 elements"),
    (drop("nested_absmax"), "nested_absmax is missing, expected F32 with 1 elements"),
    (shorten("absmax"), "absmax is U8 with 19 elements, expected U8 with 20 elements"),
    (shorten("quant_map"), "quant_map is F32 with 15 elements, expected F32 with 16 elements"),
    (rewrite(shape=[20, 65]), "absmax is U8 with 20 elements, expected U8 with 21 elements"),
    (rewrite(shape=[20, -64]), "shape or block size is not a positive whole number"),
    (rewrite(shape="20x64"), "shape or block size is not a positive whole number"),
    (rewrite(blocksize=128), "absmax is U8 with 20 elements, expected U8 with 10 elements"),
    (rewrite(blocksize=63), "the block size 63 is odd"),
    (rewrite(blocksize=1 << 40), "a block size is larger than 65536"),
    (rewrite(nested_blocksize=1 << 63), "a block size is larger than 65536"),
    (rewrite(dtype="int4"), "the dtype is 'int4'"),
    (garble, "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN)
def test_broken_companions_are_refused(change, reason, tmp_path):
    stored, _ = four_bit(torch.randn(20, 64), quant_type="nf4", compress_statistics=True)
    change(stored)
    path = write(tmp_path / "ckpt", stored)
    with pytest.raises(CheckpointError) as caught:
        open_weights(Checkpoint(LocalFolder(path)))
    assert str(caught.value) == f"{path}: the quant_state of w.weight is broken: {reason}."


def test_packed_bytes_that_do_not_match_the_shape_are_refused(tmp_path):
    stored, _ = four_bit(torch.randn(20, 64), quant_type="nf4")
    stored["w.weight"] = stored["w.weight"][:-1]
    path = write(tmp_path / "ckpt", stored)
    with pytest.raises(CheckpointError, match=r"639 bytes are stored, \[20, 64\] needs 640"):
        open_weights(Checkpoint(LocalFolder(path)))


def test_int8_in_another_layout_is_refused(tmp_path):
    """weight_format 0 is "row"; the others are layouts of GPUs of the past."""
    q, scb, _ = bnb.int8_vectorwise_quant(torch.randn(4, 8).half())
    path = write(
        tmp_path / "a", {"w.weight": q, "w.SCB": scb, "w.weight_format": torch.tensor(1, dtype=torch.uint8)}
    )
    with pytest.raises(CheckpointError, match=r"weight_format other than 0 \(row\)"):
        open_weights(Checkpoint(LocalFolder(path)))
    path = write(tmp_path / "b", {"w.weight": q, "w.SCB": scb[:-1]})
    with pytest.raises(
        CheckpointError, match=r"w.weight is I8 \[4, 8\], its SCB F32 \[3\]; expected SCB F32 \[4\]"
    ):
        open_weights(Checkpoint(LocalFolder(path)))


def test_codes_without_companions_are_refused(tmp_path):
    """A quantized checkpoint whose quant_state is gone must not come out as a file of integers."""
    path = write(
        tmp_path / "ckpt",
        {"w.weight": torch.zeros(4, 1, dtype=torch.uint8)},
        quantization_config={"load_in_4bit": True},
    )
    with pytest.raises(
        CheckpointError,
        match=r"w\.weight is quantized, but other parts of it \(codes, scales, quant_state, SCB\)",
    ):
        open_weights(Checkpoint(LocalFolder(path)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", ["another", "\x1b[31m", 5, ["bitsandbytes"]])
def test_unsupported_quantization(method, nested, tmp_path):
    """A checkpoint of another quantization is refused before its integers are taken for weights."""
    quantized = {"quantization_config": {"quant_method": method}}
    path = write(
        tmp_path / "ckpt", {"w": torch.zeros(2)}, **({"text_config": quantized} if nested else quantized)
    )
    name = "\\x1b[31m" if method == "\x1b[31m" else method
    with closing(Checkpoint(LocalFolder(path))) as ckpt, pytest.raises(CheckpointError) as caught:
        open_weights(ckpt)
    assert str(caught.value) == (
        f"{path}/config.json: the checkpoint is quantized with {name}; this format is not read "
        "(docs/bases.md lists those that are). Dequantize it first, or merge into the full-precision "
        "checkpoint."
    )


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("bitnet", "Merge into the checkpoint in bfloat16 that it was packed from."),
        (
            "eetq",
            "The order of its codes is that of one kind of GPU: merge into the full-precision checkpoint.",
        ),
        (
            "quanto",
            "Load it with optimum-quanto, save `weight.dequantize()` of each layer, and merge into that.",
        ),
        (
            "spqr",
            "Its own library dequantizes it: save that, or merge into the full-precision checkpoint.",
        ),
        ("gguf", "transformers loads it with `gguf_file=`: save that, and merge into it."),
        ("higgs", "Dequantize it with transformers (`model.dequantize()`), or merge"),
    ],
)
def test_what_to_do_instead(method, hint, tmp_path):
    """Of formats that cannot be dequantized by their own means, or have a way of their own."""
    config = {"quantization_config": {"quant_method": method}}
    path = write(tmp_path / "ckpt", {"w": torch.zeros(2)}, **config)
    with closing(Checkpoint(LocalFolder(path))) as ckpt, pytest.raises(CheckpointError) as caught:
        open_weights(ckpt)
    assert (
        f"quantized with {method}; this format is not read (docs/bases.md lists those that are). {hint}"
        in (str(caught.value))
    )


def test_gguf(tmp_path):
    """A folder with nothing but a GGUF file."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"It has model-Q4_K_M\.gguf: load that with `gguf_file=`"):
        Checkpoint(LocalFolder(tmp_path))


@pytest.mark.parametrize("quantization", [{"quant_method": "bitsandbytes"}, {"load_in_4bit": True}, {}])
def test_supported_quantization(quantization, tmp_path):
    """bitsandbytes is not refused, and neither are its old configs, which name no method."""
    path = write(tmp_path / "ckpt", {"w": torch.zeros(2)}, quantization_config=quantization)
    with closing(Checkpoint(LocalFolder(path))) as ckpt:
        assert list(open_weights(ckpt)) == ["w"]
