"""GPTQ, versions 1 and 2, of 2, 3, 4 and 8 bits (quant_method "gptq", and "auto-round" in this layout).

For a module M of K inputs and N outputs, in G groups of inputs: `M.qweight` I32 [K · bits / 32, N], in which
the codes of an output are one stream of bits down a column; `M.qzeros` I32 [G, N · bits / 32], a stream along
a row, of zero points, which version 1 stores minus 1; `M.scales` [G, N]; `M.g_idx` I32 [K], the group of each
input, which may be missing where groups are runs of inputs. W[n, k] = T(S(scale · (code − zero))), S the
dtype of the scales, T the model's.

As gptqmodel 7.7 has it (nn_modules/qlinear/torch.py). It packs the weight of an HF Conv1D, (in, out), as it
is.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch

from lorafuse.codecs.bands import Bands
from lorafuse.codecs.conv1d import is_conv1d
from lorafuse.codecs.gptq_matrix import GptqMatrix, GptqRows
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.module_settings import group_size_of
from lorafuse.codecs.other_formats import WITH_ITS_LIBRARY, quantizations, unread_layout
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import FLOATS, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("gptq", "auto-round", "intel/auto-round")
BITS = (2, 3, 4, 8)
# How a config calls the layout → whether zero points are stored minus 1.
_LESS_ONE = {"gptq": True, "gptq_v2": False}
# auto-round 0.16, auto_round/inference/backend.py. The layouts of other formats are known by their tensors.
_LESS_ONE_OF_AUTO_ROUND = {"auto_round:auto_gptq": True, "auto_round": False, "auto_round:gptqmodel": False}


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (M.qweight, M.qzeros, M.scales, and M.g_idx where it is stored)} where their shapes
    are those of GPTQ, not of AWQ."""
    weights = {}
    for codes in stored:
        module = codes.removesuffix(".qweight")
        names = (codes, f"{module}.qzeros", f"{module}.scales")
        if module != codes and all(name in stored for name in names) and _fit(names, stored):
            order = f"{module}.g_idx"
            weights[f"{module}.weight"] = (*names, order) if order in stored else names
    return Claims(weights)


def _fit(names: tuple[str, ...], stored: Mapping[str, TensorInfo]) -> bool:
    codes, zeros, scales = (stored[name].spec for name in names)
    if (codes.dtype, zeros.dtype) != ("I32", "I32") or scales.dtype not in FLOATS:
        return False
    if not len(codes.shape) == len(zeros.shape) == len(scales.shape) == 2 or 0 in scales.shape:
        return False
    return codes.shape[1] == scales.shape[1] and zeros.shape[0] == scales.shape[0]


def _bits(zeros: TensorSpec, scales: TensorSpec) -> Fraction:
    """Of a code: as many as a row of zero points has for each output."""
    return Fraction(32 * zeros.shape[1], scales.shape[1])


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns bits and, where the config says it, the size of groups."""
    codes, zeros, scales = (stored[name].spec for name in names[:3])
    bits = _bits(zeros, scales)
    n_inputs = int(32 * codes.shape[0] / bits) if bits else 0
    sizes = _fitting_groups(names[0].removesuffix(".qweight"), n_inputs, scales.shape[0], config)
    return _scheme(int(bits), sizes[0] if len(sizes) == 1 else 0, bits)


def _scheme(bits: int, group_size: int, codes_of: Fraction, *, in_order: bool = True) -> Scheme:
    words = f"GPTQ, {bits} bit" + ("" if in_order else ", act-order")
    return Scheme(
        "gptq", blocksize=group_size, words=words, bits=bits, codes_per_byte=Fraction(8) / (codes_of or 1)
    )


def _fitting_groups(module: str, n_inputs: int, n_groups: int, config: Mapping[str, Any]) -> list[int]:
    """Sizes of groups that make so many of the inputs: what the config says of the module, else those that
    the config names anywhere, else the size that makes equal groups."""
    sizes = set()
    for section in quantizations(config):
        said = group_size_of(module, section)
        if type(said) is int and said > 0 and -(-n_inputs // said) == n_groups:
            return [said]
        of_modules = (part for name in ("dynamic", "extra_config") for part in _dicts(section.get(name)))
        for part in (section, *of_modules):
            size = part.get("group_size")
            if type(size) is int and size > 0 and -(-n_inputs // size) == n_groups:
                sizes.add(size)
    return sorted(sizes) or [n_inputs // n_groups] * (n_inputs % n_groups == 0)


def _dicts(value: object) -> list[dict[str, Any]]:
    return [v for v in value.values() if isinstance(v, dict)] if isinstance(value, dict) else []


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a GPTQ weight. Raises CheckpointError for a layout that is not read, and where
    the stored tensors do not fit together."""
    try:
        matrix = _matrix(names, ckpt)
    except ValueError as e:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)}: {e}") from None
    return GptqRows(matrix) if is_conv1d(ckpt.config, weight) else Bands(matrix)


def _matrix(names: tuple[str, ...], ckpt: Checkpoint) -> GptqMatrix:
    less_one = _zeros_less_one(ckpt)
    codes, zeros, scales = (ckpt.tensors[name].spec for name in names[:3])
    bits = _bits(zeros, scales)
    if bits not in BITS:
        known = f"{bits} bit are" if bits in (5, 6, 7) else f"{shown(names[1])} {zeros} is"
        raise ValueError(f"GPTQ of 2, 3, 4 and 8 bit is read; {known} not. {WITH_ITS_LIBRARY}")
    n_inputs = int(32 * codes.shape[0] / bits)
    group_of: torch.Tensor | int
    if len(names) == 4:
        group_of = _stored_groups(names[3], n_inputs, scales.shape[0], bits, ckpt)
        n_inputs = ckpt.tensors[names[3]].spec.numel
    else:
        _refuse_lost_order(names[0], scales.shape[0], ckpt)
        group_of = _equal_groups(names[0], n_inputs, scales.shape[0], ckpt)
    if -(-n_inputs * int(bits) // 32) != codes.shape[0]:
        raise ValueError(f"{shown(names[0])} {codes} does not hold {n_inputs} inputs of {bits} bit each.")
    spec = TensorSpec(out_dtype(ckpt, "F16"), (scales.shape[1], n_inputs))
    if isinstance(group_of, int):
        told = _scheme(int(bits), group_of, bits)
    else:
        size = scheme(names, ckpt.tensors, ckpt.config).blocksize
        told = _scheme(int(bits), size, bits, in_order=False)
    return GptqMatrix(ckpt, names, spec, told, int(bits), less_one, group_of)


def _refuse_lost_order(codes: str, n_groups: int, ckpt: Checkpoint) -> None:
    """Raises ValueError where the config says that groups are not runs of inputs, and g_idx is missing."""
    if n_groups > 1 and any(section.get("desc_act") is True for section in quantizations(ckpt.config)):
        raise ValueError(
            f"{shown(codes.removesuffix('.qweight'))}.g_idx is missing, which says the order of inputs where "
            "config.json has desc_act: true."
        )


def _equal_groups(codes: str, n_inputs: int, n_groups: int, ckpt: Checkpoint) -> int:
    sizes = _fitting_groups(codes.removesuffix(".qweight"), n_inputs, n_groups, ckpt.config)
    if len(sizes) != 1:
        raise ValueError(
            f"{n_groups} groups of {n_inputs} inputs, of which {shown(codes)} has no g_idx, may have "
            f"{' or '.join(map(str, sizes)) or 'no'} inputs each by the config's group_size."
        )
    return sizes[0]


def _stored_groups(
    name: str, n_inputs: int, n_groups: int, bits: Fraction, ckpt: Checkpoint
) -> torch.Tensor | int:
    """int32 [K], the group of each input; or their size, where groups are runs of inputs."""
    spec = ckpt.tensors[name].spec
    if spec.dtype != "I32" or len(spec.shape) != 1 or not n_inputs - 32 < spec.numel <= n_inputs:
        raise ValueError(f"{shown(name)} is {spec}; expected I32 [{n_inputs}].")
    groups = torch.frombuffer(read_all(ckpt, name), dtype=torch.int32)
    least, most = (int(extreme) for extreme in groups.aminmax())
    if least < 0 or most >= n_groups:
        raise ValueError(f"{shown(name)} holds {least} to {most}; there are {n_groups} groups.")
    size = int((groups == 0).sum()) or 1
    runs = torch.arange(spec.numel, dtype=torch.int32, device="cpu").div_(size, rounding_mode="floor")
    return size if torch.equal(runs, groups) else groups


def _zeros_less_one(ckpt: Checkpoint) -> bool:
    """Whether zero points are stored minus 1, as the config says. Raises ValueError for layouts that are not
    read."""
    section = next(quantizations(ckpt.config), None)
    if section is None:
        raise ValueError(
            "its tensors are those of GPTQ, and no config says of which version: 1 stores zero points minus "
            "1, 2 as they are. Add quantization_config to config.json, with checkpoint_format."
        )
    method = section.get("quant_method", "gptq")
    if unread := unread_layout(section, method):
        raise ValueError(unread)
    if method not in QUANT_METHODS:
        raise ValueError(f"its tensors are those of GPTQ, and the config says {shown(method)}.")
    if section.get("pack_dtype", "int32") not in ("int32", None):
        raise ValueError(
            f"pack_dtype {shown(section['pack_dtype'])} is not read, only int32. {WITH_ITS_LIBRARY}"
        )
    if method == "gptq":
        layout, known = section.get("checkpoint_format") or section.get("format") or "gptq", _LESS_ONE
    else:
        layout, known = _packing(section), _LESS_ONE_OF_AUTO_ROUND
    if not isinstance(layout, str) or layout not in known:
        raise ValueError(
            f"GPTQ in the layout {shown(layout)} is not read, only {' and '.join(known)}. {WITH_ITS_LIBRARY}"
        )
    return known[layout]


def _packing(section: Mapping[str, Any]) -> object:
    return section.get("packing_format") or section.get("backend") or "auto_round:auto_gptq"
