"""PEFT's AdaLoRA: LoRA in the form of an SVD, whose rank is reduced while it trains.

ΔW = B (A ∘ E) · alpha / (ranknum + 1e-5) (PEFT 0.21 adalora/layer.py, get_delta_weight). ranknum is not in
the file. It is `init_r`, also when the tensors have fewer rows: PEFT sets it once and keeps it "so that the
scaling is exactly as the previous" (resize_modules_by_rank_pattern). alpha is `lora_alpha` or, when that is
not positive, `init_r` too. A module whose rank was reduced to nothing has no update.
"""

from lorafuse.adapters.reading.check_config import number, refuse_fields
from lorafuse.adapters.reading.check_tensors import check_shape, is_transposed
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import (
    check_float,
    drop_copies,
    group,
    refuse_left_over,
    replacements,
    unwrapped,
)
from lorafuse.adapters.reading.modules import Updates, Warn, take
from lorafuse.adapters.reading.trained_tokens import take_tokens
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.factor import Factor
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Patch
from lorafuse.patches.target import Target

SUPPORTED = "Linear, Conv1D, Conv2d; also after rank reduction; trained tokens"
MEMORY = "tiles"
REFUSED_FIELDS = {
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens, so no merged weight equals "
    "it",
    "layer_replication": "layer_replication makes more layers than the checkpoint has",
    "megatron_config": "Megatron's linears are split over devices",
    "target_parameters": "AdaLoRA has no form for parameters that are not a layer's",
}


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module, and what is trained beside them."""
    refuse_fields(adapter, REFUSED_FIELDS)
    scaling = scale * _scaling(adapter)
    modules = group(
        adapter, r"lora_[ABE](\.(?P<name>[^.]+))?|lora_embedding_\w+|trainable_tokens_delta(\.[^.]+)?"
    )
    ignored = drop_copies(modules)
    result = take_tokens(adapter, modules, scale)
    for path, leaves in modules.items():
        module = unwrapped(path)
        result += replacements(adapter, module, leaves)
        keys = take(adapter, module, leaves, ("lora_A", "lora_E", "lora_B"))
        if keys is not None and _rank(adapter, keys) == 0:
            ignored |= dict.fromkeys(keys, "the rank of the module was reduced to 0")
        elif keys is not None:
            result.append(_update(adapter, module, keys, scaling))
        refuse_left_over(adapter, leaves)
    return result, ignored


def _scaling(adapter: AdapterDir) -> float:
    init_r, alpha = number(adapter, "init_r", 12), number(adapter, "lora_alpha", 8)
    if init_r <= 0 or init_r != int(init_r):
        raise AdapterError(
            f"{adapter.folder / CONFIG}: init_r is {shown(adapter.config['init_r'])}, expected a rank."
        )
    return (alpha if alpha > 0 else init_r) / (init_r + 1e-5)


def _rank(adapter: AdapterDir, keys: tuple[str, ...]) -> int:
    """The rank that the tensors share. Raises AdapterError when they do not."""
    key_a, key_e, key_b = keys
    a, b = (adapter.store.tensors[key].spec for key in (key_a, key_b))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{adapter.file}: {shown(key_a)} is {a} and {shown(key_b)} is {b}; they are not the two factors "
            "of one update."
        )
    check_float(adapter, key_a)
    check_float(adapter, key_b)
    check_shape(adapter, key_e, (a.shape[0], 1), f"from {shown(key_a)}")
    return a.shape[0]


def _update(adapter: AdapterDir, module: str, keys: tuple[str, ...], scaling: float) -> Update:
    return Update(f"{module}.weight", keys, make=lambda target: _patch(adapter, keys, scaling, target))


def _patch(adapter: AdapterDir, keys: tuple[str, ...], scaling: float, target: Target) -> Patch:
    key_a, key_e, key_b = keys
    store = adapter.store
    out_in = (store.tensors[key_b].spec.shape[0], store.tensors[key_a].spec.shape[1])
    transposed = is_transposed(adapter, (key_a, key_b), out_in, target, kernels=True)
    left, right = (key_a, key_b) if transposed else (key_b, key_a)
    return LowRank(
        Factor(store, left, transposed=transposed),
        Factor(store, right, transposed=transposed, row_scale=key_e),
        scaling,
    )
