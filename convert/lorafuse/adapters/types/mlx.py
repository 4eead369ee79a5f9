"""MLX-LM's adapters: `lora_a`/`lora_b` of linears and embeddings, with DoRA's `m`, and parameters trained
whole.

Linear (out, in): W += scale · (lora_a @ lora_b)ᵀ, embedding (vocab, dim): W += scale · lora_a @ lora_b, with
lora_a [in or vocab, r], lora_b [r, out or dim]. A stack of E experts' linears (E, out, in), `switch_mlp`:
lora_a [E · r, in], the rows of each expert together, and lora_b [E, out, r]. The scale is the config's,
without the rank (mlx-lm, tuner/lora.py: fuse of LoRALinear, LoRAEmbedding and LoRASwitchLinear). MLX-LM
itself holds an HF Conv1D as a linear, (out, in).
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_config import checked
from lorafuse.adapters.reading.check_tensors import is_transposed, misfit
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import check_float, group, refuse_left_over
from lorafuse.adapters.reading.modules import Updates, Warn, take
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Sources
from lorafuse.errors import AdapterError, shown
from lorafuse.files.tensors import Box
from lorafuse.patches.dora import Dora
from lorafuse.patches.experts import SwitchStack
from lorafuse.patches.factor import Factor, load
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Patch
from lorafuse.patches.replace_rows import ReplaceRows
from lorafuse.patches.target import Target

SUPPORTED = (
    "MLX-LM's LoRA and DoRA on Linear and Embedding, LoRA on stacked experts (`switch_mlp`); layers trained "
    "whole (`fine_tune_type` full)"
)
MEMORY = "tiles"

_TYPES = ("lora", "dora", "full")
_EMBEDDINGS = ("wte", "wpe")
# How far the mean of a trained vector may be from the base's: less than the 1 that MLX-LM adds to the norms
# of some models.
_MAX_SHIFT = 0.5
# Falcon-H1: MLX-LM multiplies the weights of linears and embeddings by the config's multipliers when it loads
# them.
_RESCALED = ("falcon_h1",)


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """Everything the adapter does; nothing of it is ignored."""
    names = ("lora_a", "lora_b", "m") if _is_dora(adapter) else ("lora_a", "lora_b")
    result: list[Update] = []
    for module, leaves in group(adapter, r"lora_[a-z]\w*|m").items():
        if "" in leaves:
            result.append(_whole(adapter, module, leaves.pop(""), scale))
        keys = take(adapter, module, leaves, names)
        if keys is not None:
            result.append(_low_rank(adapter, module, keys, scale))
        refuse_left_over(adapter, leaves)
    return result, {}


def _is_dora(adapter: AdapterDir) -> bool:
    """Whether the factors come with magnitudes. Raises AdapterError for an unknown kind of training."""
    where, kind = adapter.folder / CONFIG, adapter.config.get("fine_tune_type", "lora")
    if kind not in _TYPES:
        raise AdapterError(f"{where}: fine_tune_type is {shown(kind)}, expected one of {', '.join(_TYPES)}.")
    return kind == "dora" or bool(adapter.config.get("use_dora"))


def _scale(adapter: AdapterDir) -> float:
    """The factor of the update. Raises AdapterError where the config does not say it beyond doubt."""
    where, parameters = adapter.folder / CONFIG, adapter.config.get("lora_parameters")
    if not isinstance(parameters, dict) or parameters.get("scale") is None:
        raise AdapterError(
            f"{where}: has no lora_parameters.scale, the factor of the update; set it to that of the "
            "training run."
        )
    value = checked(adapter, "lora_parameters.scale", parameters["scale"])
    # Versions whose configs have neither of these fields: the first multiplied by alpha / rank as well, later
    # ones only kept alpha.
    early = {"fine_tune_type", "num_layers"}.isdisjoint(adapter.config)
    if early and parameters.get("alpha") not in (None, parameters.get("rank")):
        raise AdapterError(
            f"{where}: lora_parameters.alpha is {shown(parameters['alpha'])} beside a scale; early MLX-LM "
            "multiplied the scale by alpha / rank, later versions do not. Set scale to the whole factor and "
            "remove alpha."
        )
    return value


def _low_rank(adapter: AdapterDir, module: str, keys: tuple[str, ...], scale: float) -> Update:
    key_a, key_b, *magnitude = keys
    a, b = (adapter.store.tensors[key].spec for key in (key_a, key_b))
    if len(b.shape) == 3 and not magnitude:
        return _of_experts(adapter, module, key_a, key_b, scale)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or not a.numel or not b.numel:
        raise AdapterError(
            f"{adapter.file}: {shown(key_a)} is {a} and {shown(key_b)} is {b}; they are not the two factors "
            "of one update."
        )
    for key in keys:
        check_float(adapter, key)
    factor = _scale(adapter)
    facts = {"rank": a.shape[1], "scale": factor}
    if magnitude:
        return Update(
            f"{module}.weight",
            keys,
            make=lambda target: _dora(adapter, module, keys, factor, scale, target),
            facts=facts,
        )
    make = partial(_product, adapter, module, key_a, key_b, scale * factor)
    return Update(f"{module}.weight", keys, make=make, facts=facts)


def _of_experts(adapter: AdapterDir, module: str, key_a: str, key_b: str, scale: float) -> Update:
    a, b = (adapter.store.tensors[key].spec for key in (key_a, key_b))
    n_experts, n_out, rank = b.shape
    if len(a.shape) != 2 or a.shape[0] != n_experts * rank or not a.numel or not b.numel:
        raise AdapterError(
            f"{adapter.file}: {shown(key_a)} is {a} and {shown(key_b)} is {b}; they are not the two factors "
            "of one update of stacked experts."
        )
    for key in (key_a, key_b):
        check_float(adapter, key)
    stack = SwitchStack(
        adapter.store, str(adapter.file), (key_a, key_b),
        rank=rank, n_experts=n_experts, scale=scale * _scale(adapter), transposed=False,
    )  # fmt: skip

    def make(target: Target) -> Patch:
        _refuse_rescaled(adapter, target)
        if target.spec.shape != (n_experts, n_out, a.shape[1]):
            raise misfit(adapter, target, key_b)
        return stack.patch(target)

    return Update(f"{module}.weight", (key_a, key_b), make=make, facts=stack.facts)


def _product(
    adapter: AdapterDir, module: str, key_a: str, key_b: str, scale: float, target: Target
) -> LowRank:
    _refuse_rescaled(adapter, target)
    n_in, n_out = adapter.store.tensors[key_a].spec.shape[0], adapter.store.tensors[key_b].spec.shape[1]
    leaf = module.rpartition(".")[2]
    embedding = n_in == n_out and (
        "embed" in leaf or leaf in _EMBEDDINGS
    )  # shapes decide unless the matrix is square
    if is_transposed(adapter, (key_b,), (n_out, n_in), target) or embedding:
        return LowRank(Factor(adapter.store, key_a), Factor(adapter.store, key_b), scale)
    left, right = (Factor(adapter.store, key, transposed=True) for key in (key_b, key_a))
    return LowRank(left, right, scale)


def _dora(
    adapter: AdapterDir, module: str, keys: tuple[str, ...], factor: float, strength: float, target: Target
) -> Patch:
    """Each output's or token's weights, scaled to the length in `m` (mlx-lm, tuner/dora.py, fuse): rows,
    unlike PEFT for tokens."""
    key_a, key_b, key_m = keys
    update = _product(adapter, module, key_a, key_b, factor, target)
    if adapter.store.tensors[key_m].spec.shape != (target.spec.shape[1 if target.is_conv1d else 0],):
        raise misfit(adapter, target, key_m)
    return Dora(update, adapter.store, key_m, target, by_columns=target.is_conv1d, strength=strength)


def _whole(adapter: AdapterDir, parameter: str, key: str, scale: float) -> Update:
    check_float(adapter, key)
    is_vector = len(adapter.store.tensors[key].spec.shape) == 1
    beside = parameter if is_vector else None
    return Update(
        parameter, (key,), make=lambda target: _replacement(adapter, key, scale, target), beside=beside
    )


def _replacement(adapter: AdapterDir, key: str, scale: float, target: Target) -> Patch:
    """W' for W, where MLX-LM keeps W as the checkpoint does, up to a transposition.

    Raises AdapterError for others: convolutions (channels last), stacked experts, norms that it keeps as
    weight + 1.
    """
    _refuse_rescaled(adapter, target)
    spec = adapter.store.tensors[key].spec
    if len(spec.shape) > 2:
        raise AdapterError(
            f"{adapter.file}: {shown(key)} is {spec}, which MLX keeps in a layout of its own; that is not "
            "supported."
        )
    turned = target.is_conv1d and len(spec.shape) == 2
    if (spec.shape[::-1] if turned else spec.shape) != target.spec.shape:
        raise misfit(adapter, target, key)
    if target.beside is not None:
        _refuse_shifted(adapter, key, target, target.beside)
    return ReplaceRows(Factor(adapter.store, key, transposed=turned), range(target.spec.shape[0]), scale)


def _refuse_rescaled(adapter: AdapterDir, target: Target) -> None:
    """Raises AdapterError for models whose weights MLX-LM rescales on loading: its updates are not those of
    the stored weights."""
    if target.model_type in _RESCALED:
        raise AdapterError(
            f"{adapter.folder / CONFIG}: MLX-LM rescales the weights of {shown(target.model_type)} when it "
            "loads them, so its adapters for it are not supported."
        )


def _refuse_shifted(adapter: AdapterDir, key: str, target: Target, base: Sources) -> None:
    """Compares a vector with the base's; the names do not say which models' norms MLX-LM shifts."""
    if base.spec.shape != target.spec.shape:
        return
    arena = Arena(torch.device("cpu"))
    before = base.values(Box.whole(base.spec), arena).float().mean()
    after = load(adapter.store, key, arena.device).mean()
    if abs(float(after - before)) > _MAX_SHIFT:
        raise AdapterError(
            f"{adapter.file}: {shown(key)} has a mean of {float(after):.3g}, {shown(target.name)} one of "
            f"{float(before):.3g}; MLX-LM keeps the norms of some models as weight + 1, and such adapters "
            "are not supported."
        )
