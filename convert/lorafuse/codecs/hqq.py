"""HQQ (quant_method "hqq"), as HQQLinear.state_dict of hqq 0.2.8 writes it.

The weight W [N, K], flattened, is a matrix of groups: along its rows (axis 1), [numel / size, size], or along
its columns (axis 0), [size, numel / size]. `M.W_q` has its codes in units, of 8 bits (1, 2, 4 or 8 codes) or
32 (10 codes of 3 bits): code f of the U units' first code each, then of the second, and so on, is in unit
f mod U, at place f div U, the first place in the highest bits. `M.scale`, `M.zero`, in the dtype C: a number
for each group. W = T(C(C(code − zero) · scale)), T the model's dtype.

Numbers beside these say how: `nbits`, `axis`, `shape`, and as bytes of text `packing` and `compute_dtype`.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from lorafuse.codecs.hqq_codes import Layout, PackedUnits, Packing
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.other_formats import quantizations
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import DTYPES, FLOATS, SAFETENSORS_NAMES, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("hqq",)
_NUMBERS = ("W_q", "scale", "zero", "nbits", "axis", "shape", "packing", "compute_dtype")
_SETTINGS = (
    "group_size", "channel_wise", "encoded_state_dict", "offload_meta", "optimize", "quant_scale",
    "quant_zero", "round_zero", "stores_quant_config", "unpack_view_dtype", "view_as_float",
)  # fmt: skip
PACKINGS = {
    "8bit_u8": Packing(8, 1, 1),
    "4bit_u8": Packing(4, 2, 1),
    "2bit_u8": Packing(2, 4, 1),
    "1bit_u8": Packing(1, 8, 1),
    "3bit_32": Packing(3, 10, 4),
}
_MAX_NBYTES = 64  # of a number or a text


class Said(NamedTuple):
    """What the numbers beside a weight say."""

    bits: int
    axis: int
    shape: tuple[int, ...]
    packing: Packing
    dtype: str


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (M.W_q, M.scale, M.zero, and all that says how)}."""
    weights = {}
    for codes in stored:
        module = codes.removesuffix(".W_q")
        names = [f"{module}.{name}" for name in _NUMBERS]
        if module != codes and all(name in stored for name in names):
            settings = (f"{module}.{name}" for name in _SETTINGS)
            weights[f"{module}.weight"] = (*names, *(name for name in settings if name in stored))
    return Claims(weights)


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns what the config says of all weights."""
    for section in quantizations(config):
        said = section.get("quant_config")
        said = said.get("weight_quant_params") if isinstance(said, dict) else None
        if isinstance(said, dict) and said.get("nbits") in (1, 2, 3, 4, 5, 6, 8):
            size = said.get("group_size")
            return _scheme(int(said["nbits"]), size if type(size) is int else 0)
    return Scheme("hqq", words="HQQ")


def _scheme(bits: int, group_size: int) -> Scheme:
    per_byte = {3: Fraction(5, 2), 5: Fraction(1), 6: Fraction(1)}.get(bits, Fraction(8, bits))
    return Scheme("hqq", blocksize=group_size, words=f"HQQ, {bits} bit", bits=bits, codes_per_byte=per_byte)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a weight. Raises CheckpointError where what is stored does not fit together, and
    for scales that are quantized themselves."""
    module = weight.removesuffix(".weight")
    try:
        _refuse_quantized_scales(module, ckpt)
        said = _read(module, ckpt)
        layout = _layout(names, said, ckpt)
    except ValueError as e:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)}: {e}") from None
    spec = TensorSpec(out_dtype(ckpt, said.dtype), said.shape)
    return PackedUnits(ckpt, names, spec, _scheme(said.bits, layout.group_size), layout)


def _refuse_quantized_scales(module: str, ckpt: Checkpoint) -> None:
    for name in (f"{module}.quant_scale", f"{module}.quant_zero"):
        if name in ckpt.tensors and any(_bytes(name, ckpt)):
            raise ValueError(
                f"{shown(name)}: its scales or zero points are quantized themselves, which is not read. "
                "Dequantize it with hqq, or merge into the full-precision checkpoint."
            )


def _bytes(name: str, ckpt: Checkpoint) -> bytearray:
    spec = ckpt.tensors[name].spec
    if not 0 < spec.nbytes <= _MAX_NBYTES:
        raise ValueError(f"{shown(name)} is {spec}; expected a number, or a word.")
    return read_all(ckpt, name)


def _read(module: str, ckpt: Checkpoint) -> Said:
    """Raises ValueError for numbers and words that hqq does not write."""
    texts = {name: bytes(_bytes(f"{module}.{name}", ckpt)) for name in ("packing", "compute_dtype")}
    packing = PACKINGS.get(texts["packing"].decode("latin-1"))
    dtype = SAFETENSORS_NAMES.get(texts["compute_dtype"].decode("latin-1").removeprefix("torch."))
    if packing is None or dtype not in FLOATS:
        raise ValueError(f"packing {shown(texts['packing'])} in {shown(texts['compute_dtype'])} is not read.")
    (bits,), (axis,) = (_integers(f"{module}.{name}", 1, ckpt) for name in ("nbits", "axis"))
    shape = tuple(_integers(f"{module}.shape", 2, ckpt))
    if not 0 < bits <= 8 or axis not in (0, 1) or min(shape) < 1 or bits > packing.bits:
        raise ValueError(f"nbits {bits}, axis {axis}, shape {list(shape)} are not those of a matrix of HQQ.")
    return Said(bits, axis, shape, packing, dtype)


def _integers(name: str, n: int, ckpt: Checkpoint) -> list[int]:
    spec = ckpt.tensors[name].spec
    if spec.dtype not in ("I32", "I64", "U8") or spec.numel != n:
        raise ValueError(f"{shown(name)} is {spec}; expected {n} whole numbers.")
    dtype = getattr(torch, DTYPES[spec.dtype][1])
    return [int(number) for number in torch.frombuffer(_bytes(name, ckpt), dtype=dtype)]


def _layout(names: tuple[str, ...], said: Said, ckpt: Checkpoint) -> Layout:
    codes, scales, zeros = (ckpt.tensors[name].spec for name in names[:3])
    numel, packing = TensorSpec("U8", said.shape).numel, said.packing
    n_groups, n_units = scales.numel, codes.nbytes // packing.unit_nbytes
    group_size = numel // n_groups if n_groups else 0
    n_rows, n_cols = (group_size, n_groups) if said.axis == 0 else (n_groups, group_size)
    if (
        zeros != scales
        or scales.dtype != said.dtype
        or not n_groups
        or numel % n_groups
        or codes.nbytes % packing.unit_nbytes
        or n_units != -(-n_rows // packing.n_codes) * n_cols  # the last places may be only filled up
    ):
        raise ValueError(
            f"{shown(names[0])} {codes}, {shown(names[1])} {scales} and {shown(names[2])} {zeros} do not "
            f"make {said.dtype} {list(said.shape)} of {packing.bits} bit."
        )
    return Layout(packing, said.dtype, n_units, n_groups, group_size, by_columns=said.axis == 0)
