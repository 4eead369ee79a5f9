"""ModelOpt, torchao and AQLM against their own libraries: `make oracle`.

What a library makes of random weights decodes to the bits that it dequantizes it to. FBGEMM has none to
compare with: its FP8 operators for such weights are GPU kernels, and its CPU builds have no function that
reads F8_E4M3 with a scale for each row.
"""

import pytest
import torch
from quantized_base import DTYPES, MODULE, decoded, write
from small_floats import same_bits

modelopt, torchao, aqlm = (pytest.mark.oracle(name) for name in ("modelopt", "torchao", "aqlm"))
WEIGHT = f"{MODULE}.weight"
N_ROWS, N_COLS = 48, 128
sixteen_bits = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def random_weight(dtype):
    """Rows of very different sizes."""
    torch.manual_seed(1)
    sizes = torch.exp2(torch.randint(-6, 3, (N_ROWS, 1)).float())
    return (torch.randn(N_ROWS, N_COLS) * sizes).to(DTYPES[dtype])


def check(tmp_path, stored, quantization, expected, /, dtype, metadata=None):
    """`expected` is what lorafuse decodes, whole and in tiles."""
    path = write(tmp_path / "base", stored, quantization, dtype=dtype, metadata=metadata)
    for rows in (None, 7):
        made = decoded(path, WEIGHT, rows=rows)
        assert same_bits(made, expected.contiguous()), (made, expected)


# ---- ModelOpt: its tensors decode in float32; the cast to the model's dtype is the one rounding.
MODELOPT = {"quant_method": "modelopt"}
BLOCK = {-1: 16, -2: 16}


def of_modelopt(codes, scale, **more):
    parts = {WEIGHT: codes, f"{MODULE}.weight_scale": scale, **more}
    return {name: tensor.contiguous() for name, tensor in parts.items()}


@modelopt
@sixteen_bits
@pytest.mark.parametrize("scales", ["tensor", "row", "block"])
def test_fp8_of_modelopt(scales, dtype, tmp_path):
    from modelopt.torch.quantization.qtensor import FP8QTensor

    sizes = {"tensor": {"axis": None}, "row": {"axis": 0}, "block": {"block_sizes": BLOCK}}[scales]
    weight = random_weight(dtype).float()
    packed, scale = FP8QTensor.quantize(weight, **sizes)
    sizes.pop("axis", None)
    expected = packed.dequantize(torch.float32, scale=scale, **sizes).to(DTYPES[dtype])
    if scales == "row":
        scale = scale.flatten()
    if scales == "block":
        scale = scale[:, None, :, None]
    check(tmp_path, of_modelopt(packed._quantized_data, scale), MODELOPT, expected, dtype=dtype)


@modelopt
@sixteen_bits
def test_int8_of_modelopt(dtype, tmp_path):
    from modelopt.torch.quantization.qtensor import INT8QTensor

    packed, scale = INT8QTensor.quantize(random_weight(dtype).float(), axis=0)
    expected = packed.dequantize(torch.float32, scale=scale).to(DTYPES[dtype])
    check(tmp_path, of_modelopt(packed._quantized_data, scale.flatten()), MODELOPT, expected, dtype=dtype)


@modelopt
@sixteen_bits
def test_nvfp4_of_modelopt(dtype, tmp_path):
    """ModelOpt has +0 for the code of -0."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scale, factor = NVFP4QTensor.quantize(random_weight(dtype).float(), 16)
    expected = packed.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})
    codes = packed._quantized_data
    low, high = ((half == 8) for half in (codes & 15, codes >> 4))
    expected = torch.where(torch.stack([low, high], -1).flatten(1), -0.0, expected).to(DTYPES[dtype])
    stored = of_modelopt(codes, scale, **{f"{MODULE}.weight_scale_2": factor})
    check(tmp_path, stored, MODELOPT, expected, dtype=dtype)


@modelopt
@sixteen_bits
@pytest.mark.parametrize("kind", ["MXFP4QTensor", "MXFP8QTensor"])
def test_mx_of_modelopt(kind, dtype, tmp_path):
    from modelopt.torch.quantization import qtensor

    weight = random_weight(dtype).float()
    if kind == "MXFP4QTensor":
        packed, scale = qtensor.MXFP4QTensor.quantize(weight, 32)
        scale = scale.view(N_ROWS, -1)
    else:
        packed, scale = qtensor.MXFP8QTensor.quantize(weight)
    expected = packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 32}).to(DTYPES[dtype])
    check(tmp_path, of_modelopt(packed._quantized_data, scale), MODELOPT, expected, dtype=dtype)


# ---- torchao: its own writer makes the stored tensors and the header's metadata.


def check_torchao(tmp_path, tensor, expected, dtype):
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    parts, metadata = flatten_tensor_state_dict({WEIGHT: tensor})
    stored = {name: part.contiguous() for name, part in parts.items()}
    said = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    told = {"format": "pt", **metadata}
    check(tmp_path, stored, said, expected, dtype=dtype, metadata=told)


@torchao
@sixteen_bits
@pytest.mark.parametrize("rows", ["row", "tensor"])
def test_int8_of_torchao(rows, dtype, tmp_path):
    import torchao.quantization as ao

    granularity = ao.PerRow() if rows == "row" else ao.PerTensor()
    tensor = ao.Int8Tensor.from_hp(random_weight(dtype), granularity)
    check_torchao(tmp_path, tensor, tensor.dequantize(), dtype)


@torchao
@sixteen_bits
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_intx_of_torchao(bits, mapping, dtype, tmp_path):
    import torchao.quantization as ao

    kind, target = ao.MappingType[mapping], getattr(torch, f"int{bits}")
    tensor = ao.IntxUnpackedToInt8Tensor.from_hp(random_weight(dtype), (1, 32), target, mapping_type=kind)
    check_torchao(tmp_path, tensor, tensor.dequantize(), dtype)


@torchao
@sixteen_bits
@pytest.mark.parametrize("scales", ["row", "tensor", "block"])
def test_float8_of_torchao(scales, dtype, tmp_path):
    import torchao.quantization as ao

    granularity = {"row": ao.PerRow(), "tensor": ao.PerTensor(), "block": ao.PerBlock([16, 32])}[scales]
    tensor = ao.Float8Tensor.from_hp(random_weight(dtype), granularity=granularity)
    check_torchao(tmp_path, tensor, tensor.dequantize(), dtype)


@torchao
@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize("factor", [True, False])
def test_nvfp4_of_torchao(factor, swizzled, tmp_path):
    from torchao.prototype.mx_formats import nvfp4_tensor as nvfp4

    weight = random_weight("bfloat16")
    whole = nvfp4.per_tensor_amax_to_scale(weight.abs().amax().float()) if factor else None
    tensor = nvfp4.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole, is_swizzled_scales=swizzled)
    check_torchao(tmp_path, tensor, tensor.dequantize(), "bfloat16")


# ---- AQLM


@aqlm
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("n_codebooks", [1, 2])
@pytest.mark.parametrize("groups", [(1, 8), (2, 4)])
def test_aqlm(groups, n_codebooks, bits, tmp_path):
    from aqlm import utils

    of_outputs, of_inputs = groups
    torch.manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (N_ROWS // of_outputs, N_COLS // of_inputs, n_codebooks))
    books = torch.randn(n_codebooks, 1 << bits, of_outputs, of_inputs).half()
    scales = torch.rand(N_ROWS // of_outputs, 1, 1, 1).half()
    expected = utils._dequantize_weight(codes, books, scales)
    stored = {"codes": utils.pack_int_data(codes.clone(), bits), "codebooks": books, "scales": scales}
    said = {"quant_method": "aqlm", "num_codebooks": n_codebooks, "nbits_per_codebook": bits}
    said |= {"in_group_size": of_inputs, "out_group_size": of_outputs}
    check(tmp_path, {f"{MODULE}.{name}": t for name, t in stored.items()}, said, expected, dtype="float16")
