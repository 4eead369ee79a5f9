"""What every codec produces, and the scratch memory that decoding works in."""

from dataclasses import dataclass
from typing import Protocol

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.files.stores import Store
from lorafuse.files.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is stored: `kind` is nf4, fp4, int8 or dense. `blocksize` is 0 where there are no blocks,
    and where only headers were read, which do not tell it."""

    kind: str
    double_quant: bool = False
    blocksize: int = 0

    def __str__(self) -> str:
        """In words, as in "stored in …"."""
        words = {"nf4": "NF4", "fp4": "FP4", "dense": "full precision"}.get(self.kind, self.kind)
        words += ", double-quantized" if self.double_quant else ""
        return words + (f", block size {self.blocksize}" if self.blocksize else "")

    def numel_of(self, stored: TensorSpec) -> int:
        """Elements of the weight whose values or codes are in `stored`; of 4-bit codes, the pad of an odd
        number counts too."""
        return 2 * stored.nbytes if self.kind in ("nf4", "fp4") else stored.numel


class Sources(Protocol):
    """The stored tensors that one weight is made from, and how.

    `fetch` reads, `decode` computes: they are apart so that the time of each is known. Elements [start, stop)
    are counted in the flattened weight and are whole rows of its last dimension. A class that lists it as its
    base takes the defaults below.
    """

    spec: TensorSpec  # shape, and the dtype that decoding yields
    out_dtype: (
        str  # the dtype that `--dtype auto` writes; differs from spec.dtype for int8, which decodes to fp32
    )
    names: tuple[str, ...]  # the stored tensors
    store: Store  # where they are
    scheme: Scheme
    nbytes: int  # host bytes held while a tile is decoded, beyond what is proportional to the tile
    held_nbytes: int = 0  # host bytes held from prepare to release

    def prepare(self, arena: Arena) -> None:
        """Compute what decoding needs of the whole weight. Any thread may call it, at any time before it is
        needed, or none."""
        return

    def release(self) -> None:
        """Drop what prepare computed; it is computed again when it is needed again."""
        return

    def will_need(self, start: int, stop: int) -> None:
        """Hint that elements [start, stop) are fetched soon."""

    def fetch(self, start: int, stop: int, arena: Arena) -> tuple[torch.Tensor, ...]:
        """The raw bytes that elements [start, stop) of the flattened weight need."""

    def decode(self, raw: tuple[torch.Tensor, ...], start: int, stop: int, arena: Arena) -> torch.Tensor:
        """Elements [start, stop), 1-D, of spec.dtype, on the arena's device. Valid until the arena's next
        use."""
