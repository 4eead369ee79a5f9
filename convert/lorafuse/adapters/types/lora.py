"""PEFT's LoRA: `lora_A`/`lora_B` on Linear, HF Conv1D, Embedding, Conv1d/2d/3d and MultiheadAttention, its
variants, trained biases and tokens, and replaced parameters.

Tensors decide what is merged, the config only scales (scaling = alpha / r, or alpha / sqrt(r) with
use_rslora; PEFT 0.21 lora/layer.py, update_layer). Rank comes from the tensors and orientation from the
shapes, since the saved `fan_in_fan_out` is that of the last layer which PEFT touched. Parameters saved whole
(modules_to_save, trained biases, resized embeddings, `base_layer` copies) replace those of the checkpoint
before any update.
"""

import math
from dataclasses import dataclass
from typing import Any

from lorafuse.adapters.reading import lora_experts as experts
from lorafuse.adapters.reading.check_config import checked, in_float32, pattern_value
from lorafuse.adapters.reading.check_tensors import unexpected
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import (
    Modules,
    check_float,
    drop_copies,
    group,
    refuse_left_over,
    replacements,
    take_one,
    unwrapped,
)
from lorafuse.adapters.reading.lora_config import REFUSED_FIELDS as REFUSED_FIELDS
from lorafuse.adapters.reading.lora_config import REFUSED_INITS as REFUSED_INITS
from lorafuse.adapters.reading.lora_config import checked_config, lora_init, n_blocks_of
from lorafuse.adapters.reading.lora_pair import Pair
from lorafuse.adapters.reading.modules import Updates, Warn, once, take
from lorafuse.adapters.reading.shared_experts import take_shared_experts
from lorafuse.adapters.reading.trained_tokens import take_tokens
from lorafuse.adapters.updates import Choice, Update
from lorafuse.errors import AdapterError, shown
from lorafuse.files.tensors import FLOATS
from lorafuse.patches.dora import Dora
from lorafuse.patches.factor import Factor
from lorafuse.patches.lowrank import AddVector
from lorafuse.patches.patch import Patch
from lorafuse.patches.residual import PARTS, take_out
from lorafuse.patches.target import Target

# Older and other trainers leave the adapter's name in; `lora_…` of another kind is matched in order to be
# named in a refusal.
_LEAVES = (
    r"lora_[AB](\.(?P<name>[^.]+))?\.(weight|bias)|lora_embedding_[AB]|lora_[a-z]\w*(\..*)?"
    r"|trainable_tokens_delta(\.[^.]+)?"
)
_ONLY_IN_TRAINING = {
    "lora_monteclora_sampler": "MonteCLoRA samples around the factors in training only",
    "lora_velora_embed": "VeLoRA compresses activations in training only",
}

SUPPORTED = (
    "Linear, HF Conv1D, Embedding, Conv1d/2d/3d, MultiheadAttention, experts (target_parameters, one by one, "
    "Tinker's); DoRA, rsLoRA, patterns, PiSSA, OLoRA, KaSA, bdLoRA, trained biases and tokens"
)
MEMORY = (
    "tiles; the whole weight and its decomposition for PiSSA, OLoRA and KaSA; DoRA reads embeddings and "
    "Conv1D twice"
)


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """Everything the adapter does, and the tensors that it ignores with the reason of each."""
    config = checked_config(adapter)
    modules = group(adapter, _LEAVES)
    ignored = drop_copies(modules) | _drop_training_only(modules)
    lora = _Lora(adapter, config, scale, once(warn), n_blocks_of(adapter))
    # Rows of embeddings come first: LoRA is trained on top of them.
    result: list[Update | Choice] = [*take_tokens(adapter, modules, scale)]
    attentions = {unwrapped(path) for path in modules if f"{path}.base_layer.out_proj" in modules}
    of_experts, empty = take_shared_experts(adapter, modules, lambda n, rank: scale * lora.scaling(n, rank))
    result += of_experts
    ignored |= empty
    result += experts.choices(
        adapter,
        modules,
        lambda name, rank: scale * lora.scaling(name, rank),
        lambda path, leaves: lora.updates(unwrapped(path), leaves, attentions, base_saved=False),
    )
    for path, leaves in modules.items():
        module, base_saved = unwrapped(path), "base_layer.weight" in leaves
        result += replacements(adapter, module, leaves)
        result += lora.updates(module, leaves, attentions, base_saved=base_saved)
        refuse_left_over(adapter, leaves)
    if config.get("bias") == "lora_only" and not any(".bias" in key for key in adapter.store.tensors):
        warn(
            f"{adapter.file}: bias is 'lora_only', but no trained bias is in the file; peft 0.7 to 0.20 did "
            "not save them."
        )
    return result, ignored


def _drop_training_only(modules: Modules) -> dict[str, str]:
    return {
        leaves.pop(leaf): _ONLY_IN_TRAINING[leaf.partition(".")[0]]
        for leaves in modules.values()
        for leaf in [*leaves]
        if leaf.partition(".")[0] in _ONLY_IN_TRAINING
    }


@dataclass(frozen=True)
class _Lora:
    """One adapter's factors and how they are scaled. `strength` multiplies the update."""

    adapter: AdapterDir
    config: dict[str, Any]
    strength: float
    warn: Warn
    n_blocks: int

    def updates(
        self, module: str, leaves: dict[str, str], attentions: set[str], *, base_saved: bool
    ) -> list[Update]:
        """The updates by factors of a module; takes their leaves. `base_saved`: the file has the weight below
        them."""
        pair = self._pair(module, leaves)
        owner, _, last = module.rpartition(".")
        if (
            pair and module in attentions
        ):  # torch's, which keeps the three projections as a parameter of its own
            return self._weight_updates(
                pair, f"{module}.in_proj_weight", self.scaling(module, pair.rank), None
            )
        if pair and last == "out_proj" and owner in attentions:
            # PEFT adds it twice, in the forward pass too (lora/layer.py, MultiheadAttention.merge and its
            # out_proj.merge).
            return self._weight_updates(pair, f"{module}.weight", 2 * self.scaling(owner, pair.rank), None)
        magnitude = take_one(self.adapter, leaves, "lora_magnitude_vector")  # older files call it a weight
        if pair is None:
            if magnitude:
                raise AdapterError(
                    f"{self.adapter.file}: {shown(module)} has lora_magnitude_vector but no lora_A.weight."
                )
            return []
        if self.config.get("use_dora") and magnitude is None:
            raise AdapterError(
                f"{self.adapter.file}: {shown(module)} has no lora_magnitude_vector, though use_dora is set "
                f"in {CONFIG}."
            )
        scaling = self.scaling(module, pair.rank)
        result = self._weight_updates(pair, f"{module}.weight", scaling, magnitude, base_saved=base_saved)
        key = leaves.pop("lora_B.bias", None)
        if key is not None:
            # Scaled, as in the forward pass; PEFT's bitsandbytes layers add it unscaled when they merge.
            result.append(
                Update(f"{module}.bias", (key,), make=lambda target: self._bias_patch(key, scaling, target))
            )
        return result

    def _pair(self, module: str, leaves: dict[str, str]) -> Pair | None:
        embedding = "lora_embedding_A" in leaves or "lora_embedding_B" in leaves
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        keys = take(self.adapter, module, leaves, names)
        if keys is None:
            return None
        key_a, key_b = keys
        pair = Pair(
            self.adapter, key_a, key_b, self.n_blocks, take_one(self.adapter, leaves, "lora_diag"), embedding
        )
        pair.check()
        return pair

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r), of a module in training's names."""
        alpha = self._setting("lora_alpha", "alpha_pattern", module)
        expected = self._setting("r", "rank_pattern", module, least=1, kinds=(int,))
        if expected != rank:
            where = self.adapter.folder / CONFIG
            self.warn(
                f"{where}: says rank {expected:g} where the tensors have rank {rank}; the tensors are "
                "believed."
            )
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        in_float32(self.adapter, f"the scale of {shown(module)}", scaling * self.strength)
        return scaling

    def _setting(
        self,
        field: str,
        by_pattern: str,
        module: str,
        *,
        least: float = -math.inf,
        kinds: tuple[type, ...] = (int, float),
    ) -> float:
        """A number of the config, or what a pattern says for the module."""
        value = pattern_value(self.adapter, by_pattern, module, self.config.get(field, 8))
        return checked(
            self.adapter, f"{field} (or {by_pattern}) of {shown(module)}", value, least=least, kinds=kinds
        )

    def _weight_updates(
        self, pair: Pair, weight: str, scaling: float, magnitude: str | None, *, base_saved: bool = False
    ) -> list[Update]:
        """What is done to the weight, in order. From a weight that training saved, what training took out is
        out."""
        part = "kasa" if pair.diagonal else lora_init(self.config)
        facts = {"rank": pair.rank, "scale": scaling}
        result = []
        if part in PARTS and not pair.embedding and not base_saved:  # PEFT initializes embeddings plainly
            result.append(
                Update(
                    weight, pair.keys, make=lambda target: self._residual_patch(pair, part, scaling, target)
                )
            )
        if magnitude is None:
            plain = Update(
                weight,
                pair.keys,
                make=lambda target: pair.patch(self.strength * scaling, target),
                facts=facts,
            )
            return [*result, plain]
        keys = (*pair.keys, magnitude)
        dora = Update(
            weight, keys, make=lambda target: self._dora_patch(pair, magnitude, scaling, target), facts=facts
        )
        return [*result, dora]

    def _residual_patch(self, pair: Pair, part: str, scaling: float, target: Target) -> Patch:
        why = None
        if target.quantized:
            why = "training took it out of a 16- or 32-bit weight; merge into that checkpoint"
        elif len(target.spec.shape) != 2 or (part != "pissa" and target.is_conv1d):
            why = "PEFT does so for linear layers only"
        if why:
            raise AdapterError(
                f"{self.adapter.file}: {shown(pair.key_a)}: {part} took a part of {shown(target.name)} out "
                f"of it before training, which cannot be repeated here: {why}."
            )
        return take_out(self.adapter.store, PARTS[part](scaling), pair.rank, self.strength, target)

    def _dora_patch(self, pair: Pair, magnitude: str, scaling: float, target: Target) -> Patch:
        update = pair.patch(scaling, target)
        by_columns = pair.embedding or pair.is_transposed(target)
        n_outputs = target.spec.n_cols if by_columns else target.spec.shape[0]
        check_float(self.adapter, magnitude)
        if self.adapter.store.tensors[magnitude].spec.numel != n_outputs:
            raise unexpected(
                self.adapter, magnitude, f"a number for each of {n_outputs} outputs of {shown(target.name)}"
            )
        return Dora(
            update, self.adapter.store, magnitude, target, by_columns=by_columns, strength=self.strength
        )

    def _bias_patch(self, key: str, scaling: float, target: Target) -> Patch:
        spec = self.adapter.store.tensors[key].spec
        if spec.shape != target.spec.shape or spec.dtype not in FLOATS:
            raise AdapterError(
                f"{self.adapter.file}: {shown(key)} is {spec}, but {shown(target.name)} is {target.spec}."
            )
        return AddVector(Factor(self.adapter.store, key), self.strength * scaling)
