"""`layer_replication` of LoRA: layers of the output that repeat layers of the checkpoint, each with an update
of its own.

[[0, 4], [2, 5]] means layers 0 1 2 3 2 3 4 (PEFT 0.21 tuners/tuners_utils.py, replicate_layers). The
adapter's names count the layers of the output. PEFT's own merge adds the updates of all copies to the one
tensor that they share.

What the config says about single layers is brought along: lists with an entry for each layer, and lists of
layers. Where a layer's kind follows from its number by a rule of the model's code, a layer that moves would
change its kind, and that is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from lorafuse.adapters import AdapterDir
from lorafuse.adapters.reading.directory import CONFIG
from lorafuse.adapters.reading.modules import Warn
from lorafuse.codecs import Sources
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.structure.models import load_table

FIELD = "layer_replication"
# PEFT replicates model.layers (Llama), encoder.layer (BERT) and h (Falcon), below the model's prefix or at
# the top.
_LAYERS = re.compile(r"((?:\w+\.)?(?:layers|encoder\.layer|h))\.(0|[1-9]\d{0,5})\.(.+)")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MAX_LAYERS = 10_000  # a bound on the tables that a few bytes of JSON ask for
# Fields of text models with an entry for each layer, and with numbers of layers.
PER_LAYER = frozenset(
    {
        "activation_sparsity_pattern",
        "indexer_types",
        "intermediate_size",
        "kv_sharing_modes",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "no_rope_layers",
        "num_attention_heads_per_layer",
        "swiglu_limits",
        "swiglu_limits_shared",
    }
)
NUMBERS = frozenset({"mlp_only_layers", "moe_layers", "full_attn_idxs"})
# Where a layer computes with its own number, PEFT's copies keep the old one; no field of a config can say
# that.
OWN_NUMBER_FIELDS = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers")
OWN_NUMBER_TYPES = frozenset({"beam", "diffllama", "minimax"})
# These take a part out of the base weight; KaSA's part is gone after the first time, so that repeating it
# changes nothing.
BASE_CHANGING_INITS = ("pissa", "olora")
_WAY_OUT = "Save the config with a transformers that writes the list."
_NOT_LAYERS = re.compile(r"architectures|.*_token_ids?|.*_tokens")


def replicate(
    weights: Mapping[str, Sources], config: dict[str, Any], adapter: AdapterDir, warn: Warn
) -> tuple[dict[str, Sources], dict[str, Any]] | None:
    """The output's weights before any update, and the fields of config.json that change; None when the field
    is not set. Raises AdapterError."""
    pairs = adapter.config.get(FIELD)
    if not pairs:
        return None
    where = f"{adapter.folder / CONFIG}: {FIELD}"
    path, layers = _layers(weights, config, where)
    chosen = _chosen(pairs, len(layers), where)
    init = str(adapter.config.get("init_lora_weights")).lower()
    if init in BASE_CHANGING_INITS and len(set(chosen)) < len(chosen):
        raise AdapterError(
            f"{where} repeats layers, and init_lora_weights is {init}, which then changes the weight that "
            "the copies share once for each copy; that is not supported."
        )
    _refuse_kinds_by_number(config, layers, where)
    _refuse_moved_masks(config.get("layer_types"), len(layers), chosen, where)
    result = {name: sources for name, sources in weights.items() if not name.startswith(f"{path}.")}
    for new, old in enumerate(chosen):
        result |= {f"{path}.{new}.{rest}": sources for rest, sources in layers[old].items()}
    changes: dict[str, Any] = {name: len(chosen) for name in COUNTS if config.get(name) == len(layers)}
    for name, value in config.items():
        if isinstance(value, list):
            changes |= _mapped(name, value, chosen, len(layers), where)
    left = sorted(set(range(len(layers))) - set(chosen))
    gone = f"; {listed(left)} {'is' if len(left) == 1 else 'are'} not used" if left else ""
    warn(f"{where} makes {len(chosen)} layers from the checkpoint's {len(layers)}{gone}.")
    return result, changes


def _layers(
    weights: Mapping[str, Sources], config: dict[str, Any], where: str
) -> tuple[str, list[dict[str, Sources]]]:
    """The path of the list of layers, and the weights of each."""
    found: dict[str, dict[int, dict[str, Sources]]] = {}
    for name, sources in weights.items():
        if match := _LAYERS.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = sources
    field = next((name for name in COUNTS if type(config.get(name)) is int), None)
    if field is None:
        raise AdapterError(
            f"{where} is set, but the checkpoint's config.json has none of {', '.join(COUNTS)}."
        )
    fitting = [path for path, layers in found.items() if len(layers) == max(layers) + 1 == config[field]]
    if len(fitting) != 1 or len(found) > 1:
        seen = "; ".join(f"{shown(path)} with {len(layers)}" for path, layers in found.items()) or "none"
        raise AdapterError(
            f"{where} is set, which PEFT knows for one list of layers (layers, encoder.layer or h) with as "
            f"many as {field} says, {config[field]}; the checkpoint has {seen}."
        )
    layers = found[fitting[0]]
    return fitting[0], [layers[i] for i in range(config[field])]


def _chosen(pairs: Any, n_layers: int, where: str) -> list[int]:
    """For each layer of the output, that of the checkpoint."""
    chosen: list[int] = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(n) is not int for n in pair):
            raise AdapterError(
                f"{where} has {shown(pair)}; expected a list of pairs [first layer, layer after the last]."
            )
        first, end = pair
        if not 0 <= first < end <= n_layers:
            raise AdapterError(
                f"{where} has {shown(pair)}, but the checkpoint has {n_layers} layers, 0 to {n_layers - 1}."
            )
        chosen += range(first, end)
        if len(chosen) > MAX_LAYERS:
            raise AdapterError(f"{where} makes more than {MAX_LAYERS} layers.")
    return chosen


def _mapped(name: str, value: list[Any], chosen: list[int], n_layers: int, where: str) -> dict[str, Any]:
    """What becomes of a list in the config."""
    if name in NUMBERS:
        return {name: [new for new, old in enumerate(chosen) if old in value]}
    if len(value) != n_layers or _NOT_LAYERS.fullmatch(name):
        return {}
    if name not in PER_LAYER:
        raise AdapterError(
            f"{where} is set, and {shown(name)} of the checkpoint's config.json has as many entries as there "
            "are layers; whether each belongs to a layer is not known."
        )
    return {name: [value[old] for old in chosen]}


def _refuse_kinds_by_number(config: dict[str, Any], layers: list[dict[str, Sources]], where: str) -> None:
    """Raises AdapterError when what a layer computes follows from its number, and no list of the config says
    it."""
    kind = str(config.get("model_type"))
    fields = [name for name in OWN_NUMBER_FIELDS if config.get(name)]
    if fields or kind in OWN_NUMBER_TYPES:
        raise AdapterError(
            f"{where} is set, but layers of {shown(kind)}{f' with {fields[0]}' if fields else ''} compute "
            "with their own number, which PEFT's copies keep; that is not supported."
        )
    lists = [
        *load_table()["layers"].get(kind, ()),
        *(["layer_types"] if config.get("use_sliding_window") else []),
    ]
    lacking = [name for name in lists if config.get(name) is None]
    if lacking:
        raise AdapterError(
            f"{where} is set, but the checkpoint's config.json has no {listed(lacking)}, so that a layer's "
            f"kind follows from its number. {_WAY_OUT}"
        )
    first_of: dict[str, int] = {}
    for number, layer in enumerate(layers):
        first = first_of.setdefault(_kind_of(config, number, len(layers)), number)
        if _shapes(layer) != _shapes(layers[first]):
            raise AdapterError(
                f"{where} is set, and layers {first} and {number} hold different tensors, but no list of the "
                "checkpoint's config.json tells one from the other, so that a layer's kind follows from its "
                f"number. {_WAY_OUT}"
            )


def _kind_of(config: dict[str, Any], number: int, n_layers: int) -> str:
    """All that the lists of the config say about one layer."""
    entries = {name: config.get(name) for name in sorted(PER_LAYER)}
    said = [entry[number] for entry in entries.values() if isinstance(entry, list) and len(entry) == n_layers]
    return str(
        [*said, *(number in entry for name in sorted(NUMBERS) if isinstance(entry := config.get(name), list))]
    )


def _shapes(layer: dict[str, Sources]) -> dict[str, tuple[int, ...]]:
    return {name: sources.spec.shape for name, sources in layer.items()}


def _refuse_moved_masks(kinds: Any, n_layers: int, chosen: list[int], where: str) -> None:
    """Raises AdapterError where the versions of transformers disagree on what PEFT's model computed."""
    # With more layers than before, only a transformers that asks the layer itself could run the model.
    if not isinstance(kinds, list) or len(kinds) != n_layers or n_layers < len(chosen):
        return
    for new, old in enumerate(chosen):
        if kinds[new] != kinds[old]:
            raise AdapterError(
                f"{where} puts layer {old} ({shown(kinds[old])}) in the place of layer {new} "
                f"({shown(kinds[new])}); transformers 5 masks its attention by the place and transformers 4 "
                "by the layer, so what was trained is not known."
            )
