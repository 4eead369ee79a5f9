"""Each format against the library that it comes from: `make oracle`.

What a library packs decodes to the bits that it dequantizes it to. ModelOpt, torchao and AQLM stand in
test_vendor_libraries.py.
"""

import pytest
import torch
from quantized_base import DTYPES, MODULE, decoded, write
from small_floats import same_bits

pytestmark = pytest.mark.oracle
WEIGHT = f"{MODULE}.weight"
N_ROWS, N_COLS = 24, 128


def random_weight(dtype, spread):
    """`spread`: powers of two between the rows."""
    torch.manual_seed(spread)
    sizes = torch.exp2(torch.randint(-spread, spread + 1, (N_ROWS, 1)).float())
    return (torch.randn(N_ROWS, N_COLS) * 0.1 * sizes).to(dtype)


def check(tmp_path, stored, quantization, expected, key="quantization_config", **config):
    """`expected` is what lorafuse decodes, whole and in tiles."""
    section = {key: quantization}
    path = write(tmp_path / "base", stored, None, **{**config, **section})
    for rows in (None, 7):
        made = decoded(path, WEIGHT, rows=rows)
        assert same_bits(made, expected.contiguous()), (made, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_affine(bits, spread, dtype, tmp_path):
    mx = pytest.importorskip("mlx.core")
    weight = mx.array(random_weight(torch.float32, spread).numpy()).astype(getattr(mx, dtype))
    parts = mx.quantize(weight, group_size=32, bits=bits)
    expected = mx.dequantize(*parts, group_size=32, bits=bits)
    stored = of_mlx(mx, tmp_path, weight=parts[0], scales=parts[1], biases=parts[2])
    check(
        tmp_path,
        stored,
        {"group_size": 32, "bits": bits},
        to_torch(mx, expected, dtype),
        "quantization",
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_mlx_floats(mode, dtype, tmp_path):
    mx = pytest.importorskip("mlx.core")
    weight = mx.array(random_weight(torch.float32, 4).numpy()).astype(getattr(mx, dtype))
    codes, scales = mx.quantize(weight, mode=mode)
    expected = mx.dequantize(codes, scales, mode=mode, dtype=getattr(mx, dtype))
    said = {"mode": mode, "bits": 8 if mode == "mxfp8" else 4, "group_size": 16 if mode == "nvfp4" else 32}
    stored = of_mlx(mx, tmp_path, weight=codes, scales=scales)
    check(tmp_path, stored, said, to_torch(mx, expected, dtype), "quantization", dtype=dtype)


def of_mlx(mx, tmp_path, **tensors):
    """The module's tensors, as mlx writes them into a file."""
    from safetensors.torch import load_file

    mx.save_safetensors(str(tmp_path / "mlx.safetensors"), {f"{MODULE}.{k}": v for k, v in tensors.items()})
    return load_file(tmp_path / "mlx.safetensors")


def to_torch(mx, values, dtype):
    import numpy as np

    return torch.from_numpy(np.array(values.astype(mx.float32))).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_hqq(bits, axis, dtype, tmp_path):
    quantize = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(N_COLS, N_ROWS, bias=False)
    linear.weight.data = random_weight(torch.float32, 2)
    said = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer = quantize.HQQLinear(linear, said, compute_dtype=DTYPES[dtype], device="cpu")
    stored = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
    check(tmp_path, stored, {"quant_method": "hqq"}, layer.dequantize(), dtype=dtype)


@pytest.mark.parametrize("order", ["runs", "act-order"])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, layout, order, tmp_path):
    """All words of zero points, which version 1 stores minus 1."""
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module as to_version_2

    torch.manual_seed(bits)
    layer = linear(bits, 32, False, order == "act-order", N_COLS, 64)
    layer.qweight.random_(-(1 << 31), 1 << 31)
    layer.qzeros.random_(-(1 << 31), 1 << 31)
    layer.scales.uniform_(-0.01, 0.01)
    layer.g_idx.copy_(torch.arange(N_COLS) // 32)
    if order == "act-order":
        layer.g_idx.copy_(layer.g_idx[torch.randperm(N_COLS)])
    stored = {f"{MODULE}.{name}": tensor.clone() for name, tensor in layer.named_buffers()}
    if layout == "gptq":
        to_version_2(layer, bits, torch.int32)
    layer.post_init()
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": layout}
    check(tmp_path, stored, said, layer.dequantize_weight().T, dtype="float16")


def test_awq(tmp_path):
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    torch.manual_seed(0)
    words = {
        f"{MODULE}.{name}": torch.randint(-(1 << 31), 1 << 31, shape).int()
        for name, shape in {"qweight": (N_COLS, 8), "qzeros": (4, 8)}.items()
    }
    scales = torch.empty(4, 64).uniform_(-0.01, 0.01).half()
    expected = packing.dequantize_gemm(*words.values(), scales, 4, 32)
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    stored = {**words, f"{MODULE}.scales": scales}
    check(tmp_path, stored, said, expected.T, dtype="float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_mxfp4_of_transformers(dtype, tmp_path):
    """All codes, and all scales but the one that is NaN."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 127, 2, 16), dtype=torch.uint8)
    scales = torch.arange(2 * 127 * 2).remainder(255).to(torch.uint8).view(2, 127, 2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    expected = convert_moe_packed_tensors(blocks, scales, dtype=DTYPES[dtype])
    path = write(tmp_path / "base", stored, {"quant_method": "mxfp4"}, dtype=dtype, model_type="gpt_oss")
    assert same_bits(decoded(path, name), expected.contiguous())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp8_of_transformers(dtype, tmp_path):
    """Blocks that divide the weight; others it takes for smaller blocks, or refuses."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    codes = torch.randint(0, 256, (N_ROWS, N_COLS), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    codes, scales = codes.view(torch.float8_e4m3fn), torch.rand(N_ROWS // 8, N_COLS // 16) / 100
    stored = {WEIGHT: codes, f"{WEIGHT}_scale_inv": scales}
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, DTYPES[dtype])
    check(
        tmp_path,
        stored,
        {"quant_method": "fp8", "weight_block_size": [8, 16]},
        expected.to(DTYPES[dtype]),
        dtype=dtype,
    )


INT, FLOAT = {"type": "int"}, {"type": "float"}
# case → (layout of compressed-tensors, its QuantizationArgs)
SCHEMES = {
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "strategy": "tensor", **FLOAT}),
    "fp8 channel": ("float-quantized", {"num_bits": 8, "strategy": "channel", **FLOAT}),
    "int8 channel": ("int-quantized", {"num_bits": 8, "strategy": "channel", **INT}),
    "int8 asymmetric": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False, **INT},
    ),
    **{
        f"w{bits}a16 {'sym' if symmetric else 'asym'}": (
            "pack-quantized",
            {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric, **INT},
        )
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for symmetric in (True, False)
    },
}


def check_layout(tmp_path, layout, args, parts, dtype):
    """`check` of what compressed-tensors packs of `parts`, against what it decodes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(dict(parts), scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"]
    stored = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in packed.items()}
    said = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    check(tmp_path, stored, said, expected.to(DTYPES[dtype]), dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", SCHEMES)
def test_compressed_tensors(case, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    layout, settings = SCHEMES[case]
    args = QuantizationArgs(**settings)
    weight = random_weight(DTYPES[dtype], 2)
    if settings["strategy"] == "tensor":
        least, most = weight.amin()[None], weight.amax()[None]
    else:
        groups = weight.unflatten(-1, (-1, settings.get("group_size", N_COLS)))
        least, most = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(least, most, args)
    parts = {"weight": weight, "weight_scale": scale}
    parts |= {} if args.symmetric else {"weight_zero_point": zero}
    check_layout(tmp_path, layout, args, parts, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mx_of_compressed_tensors(bits, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs

    settings = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": True, **FLOAT}
    args = QuantizationArgs(scale_dtype=torch.uint8, zp_dtype=torch.uint8, **settings)
    weight = random_weight(DTYPES[dtype], 2)
    scale = torch.exp2(torch.randint(-9, -3, (N_ROWS, N_COLS // 32)).float()).to(DTYPES[dtype])
    layout = "mxfp8-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"
    check_layout(tmp_path, layout, args, {"weight": weight, "weight_scale": scale}, dtype)
