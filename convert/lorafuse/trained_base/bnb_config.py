"""The fields of transformers' BitsAndBytesConfig, into which every file of `--base-quant-from` is turned."""

from lorafuse.errors import UsageError, listed
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.config_fields import (
    ONLY_BNB,
    READ,
    SAY_IT,
    Config,
    flag,
    module_names,
    parsed_version,
    plain_value,
)

BNB = (
    "bitsandbytes",
    "bnb",
    "QuantizationMethod.BITS_AND_BYTES",
)  # LLaMA-Factory's name for it, and that of PEFT's README.md
# Fields of BitsAndBytesConfig that no quantized weight depends on.
_WITHOUT_EFFECT = {
    "llm_int8_threshold",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "_load_in_4bit",
    "_load_in_8bit",
}
DECISIVE = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_skip_modules")
_FLAGS = ("load_in_4bit", "load_in_8bit", "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload")
_KNOWN = _WITHOUT_EFFECT.union(DECISIVE, _FLAGS, ["quant_method"])


def from_bnb(config: Config, where: str, version: object = None) -> BaseQuant:
    """Fields of a BitsAndBytesConfig, which `version` of transformers wrote, if the file says so. Raises
    UsageError."""
    unknown = config.keys() - _KNOWN
    method = config.get("quant_method")
    if method is not None and method not in BNB:
        raise UsageError(f"{where}: quant_method is {plain_value(method)}; {ONLY_BNB}")
    if unknown:
        raise UsageError(
            f"{where}: {listed(sorted(unknown))}: no fields of a BitsAndBytesConfig that are known; {READ}."
        )
    four, eight, half, offload = (flag(config, name, where) for name in _FLAGS)
    for name, value in (("load_in_4bit", four), ("load_in_8bit", eight)):
        if flag(config, f"_{name}", where, value) != value:
            raise UsageError(f"{where}: {name} and _{name} contradict each other.")
    if four and eight:
        raise UsageError(f"{where}: load_in_4bit and load_in_8bit are both set; which is meant?")
    if not four and not eight:
        raise UsageError(
            f"{where}: quantizes nothing: neither load_in_4bit nor load_in_8bit is set.", unquantized=True
        )
    if eight and half:
        raise UsageError(
            f"{where}: llm_int8_has_fp16_weight is set, which keeps 16-bit weights: merge without "
            "--base-quant."
        )
    if offload:
        raise UsageError(
            f"{where}: llm_int8_enable_fp32_cpu_offload is set: which modules were on the CPU, and so not "
            f"quantized, is not in the file; {SAY_IT} and --quant-skip."
        )
    skip = module_names(config, "llm_int8_skip_modules", where)
    by_4 = skip is not None and (parsed_version(version) or (5, 0)) < (5, 0)
    skip_version = str(version) if by_4 else None
    if eight:
        return BaseQuant(kind="int8", skip=skip, skip_version=skip_version)
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise UsageError(f"{where}: bnb_4bit_quant_type is {plain_value(kind)}; expected nf4 or fp4.")
    return BaseQuant(
        kind=kind,
        double_quant=flag(config, "bnb_4bit_use_double_quant", where),
        skip=skip,
        skip_version=skip_version,
    )
