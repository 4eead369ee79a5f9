"""AQLM (quant_method "aqlm"): groups of og · ig elements are sums of vectors out of C codebooks.

`M.codes` I8, I16 or I32 [N / og, K / ig, C]: a code is one modulo the length of a codebook; `M.codebooks`
[C, length, og, ig], in the dtype S; `M.scales` [N / og, 1, 1, 1]. W = T(S(S(Σ vectors) · scale)), summed in
fp32, T the model's dtype. As aqlm 1.1.7 (aqlm/utils.py, _dequantize_weight).
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.vectors import decode_vectors
from lorafuse.codecs.conv1d import CHUNK_NUMEL
from lorafuse.codecs.held import ComputedOnce
from lorafuse.codecs.model_dtype import out_dtype
from lorafuse.codecs.sources import Claims, Raw, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import DTYPES, FLOATS, Box, TensorInfo, TensorSpec

QUANT_METHODS: tuple[str, ...] = ("aqlm",)
CHUNK_NBYTES_PER_ELEMENT = 24
_PARTS = ("codes", "codebooks", "scales")


def claim(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
    """Returns {M.weight: (M.codes, M.codebooks, M.scales)}."""
    weights = {}
    for codes in stored:
        module = codes.removesuffix(".codes")
        names = tuple(f"{module}.{part}" for part in _PARTS)
        whole = module != codes and all(name in stored for name in names)
        if whole and stored[codes].spec.dtype in ("I8", "I16", "I32"):
            weights[f"{module}.weight"] = names
    return Claims(weights)


def scheme(names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Scheme:
    """Returns the number and length of codebooks."""
    codes, books = (stored[name].spec for name in names[:2])
    if len(books.shape) != 4 or not codes.nbytes:
        return Scheme("aqlm", words="AQLM")
    n_books, length, height, width = books.shape
    words = f"AQLM, {n_books} × {(length - 1).bit_length()} bit for {height * width} elements"
    numel = codes.numel // max(n_books, 1) * height * width
    return Scheme("aqlm", words=words, codes_per_byte=Fraction(numel, codes.nbytes))


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
    """Returns the sources of a weight. Raises CheckpointError where the stored tensors do not fit
    together."""
    codes, books, scales = (ckpt.tensors[name].spec for name in names)
    if not _fit(codes, books, scales):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)}: {shown(names[0])} {codes}, {shown(names[1])} {books} "
            f"and {shown(names[2])} {scales} are not those of a weight of AQLM."
        )
    _, _, height, width = books.shape
    spec = TensorSpec(out_dtype(ckpt, books.dtype), (codes.shape[0] * height, codes.shape[1] * width))
    return Codebooks(names, spec, ckpt)


def _fit(codes: TensorSpec, books: TensorSpec, scales: TensorSpec) -> bool:
    if len(codes.shape) != 3 or len(books.shape) != 4 or books.dtype not in FLOATS:
        return False
    n_books, length = books.shape[:2]
    whole = length & (length - 1) == 0 and codes.shape[2] == n_books
    return (
        whole
        and bool(codes.numel * books.numel)
        and scales == TensorSpec(books.dtype, (codes.shape[0], 1, 1, 1))
    )


class Codebooks(Sources):
    """The weight as codes; all of the codebooks are held while it is decoded."""

    def __init__(self, names: tuple[str, ...], spec: TensorSpec, ckpt: Checkpoint) -> None:
        self.names, self.spec, self.store, self.out_dtype = names, spec, ckpt, spec.dtype
        self.scheme = scheme(names, ckpt.tensors, ckpt.config)
        self._books, self._codes = (ckpt.tensors[name].spec for name in (names[1], names[0]))
        self._height, self._width = self._books.shape[2:]
        self.held_nbytes = self._books.nbytes
        self.nbytes = max(CHUNK_NUMEL, self._height * spec.n_cols) * CHUNK_NBYTES_PER_ELEMENT
        self._held = ComputedOnce()
        self._dtype = getattr(torch, self._books.torch_name)

    def _groups(self, box: Box) -> tuple[range, range]:
        """(rows, the groups of rows that have them)."""
        rows = range(*(at // self.spec.n_cols for at in box.run))
        return rows, range(rows.start // self._height, -(-rows.stop // self._height))

    def release(self) -> None:
        self._held.drop()

    def will_need(self, box: Box) -> None:
        groups, nbytes = self._groups(box)[1], self._row_nbytes
        self.store.will_need(self.names[0], groups.start * nbytes, len(groups) * nbytes)

    @property
    def _row_nbytes(self) -> int:
        return self._codes.nbytes // self._codes.shape[0]

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """Codes and scales of the groups, and the codebooks, [C, length, og · ig]."""
        groups, nbytes, itemsize = self._groups(box)[1], self._row_nbytes, DTYPES[self._books.dtype][0]
        codes = arena.fetch(
            "aqlm.codes", self.store, self.names[0], groups.start * nbytes, len(groups) * nbytes
        )
        scales = arena.fetch(
            "aqlm.scales", self.store, self.names[2], groups.start * itemsize, len(groups) * itemsize
        )
        return codes, scales, *self._held.get(self._read_books)

    def _read_books(self) -> Raw:
        books = torch.frombuffer(read_all(self.store, self.names[1]), dtype=self._dtype)
        return (books.view(*self._books.shape[:2], -1),)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        rows, groups = self._groups(box)
        n_cols, height = self.spec.n_cols, self._height
        made = arena.get("aqlm.made", len(groups) * height * n_cols, getattr(torch, self.spec.torch_name))
        codes, scales, books = (arena.place(tensor) for tensor in raw)
        codes = codes.view(getattr(torch, self._codes.torch_name)).view(len(groups), *self._codes.shape[1:])
        matrix = made.view(len(groups), height, self._codes.shape[1], self._width)
        decode_vectors(codes, books, scales.view(self._dtype), matrix, arena)
        skipped = (rows.start - groups.start * height) * n_cols
        return made[skipped : skipped + len(rows) * n_cols]
