"""bitsandbytes LLM.int8: `X.weight` int8 (out, in), `X.SCB` fp32 (out,), `X.weight_format` uint8 scalar, 0 =
"row".

The weight is fp32, uncast: dequantize.py. Outlier columns are a matter of run time; the weights are complete.
"""

from collections.abc import Mapping

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.dequantize import decode_int8
from lorafuse.codecs.conv1d import is_conv1d
from lorafuse.codecs.sources import Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import FLOATS, SAFETENSORS_NAMES, TensorInfo, TensorSpec


def claim(stored: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    claims: dict[str, tuple[str, ...]] = {}
    for scb in stored:
        module = scb.removesuffix(".SCB")
        weight = f"{module}.weight"
        if module != scb and weight in stored and stored[weight].spec.dtype == "I8":
            extra = f"{module}.weight_format"
            claims[weight] = (weight, scb, extra) if extra in stored else (weight, scb)
    return claims


def scheme(names: tuple[str, ...]) -> Scheme:
    return Scheme("int8")


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> "Int8Sources":
    if len(names) == 3 and any(read_all(ckpt, names[2])):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} has a weight_format other than 0 (row), which is not "
            "supported."
        )
    q, scb = ckpt.tensors[weight].spec, ckpt.tensors[names[1]].spec
    if len(q.shape) != 2 or scb != TensorSpec("F32", q.shape[:1]):
        raise CheckpointError(
            f"{shown(ckpt.folder)}: {shown(weight)} is {q}, its SCB {scb}; expected SCB F32 "
            f"[{q.shape[0] if q.shape else 1}]."
        )
    return Int8Sources(weight, names, ckpt)


def _config_dtype(ckpt: Checkpoint) -> str:
    """The dtype the model had when it was quantized; transformers' default for int8 is float16."""
    for part in (ckpt.config, ckpt.config.get("text_config") or {}):
        name = SAFETENSORS_NAMES.get(str(part.get("dtype") or part.get("torch_dtype")))
        if name in FLOATS:
            return name
    return "F16"


class Int8Sources(Sources):
    """q and SCB of one weight. `transposed`: an HF Conv1D weight, stored (out, in), made (in, out)."""

    def __init__(self, weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> None:
        self.store, self.names, self.scheme = ckpt, names, scheme(names)
        self._stored = ckpt.tensors[weight].spec.shape
        self.transposed = is_conv1d(ckpt.config, weight)
        self.spec = TensorSpec("F32", self._stored[::-1] if self.transposed else self._stored)
        self.out_dtype = _config_dtype(ckpt)
        self.nbytes = self.spec.numel if self.transposed else 0

    def will_need(self, start: int, stop: int) -> None:
        if not self.transposed:
            self.store.will_need(self.names[0], start, stop - start)

    def fetch(self, start: int, stop: int, arena: Arena) -> tuple[torch.Tensor, torch.Tensor]:
        if self.transposed:
            start, stop = 0, self.spec.numel
        first, last = start // self._stored[1], stop // self._stored[1]  # stored rows
        q = arena.fetch("int8.q", self.store, self.names[0], start, stop - start)
        scb = arena.fetch("int8.scb", self.store, self.names[1], first * 4, (last - first) * 4)
        return q.view(torch.int8), scb.view(torch.float32)

    def decode(self, raw: tuple[torch.Tensor, ...], start: int, stop: int, arena: Arena) -> torch.Tensor:
        q, scb = (arena.place(t) for t in raw)
        out = arena.get(DECODED_FP32, stop - start, torch.float32)
        if self.transposed:
            n_out = self._stored[0]
            tile = out.view(-1, n_out)  # float32 [cols of the stored weight, n_out]
            tile.copy_(q.view(self._stored)[:, start // n_out : stop // n_out].T)
            return decode_int8(tile, scb).view(-1)
        out.copy_(q)
        decode_int8(out.view(-1, self._stored[1]), scb[:, None])
        return out
