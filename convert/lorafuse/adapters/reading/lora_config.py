"""LoRA's part of adapter_config.json: what is refused, and how the factors were initialized."""

from typing import Any

from lorafuse.adapters.reading.check_config import pattern, refuse_fields
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.residual import PARTS

# Config fields that change what is computed and are not implemented: field → what PEFT does with it. Falsy
# values are harmless.
REFUSED_FIELDS = {
    "use_qalora": "QALoRA groups the inputs of lora_A",
    "alora_invocation_tokens": "aLoRA is active only after its invocation tokens, so no merged weight equals "
    "it",
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
_HARMLESS_INITS = (
    True,
    False,
    None,
    "true",
    "false",
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
    "pissa",
    "olora",
)


def checked_config(adapter: AdapterDir) -> dict[str, Any]:
    config, where = adapter.config, adapter.folder / CONFIG
    refuse_fields(adapter, REFUSED_FIELDS)
    init = lora_init(config)
    if not any(init is harmless or init == harmless for harmless in _HARMLESS_INITS):
        kind = "pissa_niter_N" if str(init).startswith("pissa_niter_") else str(init)
        raise AdapterError(
            f"{where}: init_lora_weights is {shown(init)}, which changes the base weight: "
            f"{REFUSED_INITS.get(kind, 'it is not known how')}. PEFT can save such an adapter as plain LoRA "
            "(path_initial_model_for_weight_conversion), or merge into the base that training saved, with "
            "init_lora_weights true."
        )
    if init in PARTS and config.get("target_parameters"):
        raise AdapterError(
            f"{where}: init_lora_weights is {shown(init)} with target_parameters, which is not supported."
        )
    pattern(adapter, "rank_pattern")
    pattern(adapter, "alpha_pattern")
    return config


def lora_init(config: dict[str, Any]) -> Any:
    """init_lora_weights; PEFT reads its words in any case."""
    init = config.get("init_lora_weights")
    return init.lower() if isinstance(init, str) else init


def changes_base(adapter: AdapterDir) -> bool:
    """Whether training took a part of the base weights out before its first step, so that a weight that it
    saved lacks it."""
    # A list: what the config of a type that has no such field holds there may not be hashable.
    return lora_init(adapter.config) in list(PARTS) or any(
        "lora_diag" in key for key in adapter.store.tensors
    )


def n_blocks_of(adapter: AdapterDir) -> int:
    """bdLoRA's number of blocks, 1 without it."""
    field = adapter.config.get("use_bdlora")
    n_blocks = field.get("nblocks", 1) if isinstance(field, dict) else 1
    if (field and not isinstance(field, dict)) or type(n_blocks) is not int or n_blocks < 1:
        raise AdapterError(
            f"{adapter.folder / CONFIG}: use_bdlora is {shown(field)}, expected an object with nblocks."
        )
    return n_blocks
