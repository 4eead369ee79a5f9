"""Checkpoints in formats that no codec reads are refused by what they store, whatever their config says; what
only looks like them is not."""

import json
import shutil
from contextlib import closing

import build
import pytest
import torch
from quantized import write
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.codecs import open_weights
from lorafuse.codecs.other_formats import FORMATS, way_out
from lorafuse.errors import CheckpointError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder

F8 = torch.float8_e4m3fn
FP8 = "FP8 with a scale for each block"
BY_SCALE = "FP8 or integers with scales (compressed-tensors, ModelOpt, FBGEMM)"
CT = "compressed-tensors (pack-quantized, NVFP4 or MXFP4)"


def zeros(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


def i32(*shape):
    return zeros(*shape, dtype=torch.int32)


def u8(*shape):
    return zeros(*shape, dtype=torch.uint8)


# How each library stores a weight of 16 × 32 under the module "m": case → (stored tensors, the title).
CASES = {
    "gptq": (
        {"m.qweight": i32(4, 16), "m.qzeros": i32(1, 2), "m.scales": zeros(2, 16), "m.g_idx": i32(32)},
        "GPTQ",
    ),
    "gptq without g_idx": (
        {"m.qweight": i32(4, 16), "m.qzeros": i32(1, 2), "m.scales": zeros(2, 16)},
        "GPTQ",
    ),
    "g_idx alone": ({"m.g_idx": i32(32)}, "GPTQ"),
    "awq": ({"m.qweight": i32(32, 2), "m.qzeros": i32(2, 2), "m.scales": zeros(1, 16)}, "AWQ"),
    "qweight alone": (
        {"m.qweight": i32(32, 2)},
        "packed integers (GPTQ, AWQ or another of their kind)",
    ),
    "qzeros alone": ({"m.qzeros": i32(1, 2)}, "GPTQ or AWQ"),
    "fp_quant": (
        {"m.qweight": u8(16, 16), "m.scales": u8(16, 1), "m.forward_hadamard_matrix": zeros(32, 32)},
        "FP-Quant",
    ),
    "pack-quantized": (
        {
            "m.weight_packed": i32(16, 4),
            "m.weight_scale": zeros(16, 1),
        },
        CT,
    ),
    "nvfp4": (
        {
            "m.weight_packed": u8(16, 16),
            "m.weight_scale": zeros(16, 2, dtype=F8),
        },
        CT,
    ),
    "float-quantized": ({"m.weight_scale": zeros(16, 1)}, BY_SCALE),
    "int-quantized": (
        {"m.weight": i32(16, 32), "m.weight_scale": zeros(16, 1)},
        BY_SCALE,
    ),
    "bitnet": (
        {"m.weight": u8(4, 32), "m.weight_scale": zeros(1)},
        "bytes with scales (BitNet, Gemma and others)",
    ),
    "sparse": (
        {"m.compressed": zeros(16, 16), "m.bitmask": u8(16, 4), "m.shape": torch.tensor([16, 32])},
        "compressed-tensors (sparse)",
    ),
    "modelopt nvfp4": (
        {
            "m.weight_scale": zeros(16, 2, dtype=F8),
            "m.weight_scale_2": zeros(),
        },
        "ModelOpt (NVFP4)",
    ),
    "smoothquant": (
        {
            "m.weight": zeros(16, 32, dtype=F8),
            "m.weight_scale": zeros(),
            "m.pre_quant_scale": zeros(32),
        },
        "ModelOpt after AWQ or SmoothQuant",
    ),
    "fp8 blocks": ({"m.weight": zeros(16, 32), "m.weight_scale_inv": zeros(1, 1)}, FP8),
    "fp8 blocks of stacks": (
        {"m.gate_up_proj": u8(2, 16, 32), "m.gate_up_proj_scale_inv": zeros(2, 1, 1)},
        FP8,
    ),
    "fp8 of Mistral": (
        {"m.qscale_weight": zeros()},
        "FP8 with scales, by Mistral's names",
    ),
    "fp8 of DeepSeek-V4": (
        {"m.weight": i32(16, 32), "m.scale": zeros(1, 1)},
        "FP8 or FP4 with scales, by DeepSeek's names",
    ),
    "fbgemm stacks": (
        {"m.gate_up_proj": u8(2, 32, 16), "m.gate_up_proj_scale": zeros(2, 1, 16)},
        "FP8 of FBGEMM",
    ),
    "eetq": ({"m.weight": zeros(32, 16, dtype=torch.int8), "m.weight_scales": zeros(16)}, "EETQ"),
    "mxfp4 of gpt-oss": (
        {"m.down_proj_blocks": u8(2, 16, 1, 16), "m.down_proj_scales": u8(2, 16, 2)},
        "MXFP4 of gpt-oss",
    ),
    "mlx": (
        {"m.weight": i32(16, 4).view(torch.uint32), "m.scales": zeros(16, 1), "m.biases": zeros(16, 2)},
        "MLX",
    ),
    "mlx mxfp4": ({"m.weight": i32(16, 4).view(torch.uint32), "m.scales": u8(15, 1)}, "MLX"),
    "mlx, codes as floats": (
        {"m.weight": zeros(16, 8), "m.scales": zeros(16, 1), "m.biases": zeros(16, 1)},
        "MLX",
    ),
    "mlx mxfp4, codes as floats": (
        {"m.weight": zeros(16, 8), "m.scales": u8(16, 1)},
        "codes with scales in bytes",
    ),
    "metal": (
        {"m.weight": i32(16, 4).view(torch.uint32), "m.scales": zeros(16, 1), "m.qbiases": zeros(16, 1)},
        "Metal (MLX's layout)",
    ),
    "higgs": (
        {"m.weight": zeros(4, 32, dtype=torch.int16), "m.scales": zeros(16, 1), "m.tables": zeros(16)},
        "HIGGS",
    ),
    "aqlm": (
        {
            "m.codes": zeros(16, 4, 1, dtype=torch.int8),
            "m.codebooks": zeros(1, 256, 1, 8),
        },
        "AQLM",
    ),
    "hqq without scales": ({"m.W_q": u8(8, 32), "m.packing": u8(7)}, "HQQ"),
    "hqq without codes": ({"m.packing": u8(7), "m.compute_dtype": u8(13)}, "HQQ"),
    "hqq": ({"m.W_q": u8(8, 32), "m.scale": zeros(1, 32), "m.zero": zeros(1, 32)}, "HQQ or SINQ"),
    "torchao": (
        {"m._weight_qdata": i32(16, 4), "m._weight_scale_and_zero": zeros(16, 1)},
        "torchao",
    ),
    "quanto": (
        {"m.weight._data": zeros(16, 32, dtype=torch.int8), "m.weight._scale": zeros(16, 1)},
        "quanto",
    ),
    "vptq": ({"m.indices": i32(1, 1, 64), "m.centroids.weight": zeros(1, 2048)}, "VPTQ"),
    "spqr": ({"m.dense_weights": i32(64), "m.row_offsets": i32(17)}, "SpQR"),
    "quark": ({"m.weight": zeros(16, 32), "m.weight_quantizer.scale": zeros()}, "Quark"),
    "gemma": (
        {"m.embedding_quantized": u8(16, 16), "m.embedding_scale": zeros(16, 1)},
        "integer embeddings of Gemma",
    ),
    "of a kind to come": (
        {"m.weight": zeros(16, 32, dtype=torch.int8), "m.scales": zeros(16, 1)},
        "integers or FP8 with scales",
    ),
}


def refusal(path):
    with closing(Checkpoint(LocalFolder(path))) as ckpt, pytest.raises(CheckpointError) as caught:
        open_weights(ckpt)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_refused_by_what_is_stored(case, tmp_path):
    """The config is that of a dense model; the refusal names the tensor, the format and the way out."""
    stored, title = CASES[case]
    path = write(tmp_path / "ckpt", {"a.weight": torch.zeros(4, 4), **stored})
    text = refusal(path)
    named = [name for name in stored if f"{path}: {name} belongs" in text]
    assert named
    read = {form.title: form.read for form in FORMATS}[title]
    assert text == f"{path}: {named[0]} belongs to a weight that is quantized: {title}; " + (
        "what else this weight needs is missing, or of another dtype or shape than this format has."
        if read
        else way_out(title)
    )


@pytest.mark.parametrize(
    ("stored", "section", "text"),
    [
        (
            {"m.B": i32(1, 32), "m.s": zeros(1, 16)},
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "GPTQ in the layout marlin is not read, only gptq and gptq_v2. Load the model",
        ),
        (
            {"m.qweight": u8(16, 16), "m.scales": zeros(16, 1), "m.zeros": zeros(1, 16)},
            {"quant_method": "gptq", "format": "bitblas"},
            "GPTQ in the layout bitblas is not read, only gptq and gptq_v2. Load the model",
        ),
        (
            {"m.qweight": i32(16, 4), "m.qzeros": i32(16, 1), "m.scales": zeros(16, 8)},
            {"quant_method": "awq", "version": "gemv"},
            "AWQ in version gemv is not read, only gemm. Load the model",
        ),
        (
            {"m.weight_packed": i32(1, 16), "m.scale_packed": zeros(1, 16), "m.meta": i32(1, 8)},
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "compressed-tensors in the layout marlin-24 is not read. Merge into",
        ),
    ],
)
def test_layouts_that_no_codec_reads_are_refused_by_name(stored, section, text, tmp_path):
    path = write(tmp_path / "ckpt", {"a.weight": torch.zeros(4, 4), **stored})
    build.write_json(path / "config.json", {"model_type": "llama", "quantization_config": section})
    assert refusal(path).startswith(f"{path}/config.json: {text}")


def test_a_version_of_awq_whose_shapes_are_those_of_gptq(tmp_path):
    stored = {"m.qweight": i32(16, 8), "m.qzeros": i32(16, 1), "m.scales": zeros(16, 8)}
    path = write(tmp_path / "ckpt", stored)
    section = {"quant_method": "awq", "version": "gemv"}
    build.write_json(path / "config.json", {"model_type": "llama", "quantization_config": section})
    assert "AWQ in version gemv is not read, only gemm." in refusal(path)


def test_every_row_has_a_case():
    assert {form.title for form in FORMATS} == {title for _, title in CASES.values()}


@pytest.mark.parametrize(
    "announced",
    [
        {"compression_config": {"format": "pack-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"quantization_config": {"load_in_4bit": True}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_whatever_the_config_says(announced, tmp_path):
    """Fields that name no method, and the method of another format."""
    path = write(tmp_path / "ckpt", CASES["pack-quantized"][0], **announced)
    assert f"m.weight_packed belongs to a weight that is quantized: {CT};" in refusal(path)


@pytest.mark.parametrize("case", ["gptq", "float-quantized", "mlx", "mxfp4 of gpt-oss"])
def test_an_adapter_of_dense_weights_does_not_pass_it(case, tmp_path):
    """The adapter's own targets are dense here; the rest would come out packed, under a config that says
    nothing of it. Nothing is written; `inspect` says the same."""
    path, adapter = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "adapter")
    (file,) = path.glob("*.safetensors")
    save_file(load_file(file) | CASES[case][0], file)
    with pytest.raises(CheckpointError, match="belongs to a weight that is quantized"):
        lorafuse.convert(path, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "ckpt"]
    (problem,) = lorafuse.inspect(path)["problems"]
    assert CASES[case][1] in problem
    shutil.rmtree(path)


LOOK_ALIKES = {
    "a norm's scale": {"norm.weight": zeros(16), "norm.scale": zeros(16)},
    "a matrix with a scale": {"m.weight": zeros(16, 32), "m.scale": zeros(1), "m.scales": zeros(16)},
    "a temperature": {"logit_scale": zeros(), "m_scale": zeros(1), "m": zeros(4, 4)},
    "a vector quantizer": {"q.codebooks": zeros(2, 4, 8), "q.codebook.embed": zeros(4, 8)},
    "blocks of a network": {"m_blocks": zeros(4, 4), "m_scales": zeros(4)},
    "positions": {"m.indices": i32(4), "position_ids": torch.zeros(1, 4, dtype=torch.int64)},
    "a mask of GPT-2": {"attn.bias": u8(1, 1, 4, 4), "attn.masked_bias": zeros()},
    "a causal mask": {"attn.causal_mask": u8(1, 1, 4, 4)},
    "experts of tokens": {"m.gate.weight": zeros(4, 4), "m.gate.tid2eid": i32(8, 2)},
    "a table of indexes": {"m.weight": torch.zeros(4, 4, dtype=torch.int64)},
    "HiFi-GAN": {"m.weight_g": zeros(4, 1, 1), "m.weight_v": zeros(4, 4, 3)},
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alikes_pass(case, tmp_path):
    path = write(tmp_path / "ckpt", LOOK_ALIKES[case])
    with closing(Checkpoint(LocalFolder(path))) as ckpt:
        assert set(open_weights(ckpt)) == set(LOOK_ALIKES[case])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_without_its_state_is_refused_without_a_config(dtype, tmp_path):
    """The codes may be viewed as any dtype; the scales beside them tell."""
    stored = {"m.weight": zeros(4, 1, dtype=dtype), "m.weight.absmax": zeros(1, dtype=torch.float32)}
    assert "m.weight is quantized, but other parts of it (codes, scales, quant_state, SCB)" in refusal(
        write(tmp_path / "ckpt", stored)
    )


# What a quantized checkpoint is without its config and with the rest of its tensors lost, or under names that
# nobody knows: case → (stored tensors, the tensor that is named).
BARE = {
    "bytes": ({"m.weight": u8(4, 4), "m.bias": zeros(4)}, "m.weight is U8 [4, 4]"),
    "words": ({"m.w": i32(4, 4), "m.s": zeros(4)}, "m.w is I32 [4, 4]"),
    "FP8": ({"m.weight": zeros(4, 4, dtype=F8)}, "m.weight is F8_E4M3 [4, 4]"),
    "scales": ({"m.s": zeros(4, 4, dtype=torch.float8_e8m0fnu)}, "m.s is F8_E8M0 [4, 4]"),
    "codes of AQLM": ({"m.codes": zeros(4, 2, 1, dtype=torch.int16)}, "m.codes is I16 [4, 2, 1]"),
    "a stack": ({"m.experts.up_proj_b": u8(2, 4, 4)}, "m.experts.up_proj_b is U8 [2, 4, 4]"),
}


@pytest.mark.parametrize("case", BARE)
def test_bare_codes_are_refused_without_a_config(case, tmp_path):
    stored, text = BARE[case]
    path = write(tmp_path / "ckpt", stored | {"a.weight": zeros(4, 4)})
    assert refusal(path) == (
        f"{path}: {text}, which looks like the codes of a quantized weight, and nothing says how they are "
        "decoded. Merge into the full-precision checkpoint; if these numbers are the weight, save them in "
        "bfloat16 first."
    )


QUANTIZED = {"x.weight": zeros(16, 32, dtype=F8), "x.weight_scale_inv": zeros(1, 1)}


@pytest.mark.parametrize("name", ["x.weight_zero", "x.global_scale"])
def test_a_companion_under_another_name_is_refused(name, tmp_path):
    """Whatever it holds; a bias is none, nor what a router has."""
    path = write(tmp_path / "ckpt", QUANTIZED | {name: zeros(4)})
    assert refusal(path) == (
        f"{path}: {name} lies beside x.weight, which is stored in FP8, a scale for each tensor, a format "
        "that has no such part: is it a companion under another name?"
    )
    router = {f"m.gate.{name.partition('.')[2]}": tensor.clone() for name, tensor in QUANTIZED.items()}
    fine = {"x.bias": zeros(16), "x.other_bias": zeros(2), "m.gate.tid2eid": torch.zeros(8, 2).long()}
    with closing(Checkpoint(LocalFolder(write(tmp_path / "fine", QUANTIZED | router | fine)))) as ckpt:
        assert open_weights(ckpt).keys() == {"x.weight", "m.gate.weight", *fine}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alikes_pass_beside_quantized_weights(case, tmp_path):
    beside = {"x.weight": zeros(16, 32, dtype=F8), "x.weight_scale_inv": zeros(1, 1)}
    path = write(tmp_path / "ckpt", LOOK_ALIKES[case] | beside)
    with closing(Checkpoint(LocalFolder(path))) as ckpt:
        assert set(open_weights(ckpt)) == {*LOOK_ALIKES[case], "x.weight"}


@pytest.mark.parametrize("case", ["bytes", "FP8"])
def test_what_does_not_pass_beside_quantized_weights(case, tmp_path):
    beside = {"x.weight": zeros(16, 32, dtype=F8), "x.weight_scale_inv": zeros(1, 1)}
    assert "m.weight is quantized, but other parts of it" in refusal(
        write(tmp_path / "ckpt", BARE[case][0] | beside)
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "hqq", "compressed-tensors", "mxfp4", "modelopt"])
def test_a_config_that_promises_what_is_not_stored_is_refused(method, tmp_path):
    """Its readers look for codes that are not there."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt", build.checkpoint_tensors())
    config = json.loads((ckpt / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (ckpt / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as e:
        open_weights(Checkpoint(LocalFolder(ckpt)))
    assert str(e.value) == (
        f"{ckpt}/config.json: says that the checkpoint is quantized with {method}, but no weight is stored "
        "so. Is this the config of another checkpoint? Of one in full precision, remove the section."
    )


@pytest.mark.parametrize(
    "form",
    [
        "bitnet", "eetq", "EETQ", "gguf", "higgs", "HIGGS", "quanto", "vptq", "VPTQ", "spqr", "SpQR", "quark",
        "Quark", "sinq", "HQQ or SINQ", "fp_quant", "FP-Quant", "Metal (MLX's layout)",
        "compressed-tensors (sparse)", "ModelOpt after AWQ or SmoothQuant",
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_do_with_this_format(form):
    """Not only what is true of all."""
    assert way_out(form) != way_out()
