"""PEFT's LoRA: `lora_A`/`lora_B` on Linear, HF Conv1D, Embedding and Conv1d/2d/3d, biases, and replaced parameters.

Tensors decide what is merged, the config only scales (scaling = alpha / r, or alpha / sqrt(r) with use_rslora; PEFT 0.21
lora/layer.py, update_layer). Rank comes from the tensors and orientation from the shapes, since the saved `fan_in_fan_out` is that
of the last layer which PEFT touched. Parameters saved whole (modules_to_save, trained biases, resized embeddings,
`base_layer` copies) replace those of the checkpoint before any update.
"""

import math
import re
from typing import Any

from lorafuse.adapters import experts
from lorafuse.adapters.factor import Factor
from lorafuse.adapters.keys import Modules, check_float, drop_copies, group, pattern_value, refuse_left_over, replacements
from lorafuse.adapters.lowrank import AddVector, LowRank
from lorafuse.adapters.modules import Warn, once
from lorafuse.adapters.patch import Choice, Patch, Target, Update
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.adapters.trainable_tokens import tokens_update
from lorafuse.errors import AdapterError, shown
from lorafuse.tensors import FLOATS

# Older and other trainers leave the adapter's name in; `lora_…` of another kind is matched in order to be named in a refusal.
_LEAVES = (
    r"lora_[AB](\.(?P<name>[^.]+))?\.(weight|bias)|lora_embedding_[AB]|lora_[a-z]\w*(\..*)?"
    r"|trainable_tokens_delta(\.[^.]+)?"
)

SUPPORTED = "Linear, HF Conv1D, Embedding, Conv1d/2d/3d, experts (target_parameters); patterns, rsLoRA, trained biases and tokens"
MEMORY = "tiles"

# Config fields that change what is computed and are not implemented: field → what PEFT does with it. Falsy values are harmless.
REFUSED_FIELDS = {
    "use_dora": "DoRA rescales rows by a trained magnitude",
    "use_qalora": "QALoRA groups the inputs of lora_A",
    "use_bdlora": "bdLoRA stores block-diagonal factors",
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens, so no merged weight equals it",
    "arrow_config": "Arrow routes between adapters, so no merged weight equals it",
    "kasa_config": "KaSA truncates the base weight by an SVD",
    "layer_replication": "layer_replication makes more layers than the checkpoint has",
    "megatron_config": "Megatron's linears are split over devices",
    "enable_lora": "MergedLinear of peft ≤ 0.2 stores a grouped convolution",
}
_HARMLESS_INITS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal", "mica")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> tuple[list[Update | Choice], dict[str, str]]:
    """Everything the adapter does, and the tensors that it ignores with the reason of each."""
    config = _checked_config(adapter)
    warn = once(warn)
    modules = group(adapter, _LEAVES)
    ignored = drop_copies(modules)
    result: list[Update | Choice] = _trained_tokens(adapter, modules, scale)
    result += experts.choices(
        adapter, modules, lambda name, rank: scale * _scaling(adapter, config, name, rank, warn), _linear_patch
    )
    for path, leaves in modules.items():
        module = _unwrapped(path)
        result += replacements(adapter, module, leaves)
        result += _low_rank(adapter, config, module, leaves, scale, warn)
        refuse_left_over(adapter, leaves)
    if config.get("bias") == "lora_only" and not any(".bias" in key for key in adapter.store.tensors):
        warn(f"{adapter.file}: bias is 'lora_only', but no trained bias is in the file; peft 0.7 to 0.20 did not save them.")
    return result, ignored


def _unwrapped(path: str) -> str:
    """A module's name without those under which wrappers keep the module that they wrap."""
    return path.replace(".base_layer", "").replace(".token_adapter", "")


def _trained_tokens(adapter: AdapterDir, modules: Modules, scale: float) -> list[Update | Choice]:
    """Rows of embeddings (trainable_token_indices); takes their leaves. They come first: LoRA is trained on top of them."""
    return [
        tokens_update(adapter, _unwrapped(path), leaves.pop(leaf), "trainable_token_indices", scale)
        for path, leaves in modules.items()
        for leaf in [*leaves]
        if leaf.startswith("trainable_tokens_delta")
    ]


def _checked_config(adapter: AdapterDir) -> dict[str, Any]:
    config, where = adapter.config, adapter.path / CONFIG
    for field, what in REFUSED_FIELDS.items():
        if config.get(field):
            raise AdapterError(f"{where}: {field} is set, which is not supported: {what}.")
    init = config.get("init_lora_weights")
    if not any(init is harmless or init == harmless for harmless in _HARMLESS_INITS):
        raise AdapterError(f"{where}: init_lora_weights is {shown(init)}, which changes the base weight; this is not supported.")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise AdapterError(f"{where}: {field} is {shown(config[field])}, expected an object.")
    return config


def _low_rank(
    adapter: AdapterDir, config: dict[str, Any], module: str, leaves: dict[str, str], scale: float, warn: Warn
) -> list[Update]:
    """The updates by factors; takes their leaves."""
    if "lora_magnitude_vector" in {leaf.partition(".")[0] for leaf in leaves}:
        raise AdapterError(f"{adapter.file}: {shown(module)} has a lora_magnitude_vector: DoRA is not supported.")
    embedding = "lora_embedding_A" in leaves or "lora_embedding_B" in leaves
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    present = [name for name in names if name in leaves]
    if not present:
        return []
    if len(present) == 1:
        other = names[1 - names.index(present[0])]
        raise AdapterError(f"{adapter.file}: {shown(module)} has {present[0]} but no {other}.")
    key_a, key_b = (leaves.pop(name) for name in names)
    _check_factors(adapter, key_a, key_b)
    rank = adapter.store.tensors[key_a].spec.shape[0]
    scaling = scale * _scaling(adapter, config, module, rank, warn)
    bias = leaves.pop("lora_B.bias", None)
    make = _embedding_patch if embedding else _linear_patch
    result = [Update(f"{module}.weight", (key_a, key_b), make=lambda target: make(adapter, key_a, key_b, scaling, target))]
    if bias is not None:
        # Scaled, as in the forward pass; PEFT's bitsandbytes layers add it unscaled when they merge.
        key = bias
        result.append(Update(f"{module}.bias", (key,), make=lambda target: _bias_patch(adapter, key, scaling, target)))
    return result


def _check_factors(adapter: AdapterDir, key_a: str, key_b: str) -> None:
    a, b = adapter.store.tensors[key_a].spec, adapter.store.tensors[key_b].spec
    fits = len(a.shape) >= 2 and len(b.shape) == len(a.shape) and a.shape[0] == b.shape[1] and math.prod(b.shape[2:]) == 1
    if not fits or a.numel == 0 or b.numel == 0:
        raise AdapterError(
            f"{adapter.file}: {shown(key_a)} is {a} and {shown(key_b)} is {b}; they are not the two factors of one update."
        )
    for key in (key_a, key_b):
        check_float(adapter, key)


def _scaling(adapter: AdapterDir, config: dict[str, Any], module: str, rank: int, warn: Warn) -> float:
    where = adapter.path / CONFIG
    try:
        alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        expected = pattern_value(config.get("rank_pattern"), module, config.get("r", 8))
    except re.error as e:
        raise AdapterError(f"{where}: a pattern is not a regular expression: {shown(e)}.") from None
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(f"{where}: the alpha of {shown(module)} is {shown(alpha)}, expected a number.")
    if expected != rank:
        warn(f"{where}: says rank {shown(expected)} where the tensors have rank {rank}; the tensors are believed.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _linear_patch(adapter: AdapterDir, key_a: str, key_b: str, scaling: float, target: Target) -> Patch:
    a, b = adapter.store.tensors[key_a].spec, adapter.store.tensors[key_b].spec
    out_in, matrix = (b.shape[0], a.n_cols), (target.spec.shape[0], target.spec.n_cols)
    conv = len(a.shape) > 2
    kernel_fits = not conv or target.spec.shape[1:] == a.shape[1:]
    square = out_in[0] == out_in[1]
    if out_in == matrix and kernel_fits and not (square and target.is_conv1d):
        return LowRank(Factor(adapter.store, key_b), Factor(adapter.store, key_a), scaling)
    if out_in[::-1] == matrix and not conv and len(target.spec.shape) == 2:
        left, right = (Factor(adapter.store, key, transposed=True) for key in (key_a, key_b))
        return LowRank(left, right, scaling)
    grouped = " Convolutions with groups have no merged form." if conv else ""
    raise AdapterError(
        f"{adapter.file}: {shown(key_a)} {list(a.shape)} and {shown(key_b)} {list(b.shape)} do not fit {shown(target.name)} "
        f"{list(target.spec.shape)}; is the adapter for another base?{grouped}"
    )


def _embedding_patch(adapter: AdapterDir, key_a: str, key_b: str, scaling: float, target: Target) -> Patch:
    left, right = (Factor(adapter.store, key, transposed=True) for key in (key_a, key_b))
    if (left.shape[0], right.shape[1]) != target.spec.shape:
        raise AdapterError(
            f"{adapter.file}: {shown(key_a)} and {shown(key_b)} update {left.shape[0]} × {right.shape[1]}, but "
            f"{shown(target.name)} is {list(target.spec.shape)}; is the adapter for another base, or was the vocabulary resized "
            "without saving the embedding?"
        )
    return LowRank(left, right, scaling)


def _bias_patch(adapter: AdapterDir, key: str, scaling: float, target: Target) -> Patch:
    spec = adapter.store.tensors[key].spec
    if spec.shape != target.spec.shape or spec.dtype not in FLOATS:
        raise AdapterError(f"{adapter.file}: {shown(key)} is {spec}, but {shown(target.name)} is {target.spec}.")
    return AddVector(Factor(adapter.store, key), scaling)
