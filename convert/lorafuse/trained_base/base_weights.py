"""A full-precision checkpoint as training saw it: the weights that transformers quantizes on loading,
quantized."""

from collections.abc import Callable, Mapping

from lorafuse.codecs import Sources, open_weights
from lorafuse.codecs.conv1d import is_conv1d
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import DTYPES, FLOATS, SAFETENSORS_NAMES
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.simulated import simulated
from lorafuse.trained_base.which_weights import quantized_on_load


def base_weights(
    ckpt: Checkpoint, quant: BaseQuant | None, warn: Callable[[str], None]
) -> dict[str, Sources]:
    """The weights of the checkpoint as training saw them: as they are stored, or quantized. Raises
    CheckpointError."""
    weights = open_weights(ckpt)
    return as_trained(weights, ckpt, quant, warn) if quant else weights


def as_trained(
    weights: Mapping[str, Sources], ckpt: Checkpoint, quant: BaseQuant, warn: Callable[[str], None]
) -> dict[str, Sources]:
    """The weights of the checkpoint, some of them quantized. Raises CheckpointError for one that is quantized
    already."""
    for name, sources in weights.items():
        if not sources.as_stored:
            raise CheckpointError(
                f"{shown(ckpt.folder)}: {shown(name)} is quantized already, so this checkpoint is what "
                "training saw: leave --base-quant out."
            )
    chosen = quantized_on_load(weights, ckpt, quant, warn)
    if not chosen:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: transformers 5 quantizes no weight of it on loading; leave --base-quant "
            "out."
        )
    return dict(weights) | {
        name: simulated(
            weights[name], quant, load_dtype(ckpt, weights[name]), transposed=is_conv1d(ckpt.config, name)
        )
        for name in chosen
    }


def load_dtype(ckpt: Checkpoint, sources: Sources) -> str:
    """The dtype (torch name) in which transformers 5 loads a model unless it is told another: that of
    config.json."""
    named = str(ckpt.config.get("dtype") or ckpt.config.get("torch_dtype"))
    return named if SAFETENSORS_NAMES.get(named) in FLOATS else DTYPES[sources.spec.dtype][1]
