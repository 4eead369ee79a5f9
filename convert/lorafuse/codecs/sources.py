"""Sources: how the values of one weight are read and decoded. What every codec produces."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.files.stores import Store
from lorafuse.files.tensors import Box, TensorSpec

# What `fetch` read and `decode` takes.
Raw = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is stored: `kind` is nf4, fp4, int8, dense, or the word of another codec. `blocksize`, the
    elements that share a scale, is 0 where there are no blocks, and where only headers were read and do not
    tell it. `words`: the kind as it is shown, where that is not `kind` itself."""

    kind: str
    double_quant: bool = False
    blocksize: int = 0
    _: KW_ONLY
    words: str = ""
    bits: int = 0  # of a code; 0 where there are none
    # Of codes that are packed in bytes; 0 where an element of the stored tensor is an element of the weight.
    codes_per_byte: Fraction | int = 0

    def __str__(self) -> str:
        """In words, as in "stored in …"."""
        words = self.words or self.kind
        words += ", double-quantized" if self.double_quant else ""
        return words + (f", block size {self.blocksize}" if self.blocksize else "")

    def numel_of(self, stored: TensorSpec) -> int:
        """Elements of the weight whose values or codes are in `stored`; codes that only fill up a byte, a
        word or a row count too."""
        return int(self.codes_per_byte * stored.nbytes) or stored.numel


class Claims(NamedTuple):
    """What a codec takes of what is stored. `weights`: each weight → the stored tensors that it is made from;
    `dropped`: stored tensors that no weight of the dense model is made from (a scale of activations) → why.
    """

    weights: Mapping[str, tuple[str, ...]]
    dropped: Mapping[str, str] = MappingProxyType({})


class Sources(Protocol):
    """The stored tensors that one weight is made from, and how.

    `fetch` reads, `decode` computes: they are apart so that the time of each is known. Both take a box of the
    weight whose elements lie together: whole rows of its last dimension, or of a dense weight any run. A
    class that lists it as its base takes the defaults below.

    `spec`: the shape, and the dtype that decoding yields.
    `out_dtype`: the dtype that `--dtype auto` writes; it differs from spec.dtype for int8, which decodes to
    fp32.
    `names`: the stored tensors; the first holds the values or codes. `store`: where they are.
    `as_stored`: whether the one stored tensor holds the values themselves.
    `nbytes`: host bytes that a worker holds while it decodes a tile, beyond what is proportional to the tile.
    `held_nbytes`: host bytes held from prepare to release.
    `window_nbytes`: host bytes that the tiles in the making hold together, however many they are.
    `rows_at_once`: rows that are decoded together, of whose multiples a tile is best made.
    """

    __slots__ = ()

    spec: TensorSpec
    out_dtype: str
    names: tuple[str, ...]
    store: Store
    scheme: Scheme
    as_stored: bool = False
    nbytes: int = 0
    held_nbytes: int = 0
    window_nbytes: int = 0
    rows_at_once: int = 1

    def prepare(self, arena: Arena) -> None:
        """Compute what decoding needs of the whole weight. Any thread may call it, at any time before it is
        needed, or none."""
        return

    def release(self) -> None:
        """Drop what prepare computed, or what was read for several tiles; it is made again when it is needed
        again."""
        return

    def will_need(self, box: Box) -> None:
        """Hint that the box is fetched soon."""

    def fetch(self, box: Box, arena: Arena) -> Raw:
        """Returns the raw bytes that the elements of the box need. Raises CheckpointError, StorageError."""

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        """Returns the elements of the box, 1-D, of spec.dtype, on the arena's device, from what `fetch`
        returned for it. Valid until the arena's next use."""

    def decode_and_keep(self, raw: Raw, box: Box, arena: Arena) -> tuple[torch.Tensor, Raw]:
        """Returns what `decode` does, and `raw`, perhaps with what was computed of it: whoever takes the one
        takes the other."""
        return self.decode(raw, box, arena), raw

    def values(self, box: Box, arena: Arena) -> torch.Tensor:
        """Returns the elements of the box, as `decode` does. No class has its own."""
        return self.decode(self.fetch(box, arena), box, arena)
