"""What every codec produces, and the scratch memory that decoding works in."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lorafuse.checkpoint import Store
from lorafuse.tensors import TensorSpec

# Modules of class transformers.pytorch_utils.Conv1D, whose weight is (in, out). bitsandbytes stores these as (out, in).
# From `grep 'Conv1D(' models/*/modeling_*.py` of transformers 5.23.0.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp"})
CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is stored: `kind` is nf4, fp4, int8 or dense. `blocksize` is 0 where there are no blocks, and where only headers
    were read, which do not tell it."""

    kind: str
    double_quant: bool = False
    blocksize: int = 0

    def __str__(self) -> str:
        """In words, as in "stored in …"."""
        words = {"nf4": "NF4", "fp4": "FP4", "dense": "full precision"}.get(self.kind, self.kind)
        words += ", double-quantized" if self.double_quant else ""
        return words + (f", block size {self.blocksize}" if self.blocksize else "")

    def numel_of(self, stored: TensorSpec) -> int:
        """Elements of the weight whose values or codes are in `stored`; of 4-bit codes, the pad of an odd number counts too."""
        return 2 * stored.nbytes if self.kind in ("nf4", "fp4") else stored.numel


def is_conv1d(config: dict[str, Any], weight: str) -> bool:
    """Whether a weight belongs to an HF Conv1D module, by the model type and the module's name."""
    parts = weight.split(".")
    return config.get("model_type") in CONV1D_MODEL_TYPES and len(parts) > 1 and parts[-2] in CONV1D_MODULES


def host_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the host, writable, not copied."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers, their stubs do not say so


# The scratch that a codec decodes to fp32 in. Once the tile is in the narrower dtype of its quant_state, the sum may use it:
# a buffer less that has to stay in cache.
DECODED_FP32 = "decoded.fp32"


class Arena:
    """Named scratch tensors of one worker, made once and grown when a larger one is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def get(self, name: str, numel: int, dtype: torch.dtype, *, host: bool = False) -> torch.Tensor:
        """An uninitialised 1-D tensor [numel]; the one of the last call with that name is no longer valid."""
        tensor = self._pool.get((name, dtype))
        if tensor is None or tensor.numel() < numel:
            tensor = torch.empty(numel, dtype=dtype, device="cpu" if host else self.device)
            self._pool[name, dtype] = tensor
        return tensor[:numel]

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the arena's device."""
        # Not `to` on the CPU: for the small tensors of a tile the call would cost as much as the work.
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def fetch(self, name: str, store: Store, key: str, start: int, nbytes: int) -> torch.Tensor:
        """Bytes [start, start + nbytes) of a stored tensor, uint8 [nbytes] on the host."""
        buffer = self.get(name, nbytes, torch.uint8, host=True)
        if nbytes:
            store.read_into(key, start, host_view(buffer))
        return buffer


class Sources(Protocol):
    """The stored tensors that one weight is made from, and how.

    `fetch` reads, `decode` computes: they are apart so that the time of each is known. Elements [start, stop) are counted in
    the flattened weight and are whole rows of its last dimension. A class that lists it as its base takes the defaults below.
    """

    spec: TensorSpec  # shape, and the dtype that decoding yields
    out_dtype: str  # the dtype that `--dtype auto` writes; differs from spec.dtype for int8, which decodes to fp32
    names: tuple[str, ...]  # the stored tensors
    store: Store  # where they are
    scheme: Scheme
    nbytes: int  # host bytes held while a tile is decoded, beyond what is proportional to the tile
    held_nbytes: int = 0  # host bytes held from prepare to release

    def prepare(self, arena: Arena) -> None:
        """Compute what decoding needs of the whole weight. Any thread may call it, at any time before it is needed, or none."""
        return

    def release(self) -> None:
        """Drop what prepare computed; it is computed again when it is needed again."""
        return

    def will_need(self, start: int, stop: int) -> None:
        """Hint that elements [start, stop) are fetched soon."""

    def fetch(self, start: int, stop: int, arena: Arena) -> tuple[torch.Tensor, ...]:
        """The raw bytes that elements [start, stop) of the flattened weight need."""

    def decode(self, raw: tuple[torch.Tensor, ...], start: int, stop: int, arena: Arena) -> torch.Tensor:
        """Elements [start, stop), 1-D, of spec.dtype, on the arena's device. Valid until the arena's next use."""
