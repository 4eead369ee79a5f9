"""AWQ of 4 bits, version "gemm" (quant_method "awq", and auto-round's packing of that name).

For a module M of K inputs and N outputs, in G equal groups of inputs: `M.qweight` I32 [K, N / 8], eight
outputs in a word, in the order of word_columns.py; `M.qzeros` I32 [G, N / 8] alike, which may be missing
where zero points are 0; `M.scales` [G, N]. W[n, k] = T((code − zero) · T(scale)), T the model's dtype. As
AutoAWQ 0.2.9 (awq/utils/packing_utils.py) and gptqmodel 7.7, whose modules cast scales to T at first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.coded_rows import scale
from lorafuse.arithmetic.codes import Numbers
from lorafuse.arithmetic.word_columns import awq_codes, awq_numbers, awq_words
from lorafuse.codecs.bands import Bands
from lorafuse.codecs.held import read_runs, read_turned
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.other_formats import quantizations, unread_layout
from lorafuse.codecs.sources import Claims, Raw, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import Store
from lorafuse.files.tensors import DTYPES, FLOATS, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("awq",)
OF_A_WORD = 8  # outputs
BITS = 4


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (M.qweight, M.scales, and M.qzeros where it is stored)} where their shapes are those
    of AWQ."""
    weights = {}
    for codes in stored:
        module = codes.removesuffix(".qweight")
        scales, zeros = f"{module}.scales", f"{module}.qzeros"
        if module != codes and scales in stored:
            names = (codes, scales, zeros) if zeros in stored else (codes, scales)
            if _fit([stored[name].spec for name in names]):
                weights[f"{module}.weight"] = names
    return Claims(weights)


def _fit(specs: list[TensorSpec]) -> bool:
    codes, scales, *zeros = specs
    if len(codes.shape) != 2 or len(scales.shape) != 2 or codes.dtype != "I32" or scales.dtype not in FLOATS:
        return False
    (n_inputs, n_words), (n_groups, n_outputs) = codes.shape, scales.shape
    whole = n_outputs == n_words * OF_A_WORD and 0 < n_groups <= n_inputs and n_inputs % n_groups == 0
    return whole and n_words > 0 and zeros in ([], [TensorSpec("I32", (n_groups, n_words))])


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the size of groups."""
    codes, scales = (stored[name].spec for name in names[:2])
    group_size = codes.shape[0] // scales.shape[0]
    return Scheme("awq", blocksize=group_size, words="AWQ, 4 bit", bits=BITS, codes_per_byte=2)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of an AWQ weight. Raises CheckpointError for another version, and where the inputs
    of the layer are scaled at run time."""
    try:
        _check(weight.removesuffix(".weight"), ckpt, names)
    except ValueError as e:
        raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)}: {e}") from None
    n_inputs, n_words = ckpt.tensors[names[0]].spec.shape
    spec = TensorSpec(out_dtype(ckpt, "F16"), (n_words * OF_A_WORD, n_inputs))
    return Bands(AwqMatrix(ckpt, names, spec, scheme(names, ckpt.tensors, ckpt.config)))


def _check(module: str, ckpt: Checkpoint, names: tuple[str, ...]) -> None:
    section = next(quantizations(ckpt.config), None) or {}
    method = section.get("quant_method", "awq")
    if len(names) < len(("qweight", "scales", "qzeros")) and section.get("zero_point") is not False:
        raise ValueError(
            f"{shown(module)}.qzeros is missing, without which only a config with zero_point: false is read."
        )
    if method == "awq":
        if unread := unread_layout(section, method):
            raise ValueError(unread)
    elif method in ("auto-round", "intel/auto-round"):
        packing = section.get("packing_format") or section.get("backend")
        if packing != "auto_round:auto_awq":
            raise ValueError(f"its tensors are those of AWQ, and the config's packing is {shown(packing)}.")
    else:
        raise ValueError(f"its tensors are those of AWQ, and the config says {shown(method)}.")
    for activation in ("act", "gelu_impl"):
        name = f"{module.rpartition('.')[0]}.{activation}.scales"
        if name in ckpt.tensors:
            raise ValueError(
                f"the layer takes activations that {shown(name)} scales; the dense model has no place for "
                "that. Merge into the full-precision checkpoint."
            )


@dataclass
class AwqMatrix:
    """The matrix of an AWQ weight, read by outputs."""

    store: Store
    names: tuple[str, ...]
    spec: TensorSpec
    scheme: Scheme

    multiple: ClassVar[int] = OF_A_WORD
    unit: ClassVar[int] = OF_A_WORD
    via: ClassVar[tuple[str, ...]] = ()
    bits: ClassVar[int] = BITS

    def __post_init__(self) -> None:
        scales = self.store.tensors[self.names[1]].spec
        self.n_groups, self._scales_dtype = scales.shape[0], scales.dtype
        self._itemsize = DTYPES[scales.dtype][0]
        self.group_of = self.spec.shape[1] // self.n_groups

    def nbytes(self, n_outputs: int) -> int:
        n_words = n_outputs // OF_A_WORD
        of_groups = n_outputs * self._itemsize + 4 * n_words * (len(self.names) - 2)
        return self.spec.shape[1] * 4 * n_words + self.n_groups * of_groups

    def read(self, outputs: range, arena: Arena) -> Raw:
        """Words int32 [words, in], scales [groups, outputs], and zero points int32 [words, groups]."""
        n_outputs, size = self.spec.shape[0], self._itemsize
        starts = [(group * n_outputs + outputs.start) * size for group in range(self.n_groups)]
        scales = read_runs(self.store, self.names[1], starts, len(outputs) * size)
        return (
            self._words(self.names[0], self.spec.shape[1], outputs, arena),
            scales.view(getattr(torch, DTYPES[self._scales_dtype][1])),
            *(self._words(name, self.n_groups, outputs, arena) for name in self.names[2:]),
        )

    def _words(self, name: str, n_rows: int, outputs: range, arena: Arena) -> torch.Tensor:
        starts = [(row * self.spec.shape[0] + outputs.start) // 2 for row in range(n_rows)]
        return read_turned(self.store, name, starts, len(outputs) // OF_A_WORD, arena)

    def by_outputs(self, raw: Raw, at: range, arena: Arena) -> Raw:
        words = slice(at.start // OF_A_WORD, at.stop // OF_A_WORD)
        scales = arena.place(raw[1][:, at.start : at.stop]).T.to(getattr(torch, self.spec.torch_name))
        zeros = [awq_codes(arena.place(stored[words])).float() for stored in raw[2:]]
        return arena.place(raw[0][words]), scales.float().contiguous(), *zeros

    def decode(self, by_outputs: Raw, at: range, values: torch.Tensor, arena: Arena) -> None:
        words = slice(at.start // OF_A_WORD, -(-at.stop // OF_A_WORD))
        skipped, n_inputs = at.start % OF_A_WORD, self.spec.shape[1]
        stored, (scales, *zeros) = by_outputs[0][words], (part[at.start : at.stop] for part in by_outputs[1:])
        made = arena.get(DECODED_FP32, OF_A_WORD * stored.numel(), torch.float32)
        awq_numbers(stored, made)
        made = made.view(-1, n_inputs)[skipped : skipped + len(at)]
        scale(made, Numbers(scales, zeros[0] if zeros else None, self.group_of))
        values.copy_(made)

    def codes(self, words: torch.Tensor) -> torch.Tensor:
        return awq_codes(words)

    def words(self, codes: torch.Tensor) -> torch.Tensor:
        return awq_words(codes)
