"""Knowledge of storage schemes: how a weight of the output is made from stored tensors.

A codec is a module with three functions. `claim(stored)` says which weights it makes and from which stored
tensors; every stored tensor is claimed exactly once. `scheme(names)` says what the names of these tell of the
storage. `open_sources(weight, names, ckpt)` reads small tensors and returns Sources, which decode any run of
elements. A codec is added by one file and one word in CODECS; the contract tests run over the table.
"""

from collections.abc import Iterator, Mapping
from types import ModuleType

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs import bnb4, bnb8, dense, plain
from lorafuse.codecs.encoder import EncoderOf
from lorafuse.codecs.sources import Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import TensorInfo

# In order: a codec claims from what those before it left, dense takes the rest.
CODECS: tuple[ModuleType, ...] = (bnb4, bnb8, dense)

# How the output is stored: the word of `--format` → what gives each weight its encoder.
FORMATS: dict[str, EncoderOf] = {"dense": plain.encoder_of}

__all__ = ["CODECS", "FORMATS", "Arena", "Scheme", "Sources", "claims", "open_weights"]


def claims(stored: Mapping[str, TensorInfo]) -> Iterator[tuple[ModuleType, str, tuple[str, ...]]]:
    """(codec, weight, the stored tensors that it is made from), for all that is stored."""
    left = dict(stored)
    for codec in CODECS:
        claimed: Mapping[str, tuple[str, ...]] = codec.claim(left)
        for weight, names in claimed.items():
            yield codec, weight, names
            for name in names:
                del left[name]


def open_weights(ckpt: Checkpoint) -> dict[str, Sources]:
    """Every weight of a checkpoint with its sources. Raises CheckpointError when a stored tensor is missing
    or left over."""
    weights: dict[str, Sources] = {}
    for codec, weight, names in claims(ckpt.tensors):
        if weight in weights:
            raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)} is stored in two ways.")
        weights[weight] = codec.open_sources(weight, names, ckpt)
    _refuse_bare_codes(weights, ckpt)
    return weights


def _refuse_bare_codes(weights: Mapping[str, Sources], ckpt: Checkpoint) -> None:
    """In a quantized checkpoint, integers called `weight` that no codec claimed are codes whose companions
    are missing."""
    if not ckpt.config.get("quantization_config"):
        return
    for name, sources in weights.items():
        if name.endswith(".weight") and sources.spec.dtype in ("U8", "I8"):
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(name)} is quantized, but its quant_state or SCB is missing."
            )
