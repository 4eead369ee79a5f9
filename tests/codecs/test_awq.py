"""AWQ, against a packer and a decoder that are written here from the format."""

from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import SIZES, extreme, signed
from quantized_base import CPU, DTYPES, MODULE, check_decoding, check_merging, decoded, dtypes, refusal, write
from small_floats import same_bits

import lorafuse
from lorafuse.codecs import Arena, bands, open_weights
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box

WEIGHT = f"{MODULE}.weight"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, that each half byte of a word holds, lowest first
QUANTIZATION = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def words(codes):
    """int32 [rows, outputs / 8], of codes [rows, outputs]."""
    rows = []
    for row in codes.tolist():
        eights = [row[first : first + 8] for first in range(0, len(row), 8)]
        numbers = [sum(eight[ORDER[i]] << (4 * i) for i in range(8)) for eight in eights]
        rows.append([signed(number) for number in numbers])
    return torch.tensor(rows, dtype=torch.int32)


def module(n_outputs, n_groups, group_size, dtype=torch.float16, scales=None, *, zeros=True, name=MODULE):
    """(stored tensors of a random weight, its values)."""
    codes = torch.randint(0, 16, (n_groups * group_size, n_outputs))
    zero = torch.randint(0, 16, (n_groups, n_outputs)) * int(zeros)
    scales = extreme((n_groups, n_outputs), torch.float16, "ordinary") if scales is None else scales
    stored = {f"{name}.qweight": words(codes), f"{name}.scales": scales}
    if zeros:
        stored[f"{name}.qzeros"] = words(zero)
    numbers = torch.empty(codes.shape, dtype=torch.float64)
    for k in range(len(codes)):
        numbers[k] = scales[k // group_size].to(dtype).double() * (codes[k] - zero[k // group_size])
    return stored, numbers.T.to(dtype).contiguous()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_decoding(data):
    """Any shape, any dtype of scales and model, extreme scales; tiles that begin inside a word, bands and
    chunks of one word and of all."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    n_outputs, n_groups = 8 * data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    dtype, of_scales = data.draw(dtypes), DTYPES[data.draw(dtypes)]
    scales = extreme((n_groups, n_outputs), of_scales, data.draw(st.sampled_from(SIZES)))
    size, zeros = data.draw(st.integers(1, 20)), data.draw(st.booleans())
    stored, expected = module(n_outputs, n_groups, size, DTYPES[dtype], scales, zeros=zeros)
    before = bands.WINDOWS_NBYTES, bands.CHUNK_NUMEL
    bands.WINDOWS_NBYTES = data.draw(st.sampled_from([1, 16_000_000]))
    bands.CHUNK_NUMEL = data.draw(st.sampled_from([1, 200, 1 << 17]))
    try:
        check_decoding(stored, QUANTIZATION | {"zero_point": zeros}, expected, dtype=dtype)
    finally:
        bands.WINDOWS_NBYTES, bands.CHUNK_NUMEL = before


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"},
        {"quant_method": "awq", "format": "gemm"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4},
        {},
    ],
)
def test_configs(section):
    """Older names of fields, auto-round's packing, and none at all."""
    stored, expected = module(16, 3, 16)
    check_decoding(stored, section, expected, dtype="float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged(dtype, tmp_path):
    """Two weights, a bias and a dense weight beside them."""
    expected = {f"{MODULE}.bias": torch.randn(32).to(DTYPES[dtype])}
    stored = dict(expected)
    for name, n_outputs, n_groups in ((MODULE, 32, 2), ("model.layers.0.mlp.down_proj", 64, 1)):
        tensors, expected[f"{name}.weight"] = module(n_outputs, n_groups, 32, DTYPES[dtype], name=name)
        stored |= tensors
    receipt = check_merging(tmp_path, stored, QUANTIZATION, expected, dtype=dtype)
    assert receipt["base_semantics"] == "stored in AWQ, 4 bit, block size 32"


def test_dtype_without_a_config(tmp_path):
    """float16, where no dense weight says another."""
    stored, expected = module(16, 2, 32)
    assert same_bits(decoded(write(tmp_path / "ckpt", stored, QUANTIZATION, dtype=None), WEIGHT), expected)


def test_read_once(tmp_path, monkeypatch):
    """In bands, whatever the tiles: each stored byte once, in reads of a band's width."""
    monkeypatch.setattr(bands, "WINDOWS_NBYTES", 30_000)
    stored, expected = module(512, 8, 32)
    path = write(tmp_path / "ckpt", stored, QUANTIZATION, dtype="float16")
    reads = []
    with closing(Checkpoint(LocalFolder(path))) as ckpt:
        sources, arena = open_weights(ckpt)[WEIGHT], Arena(CPU)
        read = ckpt.read_into
        monkeypatch.setattr(ckpt, "read_into", lambda *a: (reads.append(memoryview(a[2]).nbytes), read(*a)))
        for row in range(0, 512, 4):
            made = sources.values(Box.of_rows(sources.spec, row, row + 4), arena)
        assert same_bits(made, expected[-4:].reshape(-1)) and sources.window_nbytes <= 30_000
    assert sum(reads) == sum(tensor.nbytes for tensor in stored.values()) and len(reads) < 2000


def i32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


DAMAGED = {
    "no codes": ({"qweight": None}, f"{MODULE}.qzeros"),
    "no scales": ({"scales": None}, f"{MODULE}.qweight"),
    "codes of another dtype": ({"qweight": torch.zeros(64, 4, dtype=torch.int16)}, f"{MODULE}.qweight"),
    "codes of another shape": ({"qweight": i32(64, 5)}, f"{MODULE}.qweight"),
    "zeros of another shape": ({"qzeros": i32(2, 5)}, f"{MODULE}.qweight"),
    "zeros of another dtype": ({"qzeros": torch.zeros(2, 4)}, f"{MODULE}.qweight"),
    "scales of another shape": ({"scales": torch.zeros(3, 32).half()}, f"{MODULE}.qweight"),
    "scales of another dtype": ({"scales": i32(2, 32)}, f"{MODULE}.qweight"),
    "groups that do not divide": (
        {"scales": torch.zeros(3, 32).half(), "qzeros": i32(3, 4)},
        f"{MODULE}.qweight",
    ),
    "no groups": ({"scales": torch.zeros(0, 32).half(), "qzeros": i32(0, 4)}, f"{MODULE}.qweight"),
    "no outputs": (
        {"scales": torch.zeros(2, 0).half(), "qzeros": i32(2, 0), "qweight": i32(64, 0)},
        f"{MODULE}.qweight",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("section", [QUANTIZATION, {}])
def test_damaged(case, section):
    changes, text = DAMAGED[case]
    stored = module(32, 2, 32)[0] | {f"{MODULE}.{name}": tensor for name, tensor in changes.items()}
    assert text in refusal({name: tensor for name, tensor in stored.items() if tensor is not None}, section)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"version": "gemv"}, "AWQ in version gemv is not read, only gemm. Load the model"),
        ({"version": "gemv_fast"}, "AWQ in version gemv_fast is not read"),
        ({"version": ["gemm"]}, "AWQ in version ['gemm'] is not read"),
        ({"quant_method": "gptq"}, "its tensors are those of AWQ, and the config says gptq."),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
            "its tensors are those of AWQ, and the config's packing is auto_round:auto_gptq.",
        ),
    ],
)
def test_other_versions_are_refused(section, text):
    assert f"{WEIGHT}: {text}" in refusal(module(32, 2, 32)[0], QUANTIZATION | section)


@pytest.mark.parametrize("activation", ["act", "gelu_impl"])
def test_scaled_activations_are_refused(activation):
    """Nothing of the dense model could do that."""
    name = f"model.layers.0.mlp.{activation}.scales"
    text = refusal(module(32, 2, 32)[0] | {name: torch.ones(64)}, QUANTIZATION)
    assert f"{WEIGHT}: the layer takes activations that {name} scales;" in text


def test_inspected_by_its_headers(tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.inspection.checkpoint.open_weights", lambda ckpt: {})
    stored, expected = module(32, 2, 32)
    (row,) = lorafuse.inspect(write(tmp_path / "ckpt", stored, QUANTIZATION))["storage"]
    assert (row["scheme"], row["bits"], row["blocksize"]) == ("AWQ, 4 bit, block size 32", 4, 32)
    assert row["n_parameters"] == expected.numel()


@pytest.mark.parametrize("said", [{"zero_point": True}, {}])
def test_lost_zero_points(said):
    """Where the config does not say that there are none."""
    stored, _ = module(16, 3, 16, zeros=False)
    text = refusal(stored, {"quant_method": "awq", "bits": 4, **said})
    assert text == (
        f"{WEIGHT}: {MODULE}.qzeros is missing, without which only a config with zero_point: false is read."
    )
