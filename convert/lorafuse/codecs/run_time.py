"""Tensors of a quantized checkpoint that serve inference alone: scales of activations and of the cache of
keys
and values. They belong to no weight of the dense model."""

import re
from collections.abc import Collection, Iterator, Mapping

from lorafuse.files.tensors import TensorInfo

_ACTIVATIONS = (
    "input_scale", "input_global_scale", "input_zero_point", "input_scale_ub", "activation_scale",
    "output_scale", "qscale_act",
)  # fmt: skip
_CACHE = re.compile(r".*\.(kv_cache\..+|[kvq]_(scale|zero_point)|[kvq]_proj\.([kvq]_scale|output_scale))")
OF_ACTIVATIONS = "a scale of activations, which the dense model does not quantize"
OF_CACHE = "a scale of attention's cache, which the dense model does not quantize"


def _of_activations(weight: str) -> Iterator[str]:
    """Names that scales of what a weight is multiplied with may have."""
    module = weight.removesuffix(".weight")
    for kind in _ACTIVATIONS:
        yield from (f"{module}.{kind}", f"{weight}_{kind}")


def serves(name: str, weights: Collection[str]) -> bool:
    """Whether a run-time tensor is a scale of what one of these weights is multiplied with."""
    module = name.rpartition(".")[0]
    stack = next((name.removesuffix(f"_{kind}") for kind in _ACTIVATIONS if name.endswith(f"_{kind}")), name)
    candidates = {module, f"{module}.weight", stack, f"{stack}.weight"}.intersection(weights)
    return any(name in _of_activations(weight) for weight in candidates)


def run_time_tensors(stored: Mapping[str, TensorInfo], weights: Collection[str]) -> dict[str, str]:
    """Those of a checkpoint in which `weights` are quantized, each with what it is. None where no weight
    is."""
    dropped = {
        name: OF_ACTIVATIONS for weight in weights for name in _of_activations(weight) if name in stored
    }
    if weights:
        dropped |= {name: OF_CACHE for name in stored if name not in dropped and _CACHE.fullmatch(name)}
    return dropped
