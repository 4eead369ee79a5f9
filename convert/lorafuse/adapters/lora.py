"""PEFT's LoRA: `lora_A`/`lora_B` on Linear, HF Conv1D, Embedding, Conv1d/2d/3d and MultiheadAttention, its variants, trained
biases and tokens, and replaced parameters.

Tensors decide what is merged, the config only scales (scaling = alpha / r, or alpha / sqrt(r) with use_rslora; PEFT 0.21
lora/layer.py, update_layer). Rank comes from the tensors and orientation from the shapes, since the saved `fan_in_fan_out` is that
of the last layer which PEFT touched. Parameters saved whole (modules_to_save, trained biases, resized embeddings,
`base_layer` copies) replace those of the checkpoint before any update.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from lorafuse.adapters import experts
from lorafuse.adapters.check import unexpected
from lorafuse.adapters.dora import Dora
from lorafuse.adapters.factor import Factor
from lorafuse.adapters.fields import checked, pattern, refuse_fields
from lorafuse.adapters.keys import (
    Modules,
    check_float,
    drop_copies,
    group,
    pattern_value,
    refuse_left_over,
    replacements,
    take_one,
    unwrapped,
)
from lorafuse.adapters.lowrank import AddVector
from lorafuse.adapters.pair import Pair
from lorafuse.adapters.patch import Choice, Patch, Target, Update
from lorafuse.adapters.residual import PARTS, take_out
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.adapters.trainable_tokens import take_tokens
from lorafuse.adapters.walk import Warn, once, take
from lorafuse.errors import AdapterError, shown
from lorafuse.tensors import FLOATS

# Older and other trainers leave the adapter's name in; `lora_…` of another kind is matched in order to be named in a refusal.
_LEAVES = (
    r"lora_[AB](\.(?P<name>[^.]+))?\.(weight|bias)|lora_embedding_[AB]|lora_[a-z]\w*(\..*)?"
    r"|trainable_tokens_delta(\.[^.]+)?"
)
_ONLY_IN_TRAINING = {
    "lora_monteclora_sampler": "MonteCLoRA samples around the factors in training only",
    "lora_velora_embed": "VeLoRA compresses activations in training only",
}

SUPPORTED = (
    "Linear, HF Conv1D, Embedding, Conv1d/2d/3d, MultiheadAttention, experts (target_parameters); DoRA, rsLoRA, patterns, PiSSA, "
    "OLoRA, KaSA, bdLoRA, trained biases and tokens"
)
MEMORY = "tiles; the whole weight and its decomposition for PiSSA, OLoRA and KaSA; DoRA reads embeddings and Conv1D twice"

# Config fields that change what is computed and are not implemented: field → what PEFT does with it. Falsy values are harmless.
REFUSED_FIELDS = {
    "use_qalora": "QALoRA groups the inputs of lora_A",
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens, so no merged weight equals it",
    "arrow_config": "Arrow routes between adapters, so no merged weight equals it",
    "megatron_config": "Megatron's linears are split over devices",
    "enable_lora": "MergedLinear of peft ≤ 0.2 stores a grouped convolution",
}
# init_lora_weights that change the base weight → why the change cannot be repeated.
REFUSED_INITS = {
    "corda": "the covariance that it needs is not in the files",
    "loftq": "it depends on how the base was quantized while it was fitted",
    "lora_ga": "the gradients that it needs are not in the files",
    "pissa_niter_N": "its randomized SVD differs from run to run",
}
_HARMLESS_INITS = (True, False, None, "true", "false", "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> tuple[list[Update | Choice], dict[str, str]]:
    """Everything the adapter does, and the tensors that it ignores with the reason of each."""
    config = _checked_config(adapter)
    modules = group(adapter, _LEAVES)
    ignored = drop_copies(modules) | _drop_training_only(modules)
    lora = _Lora(adapter, config, scale, once(warn), _n_blocks(adapter))
    # Rows of embeddings come first: LoRA is trained on top of them.
    result: list[Update | Choice] = [*take_tokens(adapter, modules, scale)]
    result += experts.choices(adapter, modules, lambda name, rank: scale * lora.scaling(name, rank))
    attentions = {unwrapped(path) for path in modules if f"{path}.base_layer.out_proj" in modules}
    for path, leaves in modules.items():
        module, base_saved = unwrapped(path), "base_layer.weight" in leaves
        result += replacements(adapter, module, leaves)
        result += lora.updates(module, leaves, attentions, base_saved=base_saved)
        refuse_left_over(adapter, leaves)
    if config.get("bias") == "lora_only" and not any(".bias" in key for key in adapter.store.tensors):
        warn(f"{adapter.file}: bias is 'lora_only', but no trained bias is in the file; peft 0.7 to 0.20 did not save them.")
    return result, ignored


def _drop_training_only(modules: Modules) -> dict[str, str]:
    return {
        leaves.pop(leaf): _ONLY_IN_TRAINING[leaf.partition(".")[0]]
        for leaves in modules.values()
        for leaf in [*leaves]
        if leaf.partition(".")[0] in _ONLY_IN_TRAINING
    }


def _checked_config(adapter: AdapterDir) -> dict[str, Any]:
    config, where = adapter.config, adapter.path / CONFIG
    refuse_fields(adapter, REFUSED_FIELDS)
    init = _init(config)
    if not any(init is harmless or init == harmless for harmless in _HARMLESS_INITS):
        kind = "pissa_niter_N" if str(init).startswith("pissa_niter_") else str(init)
        raise AdapterError(
            f"{where}: init_lora_weights is {shown(init)}, which changes the base weight: "
            f"{REFUSED_INITS.get(kind, 'it is not known how')}. PEFT can save such an adapter as plain LoRA "
            "(path_initial_model_for_weight_conversion), or merge into the base that training saved, with init_lora_weights true."
        )
    if init in PARTS and config.get("target_parameters"):
        raise AdapterError(f"{where}: init_lora_weights is {shown(init)} with target_parameters, which is not supported.")
    pattern(adapter, "rank_pattern")
    pattern(adapter, "alpha_pattern")
    return config


def _init(config: dict[str, Any]) -> Any:
    """init_lora_weights; PEFT reads its words in any case."""
    init = config.get("init_lora_weights")
    return init.lower() if isinstance(init, str) else init


def changes_base(adapter: AdapterDir) -> bool:
    """Whether training took a part of the base weights out before its first step, so that a weight that it saved lacks it."""
    # A list: what the config of a type that has no such field holds there may not be hashable.
    return _init(adapter.config) in list(PARTS) or any("lora_diag" in key for key in adapter.store.tensors)


def _n_blocks(adapter: AdapterDir) -> int:
    """bdLoRA's number of blocks, 1 without it."""
    field = adapter.config.get("use_bdlora")
    n_blocks = field.get("nblocks", 1) if isinstance(field, dict) else 1
    if (field and not isinstance(field, dict)) or type(n_blocks) is not int or n_blocks < 1:
        raise AdapterError(f"{adapter.path / CONFIG}: use_bdlora is {shown(field)}, expected an object with nblocks.")
    return n_blocks


@dataclass(frozen=True)
class _Lora:
    """One adapter's factors and how they are scaled. `strength` multiplies the update."""

    adapter: AdapterDir
    config: dict[str, Any]
    strength: float
    warn: Warn
    n_blocks: int

    def updates(self, module: str, leaves: dict[str, str], attentions: set[str], *, base_saved: bool) -> list[Update]:
        """The updates by factors of a module; takes their leaves. `base_saved`: the file has the weight below them."""
        pair = self._pair(module, leaves)
        owner, _, last = module.rpartition(".")
        if pair and module in attentions:  # torch's, which keeps the three projections as a parameter of its own
            return self._weight_updates(pair, f"{module}.in_proj_weight", self.scaling(module, pair.rank), None)
        if pair and last == "out_proj" and owner in attentions:
            # PEFT adds it twice, in the forward pass too (lora/layer.py, MultiheadAttention.merge and its out_proj.merge).
            return self._weight_updates(pair, f"{module}.weight", 2 * self.scaling(owner, pair.rank), None)
        magnitude = take_one(self.adapter, leaves, "lora_magnitude_vector")  # older files call it a weight
        if pair is None:
            if magnitude:
                raise AdapterError(f"{self.adapter.file}: {shown(module)} has lora_magnitude_vector but no lora_A.weight.")
            return []
        if self.config.get("use_dora") and magnitude is None:
            raise AdapterError(
                f"{self.adapter.file}: {shown(module)} has no lora_magnitude_vector, though use_dora is set in {CONFIG}."
            )
        scaling = self.scaling(module, pair.rank)
        result = self._weight_updates(pair, f"{module}.weight", scaling, magnitude, base_saved=base_saved)
        key = leaves.pop("lora_B.bias", None)
        if key is not None:
            # Scaled, as in the forward pass; PEFT's bitsandbytes layers add it unscaled when they merge.
            result.append(Update(f"{module}.bias", (key,), make=lambda target: self._bias_patch(key, scaling, target)))
        return result

    def _pair(self, module: str, leaves: dict[str, str]) -> Pair | None:
        embedding = "lora_embedding_A" in leaves or "lora_embedding_B" in leaves
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        keys = take(self.adapter, module, leaves, names)
        if keys is None:
            return None
        key_a, key_b = keys
        pair = Pair(self.adapter, key_a, key_b, self.n_blocks, take_one(self.adapter, leaves, "lora_diag"), embedding)
        pair.check()
        return pair

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r), of a module in training's names."""
        alpha = self._setting("lora_alpha", "alpha_pattern", module)
        expected = self._setting("r", "rank_pattern", module, least=1, kinds=(int,))
        if expected != rank:
            where = self.adapter.path / CONFIG
            self.warn(f"{where}: says rank {expected:g} where the tensors have rank {rank}; the tensors are believed.")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _setting(
        self, field: str, by_pattern: str, module: str, *, least: float = -math.inf, kinds: tuple[type, ...] = (int, float)
    ) -> float:
        """A number of the config, or what a pattern says for the module."""
        try:
            value = pattern_value(self.config.get(by_pattern), module, self.config.get(field, 8))
        except re.error as e:
            where = self.adapter.path / CONFIG
            raise AdapterError(f"{where}: a pattern of {by_pattern} is not a regular expression: {shown(e)}.") from None
        return checked(self.adapter, f"{field} (or {by_pattern}) of {shown(module)}", value, least=least, kinds=kinds)

    def _weight_updates(
        self, pair: Pair, weight: str, scaling: float, magnitude: str | None, *, base_saved: bool = False
    ) -> list[Update]:
        """What is done to the weight, in order. From a weight that training saved, what training took out is out."""
        part = "kasa" if pair.diagonal else _init(self.config)
        facts = {"rank": pair.rank, "scale": scaling}
        result = []
        if part in PARTS and not pair.embedding and not base_saved:  # PEFT initializes embeddings plainly
            result.append(Update(weight, pair.keys, make=lambda target: self._residual_patch(pair, part, scaling, target)))
        if magnitude is None:
            plain = Update(weight, pair.keys, make=lambda target: pair.patch(self.strength * scaling, target), facts=facts)
            return [*result, plain]
        keys = (*pair.keys, magnitude)
        dora = Update(weight, keys, make=lambda target: self._dora_patch(pair, magnitude, scaling, target), facts=facts)
        return [*result, dora]

    def _residual_patch(self, pair: Pair, part: str, scaling: float, target: Target) -> Patch:
        why = None
        if target.quantized:
            why = "training took it out of a 16- or 32-bit weight; merge into that checkpoint"
        elif len(target.spec.shape) != 2 or (part != "pissa" and target.is_conv1d):
            why = "PEFT does so for linear layers only"
        if why:
            raise AdapterError(
                f"{self.adapter.file}: {shown(pair.key_a)}: {part} took a part of {shown(target.name)} out of it before training, "
                f"which cannot be repeated here: {why}."
            )
        return take_out(self.adapter.store, PARTS[part](scaling), pair.rank, self.strength, target)

    def _dora_patch(self, pair: Pair, magnitude: str, scaling: float, target: Target) -> Patch:
        update = pair.patch(scaling, target)
        by_columns = pair.embedding or pair.is_transposed(target)
        n_outputs = target.spec.n_cols if by_columns else target.spec.shape[0]
        check_float(self.adapter, magnitude)
        if self.adapter.store.tensors[magnitude].spec.numel != n_outputs:
            raise unexpected(self.adapter, magnitude, f"a number for each of {n_outputs} outputs of {shown(target.name)}")
        return Dora(update, self.adapter.store, magnitude, target, by_columns=by_columns, strength=self.strength)

    def _bias_patch(self, key: str, scaling: float, target: Target) -> Patch:
        spec = self.adapter.store.tensors[key].spec
        if spec.shape != target.spec.shape or spec.dtype not in FLOATS:
            raise AdapterError(f"{self.adapter.file}: {shown(key)} is {spec}, but {shown(target.name)} is {target.spec}.")
        return AddVector(Factor(self.adapter.store, key), self.strength * scaling)
