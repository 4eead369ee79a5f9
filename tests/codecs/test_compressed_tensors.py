"""compressed-tensors, all its schemes, against packers and decoders that are written here from the format."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from quantized_base import DTYPES, MODULE, check_decoding, check_merging, dtypes, refusal, write
from small_floats import E2M1, E2M3, E4M3, E8M0, of_codes

import lorafuse

F8 = torch.float8_e4m3fn
FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def config(*weights, **further):
    groups = {f"group_{n}": {"targets": ["Linear"], "weights": said} for n, said in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]} | further


def random_bytes(*shape, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8)


def numbers(shape, dtype, factor=0.01):
    return ((torch.rand(shape) + 0.5) * factor).to(dtype)


def by_columns(values, n_cols, width):
    """[…, groups] → […, columns]: each number at every column of its group; the last may be narrower."""
    return values.repeat_interleave(width, dim=-1)[..., :n_cols]


def rounded(exact, first, last):
    """Exact products, rounded to one dtype and then to another."""
    return exact.float().to(first).to(last)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_code_for_each_byte(data):
    """FP8 and int8, a scale for each tensor, row, group or block, symmetric or not."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    n_rows, n_cols = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 40))
    strategy = data.draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    scale_dtype, dtype = data.draw(FLOATS), data.draw(dtypes)
    factor = data.draw(st.sampled_from([0.01, 2.0**-14, 300.0]))
    codes, said = random_bytes(n_rows, n_cols), {"num_bits": 8, "strategy": strategy}
    block = (data.draw(st.integers(2, n_rows)), data.draw(st.integers(1, n_cols)))
    if strategy == "group":
        said["group_size"] = block[1]
    if strategy == "block":
        said["block_structure"] = list(block)
    block = {"tensor": (n_rows, n_cols), "channel": (1, n_cols), "group": (1, block[1])}.get(strategy, block)
    grid = [-(-n // b) for n, b in zip((n_rows, n_cols), block, strict=True)]
    scales = numbers((1,) if strategy == "tensor" else grid, scale_dtype, factor)

    def spread(values):
        return by_columns(by_columns(values.view(grid).T, n_rows, block[0]).T, n_cols, block[1])

    stored = {f"{MODULE}.weight_scale": scales}
    if data.draw(st.booleans()):
        stored[f"{MODULE}.weight"], values = codes.view(F8), of_codes(E4M3, codes)
    else:
        stored[f"{MODULE}.weight"], values = codes.view(torch.int8), codes.view(torch.int8).double()
        if data.draw(st.booleans()):
            zeros = random_bytes(*scales.shape).view(torch.int8)
            stored[f"{MODULE}.weight_zero_point"] = zeros
            values = values - spread(zeros.double())
    expected = rounded(values * spread(scales.double()), scale_dtype, DTYPES[dtype])
    check_decoding(stored, config(said), expected, dtype=dtype)


def pack(codes, bits, padded):
    """int32 [rows, words] of codes (int64 [rows, n]): one after another, from the lowest bit of a row on; or
    as many as fit in a word, and the next in the next."""
    words = []
    for row in codes.tolist():
        if padded:
            per_word = 32 // bits
            chunks = [row[n : n + per_word] for n in range(0, len(row), per_word)]
        else:
            chunks = [row]
        made = []
        for chunk in chunks:
            number = sum(code << (n * bits) for n, code in enumerate(chunk))
            n_words = -(-len(chunk) * bits // 32)
            made += [number >> (32 * n) & 0xFFFFFFFF for n in range(n_words)]
        words.append([word - (1 << 32) if word >> 31 else word for word in made])
    return torch.tensor(words, dtype=torch.int32)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packed_integers(data):
    """2 to 8 bits, groups or rows, asymmetric, words with padding as they were until 2026, and act-order."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    bits = data.draw(st.integers(2, 8))
    padded = 32 % bits > 0 and data.draw(st.booleans())
    n_rows, n_cols = data.draw(st.integers(1, 70)), data.draw(st.integers(33, 90))
    assume(32 % bits == 0 or -(-n_cols // (32 // bits)) != -(-n_cols * bits // 32))  # else nobody can tell
    width = data.draw(st.one_of(st.just(n_cols), st.integers(1, n_cols)))
    scale_dtype, dtype = data.draw(FLOATS), data.draw(dtypes)
    n_groups = -(-n_cols // width)
    codes = torch.randint(0, 1 << bits, (n_rows, n_cols))
    scales = numbers((n_rows, n_groups), scale_dtype, data.draw(st.sampled_from([0.01, 2.0**-18, 1000.0])))
    stored = {
        f"{MODULE}.weight_packed": pack(codes, bits, padded),
        f"{MODULE}.weight_scale": scales,
        f"{MODULE}.weight_shape": torch.tensor(
            [n_rows, n_cols], dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))
        ),
    }
    zeros = torch.full((n_rows, n_groups), 1 << (bits - 1))
    if data.draw(st.booleans()):
        zeros = torch.randint(0, 1 << bits, (n_rows, n_groups))
        stored[f"{MODULE}.weight_zero_point"] = pack(zeros.T, bits, padded).T.contiguous()
    groups = torch.arange(n_cols) // width
    order = data.draw(st.sampled_from(["none", "order", "ignored"]))
    if order != "none":
        g_idx = groups[torch.randperm(n_cols)].int()
        groups = g_idx.long() if order == "order" else groups
        if order == "ignored":
            g_idx[-1] = -1
        stored[f"{MODULE}.weight_g_idx"] = g_idx
    values = (codes - zeros[:, groups]).double() * scales.double()[:, groups]
    expected = rounded(values, scale_dtype, DTYPES[dtype])
    said = {"num_bits": bits, "group_size": width if n_groups > 1 else None}
    check_decoding(stored, config(said), expected, dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), dtypes, st.sampled_from([0.5, 1e-3, 2000.0]))
def test_nvfp4(n_rows, n_groups, dtype, divisor):
    """Its global scale divides; values are bfloat16 before they are float16."""
    packed, codes8 = random_bytes(n_rows, n_groups * 8), random_bytes(n_rows, n_groups, high=127)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).view(n_rows, -1)
    scales = of_codes(E4M3, codes8).float() / torch.tensor([divisor])
    exact = of_codes(E2M1, codes) * by_columns(scales.double(), n_groups * 16, 16)
    stored = {
        f"{MODULE}.weight_packed": packed,
        f"{MODULE}.weight_scale": codes8.view(F8),
        f"{MODULE}.weight_global_scale": torch.tensor([divisor]),
    }
    said = {"num_bits": 4, "group_size": 16, "strategy": "tensor_group"}
    check_decoding(stored, config(said), rounded(exact, torch.bfloat16, DTYPES[dtype]), dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 3),
    dtypes,
    st.sampled_from([4, 6, 8]),
    st.sampled_from([(0, 4), (110, 130), (240, 255)]),
)
def test_mx(n_rows, n_groups, dtype, bits, exponents):
    """MXFP4, MXFP6 and MXFP8, also where a value is subnormal or too large."""
    powers = torch.randint(*exponents, (n_rows, n_groups), dtype=torch.uint8)
    stored = {f"{MODULE}.weight_scale": powers}
    if bits == 6:
        codes = torch.randint(0, 64, (n_rows, n_groups * 32))
        stored[f"{MODULE}.weight_packed"] = pack(codes, 6, False).view(torch.uint8)
        values = of_codes(E2M3, codes)
    elif bits == 4:
        packed = random_bytes(n_rows, n_groups * 16)
        stored[f"{MODULE}.weight_packed"] = packed
        values = of_codes(E2M1, torch.stack([packed & 15, packed >> 4], dim=-1).view(n_rows, -1))
    else:
        codes = random_bytes(n_rows, n_groups * 32)
        stored[f"{MODULE}.weight"], values = codes.view(F8), of_codes(E4M3, codes)
    exact = values * by_columns(of_codes(E8M0, powers), n_groups * 32, 32)
    said = {"num_bits": bits, "group_size": 32}
    check_decoding(stored, config(said), rounded(exact, torch.bfloat16, DTYPES[dtype]), dtype=dtype)


def test_stacks():
    """Experts in one tensor, with scales for each."""
    codes, scales = random_bytes(3, 4, 6), numbers((3, 4, 1), torch.bfloat16)
    stored = {f"{MODULE}.weight": codes.view(F8), f"{MODULE}.weight_scale": scales}
    exact = of_codes(E4M3, codes) * scales.double()
    check_decoding(stored, config({"num_bits": 8}), rounded(exact, torch.bfloat16, torch.bfloat16))


def int4(module, n_rows=12, n_cols=64):
    codes, scales = torch.randint(0, 16, (n_rows, n_cols)), numbers((n_rows, 2), torch.bfloat16)
    stored = {
        f"{module}.weight_packed": pack(codes, 4, False),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": torch.tensor([n_rows, n_cols]),
    }
    exact = (codes - 8).double() * by_columns(scales.double(), n_cols, 32)
    return stored, rounded(exact, torch.bfloat16, torch.bfloat16)


def fp8(module, n_rows=12, n_cols=64):
    codes, scale = random_bytes(n_rows, n_cols, high=120), numbers((1,), torch.bfloat16)
    stored = {f"{module}.weight": codes.view(F8), f"{module}.weight_scale": scale}
    return stored, rounded(of_codes(E4M3, codes) * scale.double(), torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("section", ["quantization_config", "compression_config"])
def test_merged(section, tmp_path):
    """Mixed precision: two groups; what serves inference alone is dropped."""
    down = "model.layers.0.mlp.down_proj"
    (stored, four), (more, eight) = int4(down), fp8(MODULE)
    extra = {
        f"{MODULE}.input_scale": torch.ones(1),
        "model.layers.0.self_attn.v_scale": torch.ones(1),
    }
    said = config({"num_bits": 4, "group_size": 32}, {"num_bits": 8, "strategy": "tensor"})
    said |= {"format": "mixed-precision", "transform_config": {}, "sparsity_config": {}}
    where = {} if section == "quantization_config" else {section: said}
    expected = {f"{down}.weight": four, f"{MODULE}.weight": eight}
    receipt = check_merging(tmp_path, stored | more | extra, said if not where else None, expected, **where)
    assert receipt["dropped"].keys() == extra.keys()
    assert receipt["base_semantics"] == "stored in compressed-tensors 4-bit integers, block size 32"


PACKED, SCALE, SHAPE = (f"{MODULE}.weight_{end}" for end in ("packed", "scale", "shape"))
ZERO, G_IDX = f"{MODULE}.weight_zero_point", f"{MODULE}.weight_g_idx"
DAMAGED = {
    "no scales": ({SCALE: None}, f"{PACKED} belongs to a weight"),
    "no codes": ({PACKED: None}, f"{SCALE} belongs to a weight"),
    "no shape": ({SHAPE: None}, f"{PACKED} belongs to a weight"),
    "another shape": ({SHAPE: torch.tensor([12, 72])}, f"{PACKED} is I32 [12, 8]"),
    "another height": ({SHAPE: torch.tensor([13, 64])}, f"{PACKED} is I32 [12, 8]"),
    "no numbers": ({SHAPE: torch.tensor([-12, 64])}, f"{SHAPE} is [-12, 64]"),
    "a long shape": ({SHAPE: torch.tensor([12, 64, 1])}, f"{SHAPE} is I64 [3]; expected"),
    "scales of another height": ({SCALE: torch.ones(11, 2)}, f"its scales {SCALE} are F32 [11, 2]"),
    "too many groups": ({SCALE: torch.ones(12, 5)}, f"its scales {SCALE} are F32 [12, 5]"),
    "scales of integers": ({SCALE: torch.ones(12, 2).int()}, f"{PACKED} belongs to a weight"),
    "zero points": ({ZERO: torch.ones(3, 2).int()}, f"{ZERO} is I32 [3, 2]; expected I32 with 4 elements"),
    "groups": ({G_IDX: torch.full((64,), 2).int()}, f"{G_IDX} has groups from 2 to 2; there are 2"),
    "too few groups": ({G_IDX: torch.zeros(63).int()}, f"{G_IDX} is I32 [63]; expected"),
    "codes of bytes": ({PACKED: random_bytes(12, 32)}, f"{PACKED} belongs to a weight"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case):
    """The refusal names the tensor."""
    change, text = DAMAGED[case]
    other, _ = fp8("model.layers.1.mlp.up_proj")
    stored = int4(MODULE)[0] | other | change
    present = {name: tensor for name, tensor in stored.items() if tensor is not None}
    assert text in refusal(present, config({"num_bits": 4, "group_size": 32}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": None}, "weight_scale belongs to a weight that is quantized"),
        ({"weight_scale": None}, f"{MODULE}.weight is quantized, but other parts of it"),
        ({"weight_scale": torch.ones(5, 1)}, "are F32 [5, 1], which fit no scheme"),
        ({"weight_scale": torch.ones(12, 1).double()}, "are F64 [12, 1], which fit no scheme"),
        (
            {"weight_zero_point": torch.ones(2, 1, dtype=torch.int8)},
            "weight_zero_point is I8 [2, 1]; expected",
        ),
    ],
)
def test_damaged_bytes(change, text):
    other, _ = fp8("model.layers.1.mlp.up_proj")
    stored = fp8(MODULE)[0] | {f"{MODULE}.{end}": tensor for end, tensor in change.items()}
    present = {name: tensor for name, tensor in (stored | other).items() if tensor is not None}
    assert text in refusal(present, config({"num_bits": 8}))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            "(rotations that run with the model); this format is not read (docs/bases.md lists those that "
            "are). Its stored weights are rotated, and so is what runs through them; an adapter's are not: "
            "merge into the checkpoint that was rotated, and quantize the result as that was.",
        ),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "(weights without their zeros); this format is not read (docs/bases.md lists those that are). "
            "compressed-tensors up to 0.14 puts the zeros back: load the model with that, save it dense and "
            "merge into the result, or merge into the full-precision checkpoint.",
        ),
    ],
)
def test_settings_that_change_what_is_stored(setting, words):
    text = refusal(fp8(MODULE)[0], config({"num_bits": 8}, **setting))
    assert text.endswith(f"config.json: the checkpoint has a {next(iter(setting))} {words}")


def test_bytes_of_four_or_six_bits():
    """12 bytes with a scale are 24 or 16 codes; 24 bytes are 32 of 6 bits alone, and so is what they say."""
    packed, powers = random_bytes(3, 12), random_bytes(3, 1, high=6) + 118
    four = of_codes(E2M1, torch.stack([packed & 15, packed >> 4], dim=-1).view(3, -1))
    six = [sum(int(byte) << 8 * i for i, byte in enumerate(row)) for row in packed]
    six = of_codes(E2M3, torch.tensor([[word >> 6 * i & 63 for i in range(16)] for word in six]))
    stored = {f"{MODULE}.weight_packed": packed, f"{MODULE}.weight_scale": powers}
    for bits, values in ((4, four), (6, six)):
        expected = rounded(values * of_codes(E8M0, powers), torch.bfloat16, torch.bfloat16)
        check_decoding(stored, config({"num_bits": bits}), expected)


@pytest.mark.parametrize("shape", [(12, 49), (12, 26)])
def test_bytes_of_no_width(shape):
    stored = {PACKED: random_bytes(*shape), SCALE: random_bytes(12, 1)}
    assert f"{PACKED} makes a weight" in refusal(stored, config({"num_bits": 6, "group_size": 32}))


def test_a_width_of_two_layouts_is_refused():
    """33 codes of 3 bits are 4 words, with padding or without."""
    stored = {
        PACKED: pack(torch.ones(12, 33).long(), 3, False),
        SCALE: torch.ones(12, 1),
        SHAPE: torch.tensor([12, 33]),
    }
    assert f"{PACKED} is I32 [12, 4], which is not what num_bits" in refusal(stored, config({"num_bits": 3}))


def test_presets():
    """A config that names a preset says nothing of bits: they follow from the width."""
    stored, expected = int4(MODULE)
    check_decoding(stored, config() | {"config_groups": {"W4A16": ["Linear"]}}, expected)


def test_lost_zero_points():
    """Where every group of the config is asymmetric."""
    stored, expected = int4(MODULE)
    assert not any(name.endswith("zero_point") for name in stored)
    said = {"num_bits": 4, "symmetric": False}
    assert refusal(stored, config(said)) == f"{PACKED} lacks its weight_zero_point."
    check_decoding(stored, config(said, said | {"symmetric": True}), expected)


@pytest.mark.parametrize(
    ("said", "words"), [({}, ", a scale for each row"), ({"group_size": 32}, ", block size 32")]
)
def test_a_scale_for_each_row(said, words, tmp_path):
    """Rows of one group are called after the config."""
    codes = torch.zeros(4, 32, dtype=torch.int64)
    stored = {f"{MODULE}.weight_packed": pack(codes, 4, padded=False)}
    stored |= {f"{MODULE}.weight_scale": torch.ones(4, 1), f"{MODULE}.weight_shape": torch.tensor([4, 32])}
    path = write(tmp_path / "ckpt", stored, config({"num_bits": 4, **said}))
    assert lorafuse.inspect(path)["storage"][0]["scheme"] == f"compressed-tensors 4-bit integers{words}"
