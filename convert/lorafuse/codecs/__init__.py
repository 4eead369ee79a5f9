"""How weights are stored: how a weight is read from stored tensors, and which stored tensors it becomes.

A codec is a module that is a `Codec`. It is added by one file and one word in CODECS; the contract tests run
over the table.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs import (
    aqlm,
    awq,
    bnb4,
    bnb8,
    compressed_tensors,
    dense,
    fbgemm_fp8,
    fp8,
    gptq,
    hqq,
    mlx,
    modelopt,
    mxfp4,
    torchao,
)
from lorafuse.codecs.other_formats import (
    is_bare,
    is_orphan,
    is_part,
    packed_format,
    quantizations,
    stray_part,
    unread_layout,
    unread_setting,
    way_out,
)
from lorafuse.codecs.per_expert import as_stacks
from lorafuse.codecs.sources import Claims, Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.tensors import TensorInfo
from lorafuse.files.uncollected import uncollected


class Codec(Protocol):
    """What a codec's module has."""

    QUANT_METHODS: tuple[str, ...]  # config.json's words for it, in quantization_config.quant_method

    @property
    def __name__(self) -> str: ...

    def claim(self, stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Claims:
        """Returns the weights that it makes, and from which stored tensors: first the one with the values or
        codes. A weight's name, which is that of the dense model, need not be that of a stored tensor. Every
        stored tensor is claimed or dropped once.

        What is quantized is decided by the companions that are stored, never by lists of modules in
        `config` (config.json, of which nothing is checked)."""

    def scheme(
        self, names: tuple[str, ...], stored: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> Scheme:
        """Returns how a weight with these stored tensors is stored, as far as headers and config tell."""

    def open_sources(self, weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> Sources:
        """Returns the sources of a weight, for which it may read small tensors. Raises CheckpointError where
        the stored tensors do not fit together."""


# In order: a codec claims from what those before it left, dense takes the rest.
CODECS: tuple[Codec, ...] = (
    bnb4,
    bnb8,
    gptq,
    awq,
    mlx,
    fp8,
    mxfp4,
    fbgemm_fp8,
    modelopt,
    torchao,
    hqq,
    aqlm,
    compressed_tensors,  # whose names ModelOpt and FBGEMM have too
    dense,
)

_INCOMPLETE = "what else this weight needs is missing, or of another dtype or shape than this format has."

__all__ = [
    "CODECS",
    "Arena",
    "Claims",
    "Codec",
    "Scheme",
    "Sources",
    "claims",
    "dropped",
    "open_weights",
    "refuse_unknown_quantization",
]


def _claims(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[tuple[Codec, Claims]]:
    """What each codec takes, of what those before it left."""
    left = dict(stored)
    for codec in CODECS:
        claims = codec.claim(left, config)
        yield codec, claims
        for name in (*claims.dropped, *(name for names in claims.weights.values() for name in names)):
            del left[name]


def claims(
    stored: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Iterator[tuple[Codec, str, tuple[str, ...]]]:
    """(codec, weight, the stored tensors that it is made from), for all weights that are stored."""
    for codec, taken in _claims(stored, config):
        for weight, names in taken.weights.items():
            yield codec, weight, names


def dropped(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """The stored tensors that belong to no weight of the dense model, each with the reason."""
    return {name: reason for _, taken in _claims(stored, config) for name, reason in taken.dropped.items()}


@uncollected()
def open_weights(ckpt: Checkpoint) -> dict[str, Sources]:
    """Returns every weight of a checkpoint with its sources. Raises CheckpointError when no codec knows the
    quantization, or a stored tensor is missing or left over."""
    said_in = ckpt.folder / ckpt.config_files[-1]
    refuse_unknown_quantization(ckpt.config, ckpt.folder, ckpt.tensors, said_in)
    weights: dict[str, Sources] = {}
    quantized = any(quantizations(ckpt.config))
    for codec, weight, names in claims(ckpt.tensors, ckpt.config):
        quantized = quantized or codec is not dense
        if weight in weights:
            raise CheckpointError(f"{shown(ckpt.folder)}: {shown(weight)} is stored in two ways.")
        weights[weight] = codec.open_sources(weight, names, ckpt)
    _refuse_bare_codes(weights, ckpt, quantized)
    if all(sources.as_stored for sources in weights.values()):
        _refuse_empty_promise(ckpt.config, said_in)
    return as_stacks(weights, ckpt)


def refuse_unknown_quantization(
    config: Mapping[str, Any], folder: Folder, stored: Mapping[str, TensorInfo], said_in: str
) -> None:
    """Raises CheckpointError for a checkpoint in a quantization that no codec knows: its config, which the
    file `said_in` holds, names it, or the tensors that no codec claims are those of one."""
    known = {method for codec in CODECS for method in codec.QUANT_METHODS}
    for quantization in quantizations(config):
        method = quantization.get("quant_method")
        # Very old bitsandbytes configs name no method. One that is no text is not hashable, perhaps.
        if method is not None and not (isinstance(method, str) and method in known):
            raise CheckpointError(
                f"{said_in}: the checkpoint is quantized with {shown(method)}; {way_out(method)}"
            )
    setting = unread_setting(config)
    if setting is not None:
        field, words = setting
        raise CheckpointError(f"{said_in}: the checkpoint has a {field} ({words}); {way_out(field)}")
    left = {name: stored[name] for codec, name, _ in claims(stored, config) if codec is dense}
    for quantization in quantizations(config) if len(left) == len(stored) else ():
        if unread := unread_layout(quantization, quantization.get("quant_method")):
            raise CheckpointError(f"{said_in}: {unread}")
    packed = packed_format(left)
    if packed is not None:
        name, form = packed
        raise CheckpointError(
            f"{shown(folder)}: {shown(name)} belongs to a weight that is quantized: {form.title}; "
            f"{_INCOMPLETE if form.read else way_out(form.title)}"
        )


def _refuse_empty_promise(config: Mapping[str, Any], said_in: str) -> None:
    """No weight is quantized: what a config says is not so. bitsandbytes quantizes on loading, too."""
    for quantization in quantizations(config):
        method = quantization.get("quant_method")
        if method not in (None, *bnb4.QUANT_METHODS):
            raise CheckpointError(
                f"{said_in}: says that the checkpoint is quantized with {shown(method)}, "
                "but no weight is stored so. Is this the config of another checkpoint? Of one in full "
                "precision, remove the section."
            )


def _refuse_bare_codes(weights: Mapping[str, Sources], ckpt: Checkpoint, quantized: bool) -> None:
    """In a quantized checkpoint, or beside what bitsandbytes stores with codes, what looks like codes or
    scales and was claimed by no codec is a part of a weight whose other parts are missing."""
    for name, sources in weights.items():
        if not sources.as_stored:
            continue
        module = name.removesuffix(".weight")
        if weight := stray_part(name, weights):
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(name)} lies beside {shown(weight)}, which is stored in "
                f"{weights[weight].scheme}, a format that has no such part: is it a companion under another "
                "name?"
            )
        is_one = is_part(name, sources.spec) or is_orphan(name, weights)
        if f"{name}.absmax" in weights or ((quantized or f"{module}.SCB" in weights) and is_one):
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(name)} is quantized, but other parts of it (codes, scales, "
                "quant_state, SCB) are missing."
            )
        if is_bare(name, sources.spec, weights):
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(name)} is {sources.spec}, which looks like the codes of a "
                "quantized weight, and nothing says how they are decoded. Merge into the full-precision "
                "checkpoint; if these numbers are the weight, save them in bfloat16 first."
            )
