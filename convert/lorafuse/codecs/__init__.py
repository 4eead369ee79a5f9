"""How weights are stored: how a weight is read from stored tensors, and which stored tensors it becomes.

A codec is a module that is a `Codec`. It is added by one file and one word in CODECS; the contract tests run
over the table.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs import bnb4, bnb8, dense
from lorafuse.codecs.other_formats import packed_format
from lorafuse.codecs.per_expert import as_stacks
from lorafuse.codecs.sources import Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.tensors import TensorInfo


class Codec(Protocol):
    """What a codec's module has."""

    QUANT_METHODS: tuple[str, ...]  # config.json's words for it, in quantization_config.quant_method

    @property
    def __name__(self) -> str: ...

    def claim(self, stored: Mapping[str, TensorInfo]) -> Mapping[str, tuple[str, ...]]:
        """Returns the weights that it makes, and from which stored tensors: first the one with the values or
        codes. A weight's name need not be that of a stored tensor. Every stored tensor is claimed once."""

    def scheme(self, names: tuple[str, ...]) -> Scheme:
        """Returns what the names of a weight's stored tensors tell of how it is stored."""

    def open_sources(self, weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
        """Returns the sources of a weight, for which it may read small tensors. Raises CheckpointError where
        the stored tensors do not fit together."""


# In order: a codec claims from what those before it left, dense takes the rest.
CODECS: tuple[Codec, ...] = (bnb4, bnb8, dense)

_WAY_OUT = (
    "bitsandbytes 4-bit and 8-bit and full precision are supported. Dequantize it first, or merge into the "
    "full-precision checkpoint."
)

__all__ = [
    "CODECS",
    "Arena",
    "Codec",
    "Scheme",
    "Sources",
    "claims",
    "open_weights",
    "refuse_unknown_quantization",
]


def claims(stored: Mapping[str, TensorInfo]) -> Iterator[tuple[Codec, str, tuple[str, ...]]]:
    """(codec, weight, the stored tensors that it is made from), for all that is stored."""
    left = dict(stored)
    for codec in CODECS:
        for weight, names in codec.claim(left).items():
            yield codec, weight, names
            for name in names:
                del left[name]


def open_weights(ckpt: Checkpoint) -> dict[str, Sources]:
    """Returns every weight of a checkpoint with its sources. Raises CheckpointError when no codec knows the
    quantization, or a stored tensor is missing or left over."""
    refuse_unknown_quantization(ckpt.config, ckpt.folder, ckpt.tensors)
    weights: dict[str, Sources] = {}
    for codec, weight, names in claims(ckpt.tensors):
        if weight in weights:
            raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)} is stored in two ways.")
        weights[weight] = codec.open_sources(weight, names, ckpt)
    _refuse_bare_codes(weights, ckpt)
    return as_stacks(weights, ckpt)


def refuse_unknown_quantization(
    config: Mapping[str, Any], folder: Folder, stored: Mapping[str, TensorInfo]
) -> None:
    """Raises CheckpointError for a checkpoint in a quantization that no codec knows: its config names it, or
    the tensors that no codec claims are those of one."""
    known = {method for codec in CODECS for method in codec.QUANT_METHODS}
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        quantization = part.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        # Very old bitsandbytes configs name no method. One that is no text is not hashable, perhaps.
        if method is not None and not (isinstance(method, str) and method in known):
            raise CheckpointError(
                f"{folder / 'config.json'}: the checkpoint is quantized with {shown(method)}; {_WAY_OUT}"
            )
    packed = packed_format({name: stored[name] for codec, name, _ in claims(stored) if codec is dense})
    if packed is not None:
        name, title = packed
        raise CheckpointError(
            f"{shown(folder)}: {shown(name)} belongs to a weight that is quantized: {title}; {_WAY_OUT}"
        )


def _refuse_bare_codes(weights: Mapping[str, Sources], ckpt: Checkpoint) -> None:
    """In a quantized checkpoint, or beside what bitsandbytes stores with codes, integers called `weight` that
    no codec claimed are codes whose companions are missing."""
    quantized = bool(ckpt.config.get("quantization_config"))
    for name, sources in weights.items():
        module = name.removesuffix(".weight")
        codes = module != name and sources.spec.dtype in ("U8", "I8")
        if (codes and (quantized or f"{module}.SCB" in weights)) or f"{name}.absmax" in weights:
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(name)} is quantized, but its quant_state or SCB is missing."
            )
