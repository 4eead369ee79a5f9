"""Quantized formats by the tensors that they store: what a checkpoint is refused by, whatever its config
says. A config may be silent.

A codec that reads a format claims its tensors before this table is looked at. The format's row stays, as
`read`: what the codec leaves is a part of a weight whose other parts are missing or unlike what the format
has."""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorafuse.codecs.sources import Sources
from lorafuse.errors import shown
from lorafuse.files.tensors import FLOATS, TensorInfo, TensorSpec

_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_FP8 = re.compile(r"F8_")

# (the stem of the companions' names, all stored tensors) → whether the companions are as the format has them.
Condition = Callable[[str, Mapping[str, TensorInfo]], bool]


@dataclass(frozen=True)
class Format:
    """A format by the names under one stem (a module, or a weight): those that all must be stored, the first
    of which is named in a refusal. `also` decides where names alone do not."""

    title: str
    names: tuple[str, ...]
    also: Condition = lambda stem, stored: True
    read: bool = False


def _has(*names: str) -> Condition:
    """One of the names is stored too."""
    return lambda stem, stored: any(stem + name in stored for name in names)


def _codes(name: str) -> Condition:
    """The tensor of that name holds integers or FP8 numbers."""
    return lambda stem, stored: is_coded(stored.get(stem + name))


def _dtype(name: str, *dtypes: str) -> Condition:
    return lambda stem, stored: stem + name in stored and stored[stem + name].spec.dtype in dtypes


def _is_gptq(stem: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Codes are packed along the inputs in GPTQ, and along the outputs in AWQ."""
    codes, scales = (stored[stem + name].spec.shape for name in (".qweight", ".scales"))
    return len(codes) == len(scales) == 2 and codes[1] == scales[1]


def _are_grids(stem: str, stored: Mapping[str, TensorInfo], *names: str) -> bool:
    """Whether the tensors have one dtype and shape, that of a number for each group: codes beside them may
    be stored as any dtype."""
    first, *others = (stored[stem + name].spec for name in names)
    return len(first.shape) > 1 and all(spec == first for spec in others)


def is_coded(info: TensorInfo | None) -> bool:
    """Whether a stored tensor holds integers or FP8 numbers, with at least two dimensions."""
    if info is None or len(info.spec.shape) < 2:
        return False
    return info.spec.dtype in _INTEGERS or bool(_FP8.match(info.spec.dtype))


_CT = "compressed-tensors"
_ANY_FP8 = f"FP8 or integers with scales ({_CT}, ModelOpt, FBGEMM)"

# The first format whose names are all there counts.
FORMATS: tuple[Format, ...] = (
    Format("FP-Quant", (".qweight", ".forward_hadamard_matrix")),
    Format("GPTQ", (".qweight", ".g_idx"), read=True),
    Format("GPTQ", (".qweight", ".scales"), _is_gptq, read=True),
    Format("GPTQ", (".g_idx",), _dtype(".g_idx", "I32"), read=True),
    Format("AWQ", (".qweight", ".scales"), read=True),
    Format("packed integers (GPTQ, AWQ or another of their kind)", (".qweight",)),
    Format("GPTQ or AWQ", (".qzeros",), read=True),
    Format(f"{_CT} (pack-quantized, NVFP4 or MXFP4)", (".weight_packed",), read=True),
    Format(f"{_CT} (sparse)", (".compressed", ".bitmask")),
    Format("ModelOpt after AWQ or SmoothQuant", (".pre_quant_scale",)),
    Format("ModelOpt (NVFP4)", (".weight_scale_2",), read=True),
    Format("FP8 with a scale for each block", (".weight_scale_inv",), read=True),
    Format("FP8 with a scale for each block", ("_scale_inv",), _codes(""), read=True),
    Format("FP8 with scales, by Mistral's names", (".qscale_weight",), read=True),
    Format("EETQ", (".weight_scales",), _codes(".weight")),
    Format("bytes with scales (BitNet, Gemma and others)", (".weight_scale",), _dtype(".weight", "U8")),
    Format(_ANY_FP8, (".weight_scale",), read=True),
    Format("FP8 of FBGEMM", ("_scale",), _codes(""), read=True),
    Format("FP8 or FP4 with scales, by DeepSeek's names", (".scale",), _codes(".weight"), read=True),
    Format("MXFP4 of gpt-oss", ("_blocks", "_scales"), _dtype("_blocks", "U8"), read=True),
    Format("Metal (MLX's layout)", (".scales", ".qbiases")),
    Format("MLX", (".scales",), _dtype(".weight", "U32"), read=True),
    Format(
        "MLX",
        (".scales", ".biases", ".weight"),
        lambda stem, stored: _are_grids(stem, stored, ".scales", ".biases"),
        read=True,
    ),
    Format("HIGGS", (".scales", ".tables"), _codes(".weight")),
    Format("AQLM", (".codes", ".codebooks"), read=True),
    Format("HQQ", (".W_q", ".packing"), read=True),
    Format("HQQ", (".packing", ".compute_dtype"), read=True),
    Format("HQQ or SINQ", (".W_q",)),
    Format("torchao", ("_qdata",), _has("_scale", "_scale_and_zero", "_per_tensor_scale"), read=True),
    Format("torchao", ("_qdata",), _codes("_qdata"), read=True),
    Format("quanto", (".weight._data",), _has(".weight._scale")),
    Format("VPTQ", (".indices", ".centroids.weight")),
    Format("SpQR", (".dense_weights", ".row_offsets")),
    Format("Quark", (".weight_quantizer.scale",)),
    Format("integer embeddings of Gemma", (".embedding_quantized", ".embedding_scale")),
    # What is not known by name is by its form: coded matrices with scales beside them.
    Format("integers or FP8 with scales", (".scales",), _codes(".weight")),
    Format("codes with scales in bytes", (".scales",), _codes(".scales")),
)
_WAY_OUT = "Dequantize it first, or merge into the full-precision checkpoint."
_DECOMPRESS = (
    "compressed-tensors up to 0.14 puts the zeros back: load the model with that, save it dense and merge "
    "into the result, or merge into the full-precision checkpoint."
)
# What to do instead, where that is something else, by a format's title or quant_method in small letters.
_WAYS_OUT = {
    "bitnet": "Merge into the checkpoint in bfloat16 that it was packed from.",
    "eetq": "The order of its codes is that of one kind of GPU: merge into the full-precision checkpoint.",
    "gguf": "transformers loads it with `gguf_file=`: save that, and merge into it.",
    "higgs": "Dequantize it with transformers (`model.dequantize()`), or merge into the full-precision "
    "checkpoint.",
    "quanto": "Load it with optimum-quanto, save `weight.dequantize()` of each layer, and merge into that.",
    "modelopt after awq or smoothquant": "The stored weight is the model's divided by `pre_quant_scale`: "
    "multiply its columns by that first, or merge into the full-precision checkpoint.",
    "metal (mlx's layout)": "Convert the full-precision checkpoint with mlx-lm, or merge into that.",
    f"{_CT} (sparse)": _DECOMPRESS,
    "transform_config": "Its stored weights are rotated, and so is what runs through them; an adapter's are "
    "not: merge into the checkpoint that was rotated, and quantize the result as that was.",
    "sparsity_config": _DECOMPRESS,
    **dict.fromkeys(
        ("vptq", "spqr", "quark", "sinq", "hqq or sinq", "fp-quant", "fp_quant"),
        "Its own library dequantizes it: save that, or merge into the full-precision checkpoint.",
    ),
}
WITH_ITS_LIBRARY = (
    "Load the model with its own library, dequantize it and save that, or merge into the dense model."
)
# quant_method → where a config names the layout, what it is called, and the layouts that are read.
_LAYOUTS = {
    "gptq": (("checkpoint_format", "format"), "GPTQ in the layout", ("gptq", "gptq_v2")),
    "awq": (("version", "format"), "AWQ in version", ("gemm",)),
}
_WORDS = frozenset({"I16", "I32", "U32"})
_CODES = _WORDS | {"U8", "I8", "U16"}
_ROUTERS = ("gate", "router")  # may hold tables of their own
# Ends of names that only quantized weights have, and those that others may have too unless they are bytes.
_PARTS = (
    ".qweight", ".qzeros", ".g_idx", ".W_q", ".codes", "_qdata", "._weight_scale", "_scale_inv",
    ".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_zero_point", ".weight_shape",
    ".weight_g_idx", ".weight_global_scale", ".pre_quant_scale",
)  # fmt: skip
_COMPANIONS = (".scales", ".biases")  # of codes; others may have them too, beside M.weight
_BYTES = ("_blocks", "_scales", ".scales")
_SECTIONS = ("quantization_config", "compression_config")  # where a config says how it is quantized
_ENDS = tuple({form.names[0] for form in FORMATS})


def _is_mask(spec: TensorSpec) -> bool:
    """Of attention, as GPT-2 and others of its time stored it."""
    return len(spec.shape) == 4 and spec.shape[:2] == (1, 1) and spec.shape[2] == spec.shape[3]


def is_part(name: str, spec: TensorSpec) -> bool:
    """Whether a stored tensor that no codec claimed looks like a part of a quantized weight, in a checkpoint
    where others are quantized."""
    is_bytes = spec.dtype in ("U8", "I8") or spec.dtype.startswith("F8_")
    if name.endswith(_PARTS) or spec.dtype.startswith("F8_"):
        return True
    if _is_mask(spec):
        return False
    if name.endswith(".weight"):
        return is_bytes or spec.dtype in _WORDS
    return is_bytes and (len(spec.shape) > 1 or name.endswith(_BYTES))


def is_bare(name: str, spec: TensorSpec, weights: Mapping[str, Sources]) -> bool:
    """Whether a stored tensor looks like codes, wherever it stands: a matrix of small integers, or of FP8, in
    a module that has no weight of floating-point numbers."""
    coded = spec.dtype in _CODES or spec.dtype.startswith(("F8_", "F6_", "F4"))
    if not coded or len(spec.shape) < 2 or _is_mask(spec):
        return False
    own = weights.get(f"{name.rpartition('.')[0]}.weight")
    return not (own and own.spec.dtype in FLOATS)


def stray_part(name: str, weights: Mapping[str, Sources]) -> str | None:
    """Returns the quantized weight of the module in which a tensor lies that is no part of it and no bias."""
    module, _, leaf = name.rpartition(".")
    weight = f"{module}.weight"
    own = weights.get(weight)
    other = own is not None and not own.as_stored and name != weight and not leaf.endswith("bias")
    return weight if other and not module.endswith(_ROUTERS) else None


def is_orphan(name: str, weights: Container[str]) -> bool:
    """The same by a name beside which `weights` lack the weight that it would be a companion of."""
    end = next((end for end in _COMPANIONS if name.endswith(end)), None)
    return end is not None and f"{name.removesuffix(end)}.weight" not in weights


def packed_format(stored: Mapping[str, TensorInfo]) -> tuple[str, Format] | None:
    """Returns (a stored tensor, the format that it belongs to), by the first format in the table that the
    tensors have; None where all tensors are what they seem."""
    suspects = [name for name in stored if name.endswith(_ENDS)]
    for form in FORMATS if suspects else ():
        for name in suspects:
            stem = name.removesuffix(form.names[0])
            if stem != name and all(stem + n in stored for n in form.names) and form.also(stem, stored):
                return name, form
    return None


def quantizations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config says of quantization, at its top and in its parts (text_config)."""
    yield from (section for name in _SECTIONS if isinstance(section := config.get(name), dict))
    for name, part in config.items():
        if isinstance(part, dict) and name not in _SECTIONS:
            yield from quantizations(part)


def way_out(form: object = None) -> str:
    """Returns what a refusal of a format, by its title or quant_method, ends with."""
    hint = _WAYS_OUT.get(str(form).lower(), _WAY_OUT)
    return f"this format is not read (docs/bases.md lists those that are). {hint}"


def unread_layout(section: Mapping[str, Any], method: str | None) -> str | None:
    """Returns a sentence and a way out where a section of a config names a layout of that quant_method that
    no codec reads."""
    if method == _CT and section.get("format") == "marlin-24":
        return f"{_CT} in the layout marlin-24 is not read. Merge into the full-precision checkpoint."
    if method not in _LAYOUTS:
        return None
    fields, words, read = _LAYOUTS[method]
    layout = next((said for field in fields if (said := section.get(field))), read[0])
    if str(layout).lower() in read:
        return None
    return f"{words} {shown(layout)} is not read, only {' and '.join(read)}. {WITH_ITS_LIBRARY}"


def unread_setting(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns (a field, in words) of what a config of compressed-tensors says that changes what the stored
    tensors mean; None where it says nothing of the kind."""
    for section in quantizations(config):
        transform, sparsity = section.get("transform_config"), section.get("sparsity_config")
        if transform and not (isinstance(transform, dict) and transform.get("config_groups") == {}):
            return "transform_config", "rotations that run with the model"
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            return "sparsity_config", "weights without their zeros"
    return None
