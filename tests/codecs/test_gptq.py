"""GPTQ, against a packer and a decoder that are written here from the format."""

import json
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
from build import write_adapter, write_checkpoint, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import SIZES, extreme, stream
from quantized_base import CPU, DTYPES, MODULE, check_decoding, check_merging, decoded, dtypes, refusal, write
from safetensors.torch import load_file
from small_floats import same_bits

import lorafuse
from lorafuse.codecs import Arena, bands, open_weights
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box

WEIGHT = f"{MODULE}.weight"
V1, V2 = "gptq", "gptq_v2"
BITS = [2, 3, 4, 8]


def quantization(layout=V1, **further):
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": layout} | further


def zeros_to_store(zeros, bits, layout):
    """Version 1 holds them minus 1, borrowed from a whole word; of 3 bits, from each code."""
    words = stream(zeros, bits)
    if layout == V2:
        return words
    if bits == 3:
        return stream((zeros - 1) % 8, bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    less = [[(word - ones) & 0xFFFFFFFF for word in row] for row in words.tolist()]
    return torch.tensor([[w - (1 << 32) if w >> 31 else w for w in row] for row in less], dtype=torch.int32)


def module(shape, groups, bits, layout=V1, scales=None, zeros=None, name=MODULE, g_idx=True):
    """(stored tensors of a random weight (out, in), its values in float64 before rounding). `groups`: the
    group of each input."""
    n_outputs, n_groups = shape[0], max(groups) + 1
    codes = torch.randint(0, 1 << bits, shape)
    zeros = torch.randint(0, 1 << bits, (n_groups, n_outputs)) if zeros is None else zeros
    scales = extreme((n_groups, n_outputs), torch.float16, "ordinary") if scales is None else scales
    stored = {
        f"{name}.qweight": stream(codes, bits).T.contiguous(),
        f"{name}.qzeros": zeros_to_store(zeros, bits, layout),
        f"{name}.scales": scales,
    }
    if g_idx:
        stored[f"{name}.g_idx"] = torch.tensor(groups, dtype=torch.int32)
    numbers = torch.empty(shape, dtype=torch.float64)
    for k, group in enumerate(groups):
        numbers[:, k] = scales[group].double() * (codes[:, k] - zeros[group])
    # Products are exact in float64, also where they are signed zeros.
    return stored, numbers.to(scales.dtype)


def runs(n_inputs, size):
    return [k // size for k in range(n_inputs)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_decoding(data):
    """All bits, both versions, any order of inputs, ragged groups, any dtype of scales and model, extreme
    scales, bands of one word and of all."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bits, layout = data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from([V1, V2]))
    n_outputs = 32 // {2: 2, 3: 1, 4: 4, 8: 8}[bits] * data.draw(st.integers(1, 4))
    n_inputs = data.draw(st.integers(1, 80))
    groups = runs(n_inputs, data.draw(st.integers(1, 40)))
    if data.draw(st.booleans()):
        groups = [groups[k] for k in torch.randperm(n_inputs).tolist()]
    of_scales = DTYPES[data.draw(dtypes)]
    scales = extreme((max(groups) + 1, n_outputs), of_scales, data.draw(st.sampled_from(SIZES)))
    stored, numbers = module((n_outputs, n_inputs), groups, bits, layout, scales)
    dtype = data.draw(dtypes)
    before, bands.WINDOWS_NBYTES = bands.WINDOWS_NBYTES, data.draw(st.sampled_from([1, 16_000_000]))
    chunk, bands.CHUNK_NUMEL = bands.CHUNK_NUMEL, data.draw(st.sampled_from([1, 200, 1 << 17]))
    try:
        check_decoding(stored, quantization(layout), numbers.to(DTYPES[dtype]), dtype=dtype)
    finally:
        bands.WINDOWS_NBYTES, bands.CHUNK_NUMEL = before, chunk


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", [V1, V2])
def test_every_zero_point(bits, layout):
    """Also zero, for which version 1 borrows from the next code of the word."""
    zeros = torch.arange(64)[None] % (1 << bits)
    stored, numbers = module((64, 32), [0] * 32, bits, layout, zeros=zeros)
    check_decoding(stored, quantization(layout), numbers, dtype="float16")


@pytest.mark.parametrize(
    ("further", "shape", "size"),
    [
        ({"group_size": 32}, (8, 96), 32),
        ({"group_size": -1}, (8, 96), 96),
        ({"group_size": 40}, (8, 96), 40),  # the last group is smaller
        ({"group_size": 64, "dynamic": {"+:.*up_proj": {"group_size": 40}}}, (8, 96), 40),
        ({"group_size": 32, "dynamic": {"-:.*q_proj": {}}}, (8, 64), 16),
    ],
)
def test_without_g_idx(further, shape, size):
    """Groups are runs of inputs, of the size that makes so many."""
    stored, numbers = module(shape, runs(shape[1], size), 4, g_idx=False)
    check_decoding(stored, quantization(**further), numbers, dtype="float16")


@pytest.mark.parametrize(
    ("further", "size"),
    [
        ({"group_size": 64, "dynamic": {"+:.*k_proj": {"group_size": 48}}}, 64),
        ({"group_size": 64, "dynamic": {"+:.*up_proj": {"group_size": 48}}}, 48),
        ({"group_size": 64, "dynamic": {r"model\.layers\.0\.": {"group_size": 48}}}, 48),
        (
            {"group_size": 64, "dynamic": {"up_proj": {"group_size": 48}}},
            64,
        ),  # names are matched from the start
        ({"group_size": 64, "dynamic": {".*up": {"bits": 4}, ".*up_proj": {"group_size": 48}}}, 64),
        ({"group_size": 48, "dynamic": {"-:.*up": {}, ".*up_proj": {"group_size": 64}}}, 48),
        ({"group_size": 64, "dynamic": {"(": {"group_size": 48}, ".*": {"group_size": 48}}}, 48),
        ({"group_size": 64, "extra_config": {MODULE: {"group_size": 48}, ".*": {"group_size": 64}}}, 48),
        ({"group_size": 64, "extra_config": {"up_pro.$": {"group_size": 48}}}, 48),
        ({"group_size": 64, "extra_config": {"mlp.up_proj": {"group_size": 48}}}, 64),
        ({"group_size": 64, "extra_config": {"lm_head": {"group_size": 48}}}, 64),
    ],
)
def test_groups_of_a_module(further, size):
    """Two groups of 64 and 32 inputs, or of 48 each, without g_idx: the config says it of each module."""
    stored, numbers = module((8, 96), runs(96, size), 4, g_idx=False)
    check_decoding(stored, quantization(**further), numbers, dtype="float16")


def test_groups_that_the_config_leaves_open():
    """What it says of the module makes another number of groups."""
    stored, _ = module((8, 96), runs(96, 64), 4, g_idx=False)
    others = {"+:.*k_proj": {"group_size": 48}, "+:.*v_proj": {"group_size": 64}}
    text = refusal(stored, quantization(group_size=32, dynamic=others))
    assert text == (
        f"{WEIGHT}: 2 groups of 96 inputs, of which {MODULE}.qweight has no g_idx, may have 48 or 64 inputs "
        "each by the config's group_size."
    )


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, V1),
        ({"packing_format": "auto_round:auto_gptq"}, V1),
        ({"packing_format": "auto_round"}, V2),
        ({"backend": "auto_round:gptqmodel"}, V2),
    ],
)
def test_auto_round(config, layout):
    """Asymmetric weights in its own packing have zero points as they are."""
    stored, numbers = module((16, 64), runs(64, 32), 4, layout, g_idx=False)
    section = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False} | config
    check_decoding(stored, section, numbers, dtype="float16")


@pytest.mark.parametrize("layout", [V1, V2])
def test_announced_by_quantize_config(layout, tmp_path):
    """Alone: its version decides, and the result has no such file."""
    stored, numbers = module((16, 64), runs(64, 32), 4, layout, g_idx=False)
    path = write_checkpoint(
        tmp_path / "ckpt",
        stored | {"model.embed_tokens.weight": torch.ones(8, 4)},
        config={"model_type": "llama", "torch_dtype": "float16", "vocab_size": 8},
    )
    write_json(path / "quantize_config.json", {"bits": 4, "group_size": 32, "checkpoint_format": layout})
    assert same_bits(decoded(path, WEIGHT), numbers)
    key = f"base_model.model.{MODULE}"
    lora = {f"{key}.lora_A.weight": torch.ones(1, 64), f"{key}.lora_B.weight": torch.full((16, 1), 2.0**-24)}
    adapter = write_adapter(tmp_path / "adapter", lora, r=1, lora_alpha=1, target_modules=["up_proj"])
    receipt = lorafuse.convert(path, adapter, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")[WEIGHT]
    assert f"{path}/quantize_config.json" in [entry["path"] for entry in receipt["inputs"]]
    lorafuse.verify(tmp_path / "out", ckpt=path, adapters=[adapter])
    assert torch.equal(made, (numbers.float() + 2.0**-24).half())
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_a_broken_quantize_config(tmp_path):
    stored, _ = module((16, 64), runs(64, 32), 4)
    path = write_checkpoint(tmp_path / "ckpt", stored, config={"model_type": "llama"})
    (path / "quantize_config.json").write_text("{")
    with pytest.raises(lorafuse.CheckpointError) as caught:
        Checkpoint(LocalFolder(path))
    assert f"{path}/quantize_config.json: is not valid JSON" in str(caught.value)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_conv1d(data):
    """The weight of an HF Conv1D is (in, out), as it is stored."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bits, name = data.draw(st.sampled_from(BITS)), "h.0.mlp.c_fc"
    shape = 32 * data.draw(st.integers(1, 3)), 32 * data.draw(st.integers(1, 4))
    groups = runs(shape[1], data.draw(st.sampled_from([8, 32, 128])))
    if data.draw(st.booleans()):
        groups = [groups[k] for k in torch.randperm(shape[1]).tolist()]
    stored, numbers = module(shape, groups, bits, name=name)
    dtype = data.draw(dtypes)
    expected = numbers.T.to(DTYPES[dtype]).contiguous()
    check_decoding(stored, quantization(), expected, f"{name}.weight", dtype=dtype, model_type="gpt2")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged(dtype, tmp_path):
    """Two weights, of different bits, one with its inputs in another order, a bias, a quantized head."""
    order = [runs(64, 16)[k] for k in torch.randperm(64).tolist()]
    stored, numbers = module((32, 64), order, 4)
    head, of_head = module((64, 64), runs(64, 32), 8, name="lm_head")
    bias = {f"{MODULE}.bias": torch.randn(32).half()}
    expected = {WEIGHT: numbers, "lm_head.weight": of_head}
    expected = {name: values.to(DTYPES[dtype]) for name, values in expected.items()} | bias
    receipt = check_merging(
        tmp_path,
        stored | head | bias,
        quantization(dynamic={"+:lm_head": {"bits": 8}}, lm_head=True),
        expected,
        dtype=dtype,
    )
    assert receipt["base_semantics"] == "stored in GPTQ, 8 bit, block size 32"


def test_dtype_without_a_config(tmp_path):
    """float16, where no dense weight says another."""
    stored, numbers = module((16, 64), runs(64, 32), 4)
    path = write(tmp_path / "ckpt", stored, quantization(), dtype=None)
    assert same_bits(decoded(path, WEIGHT), numbers)


def test_read_once(tmp_path, monkeypatch):
    """In bands, whatever the tiles: each stored byte once, in reads of a band's width."""
    monkeypatch.setattr(bands, "WINDOWS_NBYTES", 30_000)
    stored, numbers = module((512, 256), runs(256, 32), 4)
    path = write(tmp_path / "ckpt", stored, quantization(), dtype="float16")
    reads = []
    with closing(Checkpoint(LocalFolder(path))) as ckpt:
        sources, arena = open_weights(ckpt)[WEIGHT], Arena(CPU)
        read = ckpt.read_into
        monkeypatch.setattr(ckpt, "read_into", lambda *a: (reads.append(memoryview(a[2]).nbytes), read(*a)))
        made = [sources.values(Box.of_rows(sources.spec, row, row + 4), arena) for row in range(0, 512, 4)]
        made = torch.cat([tile.clone() for tile in made[-1:]])
        assert sources.window_nbytes <= 30_000
    nbytes = sum(t.nbytes for name, t in stored.items() if not name.endswith("g_idx"))
    assert sum(reads) == nbytes and len(reads) < 600
    assert same_bits(made, numbers[-4:].reshape(-1))


def damaged(**changes):
    stored, _ = module((32, 64), runs(64, 32), 4)
    stored |= {f"{MODULE}.{name}": tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in stored.items() if tensor is not None}


def i32(*shape, value=0):
    return torch.full(shape, value, dtype=torch.int32)


DAMAGED = {
    "no codes": ({"qweight": None}, f"{MODULE}.g_idx"),
    "no zeros": ({"qzeros": None}, f"{MODULE}.qweight"),
    "no scales": ({"scales": None}, f"{MODULE}.qweight"),
    "no codes, no zeros": ({"qweight": None, "qzeros": None}, f"{MODULE}.g_idx"),
    "scales alone": ({"qweight": None, "qzeros": None, "g_idx": None}, f"{MODULE}.scales"),
    "codes of another dtype": ({"qweight": torch.zeros(8, 32, dtype=torch.int16)}, f"{MODULE}.qweight"),
    "scales of another shape": ({"scales": torch.zeros(3, 32).half()}, f"{MODULE}.qweight"),
    "codes of another shape": ({"qweight": i32(9, 32)}, f"{MODULE}.qweight I32 [9, 32] does not hold 64"),
    "no inputs": ({"qweight": i32(0, 32), "g_idx": i32(0)}, WEIGHT),
    "g_idx too short": ({"g_idx": i32(8)}, f"{MODULE}.g_idx is I32 [8]; expected I32 [64]"),
    "g_idx a word too short": ({"g_idx": i32(56)}, f"{MODULE}.qweight I32 [8, 32] does not hold 56"),
    "g_idx of another dtype": ({"g_idx": torch.zeros(64)}, f"{MODULE}.g_idx is F32 [64]"),
    "groups too high": ({"g_idx": i32(64, value=2)}, f"{MODULE}.g_idx holds 2 to 2; there are 2 groups"),
    "groups below zero": ({"g_idx": i32(64, value=-1)}, f"{MODULE}.g_idx holds -1 to -1"),
    "5 bit": ({"qzeros": i32(2, 5)}, "GPTQ of 2, 3, 4 and 8 bit is read; 5 bit are not. Load the model"),
    "no whole bits": ({"qzeros": i32(2, 7), "scales": torch.zeros(2, 40).half(), "qweight": i32(8, 40)},
                      f"{MODULE}.qzeros I32 [2, 7] is not"),
    "no zero points": ({"qzeros": i32(2, 0)}, f"{MODULE}.qzeros I32 [2, 0] is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("section", [quantization(), {}])
def test_damaged(case, section):
    changes, text = DAMAGED[case]
    if case == "scales alone" and not section:
        return  # nothing is quantized then, by all that is said
    assert text in refusal(damaged(**changes), section)


@pytest.mark.parametrize(
    ("further", "text"),
    [
        ({"checkpoint_format": "marlin"}, "GPTQ in the layout marlin is not read, only gptq and gptq_v2."),
        ({"checkpoint_format": None, "format": "bitblas"}, "GPTQ in the layout bitblas is not read"),
        ({"checkpoint_format": ["gptq"]}, "GPTQ in the layout ['gptq'] is not read"),
        ({"pack_dtype": "int16"}, "pack_dtype int16 is not read, only int32."),
        (
            {"quant_method": "bitsandbytes"},
            "its tensors are those of GPTQ, and the config says bitsandbytes.",
        ),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:triton"},
            "GPTQ in the layout auto_round:triton is not read",
        ),
    ],
)
def test_other_layouts_are_refused(further, text):
    assert f"{WEIGHT}: {text}" in refusal(damaged(), quantization(**further))


@pytest.mark.parametrize("bits", BITS)
def test_inspected_by_its_headers(bits, monkeypatch):
    """Bits, groups, and as many parameters as the dense model has."""
    monkeypatch.setattr("lorafuse.inspection.checkpoint.open_weights", lambda ckpt: {})
    with tempfile.TemporaryDirectory() as d:
        stored, numbers = module((32, 64), runs(64, 32), bits)
        path = write(Path(d) / "ckpt", stored, quantization())
        (row,) = lorafuse.inspect(path)["storage"]
    assert (row["scheme"], row["bits"], row["blocksize"]) == (f"GPTQ, {bits} bit, block size 32", bits, 32)
    assert row["n_parameters"] == numbers.numel()
    assert json.dumps(row)


def test_a_lost_order(tmp_path):
    """g_idx is missing, though the config says that inputs are not in order; one group has no order."""
    for n_inputs, said in ((64, True), (64, False), (32, True)):
        stored, numbers = module((16, n_inputs), runs(n_inputs, 32), 4, g_idx=False)
        section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": said}
        if n_inputs > 32 and said:
            assert refusal(stored, section) == (
                f"{WEIGHT}: {MODULE}.g_idx is missing, which says the order of inputs where config.json has "
                "desc_act: true."
            )
        else:
            check_decoding(stored, section, numbers, dtype="float16")


def test_a_version_that_nothing_says():
    stored, _ = module((16, 64), runs(64, 32), 4)
    assert refusal(stored, None) == (
        f"{WEIGHT}: its tensors are those of GPTQ, and no config says of which version: 1 stores zero points "
        "minus 1, 2 as they are. Add quantization_config to config.json, with checkpoint_format."
    )
