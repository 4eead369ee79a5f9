"""How training quantized the base, from the files that say so: `--base-quant-from FILE`.

Whatever the file, it is turned into fields of transformers' BitsAndBytesConfig, and these are read in one
place. The defaults are those of who wrote it, and they differ:

    BitsAndBytesConfig  fp4, one level of quantization  utils/quantization_config.py
    PEFT's README.md    every field is there            peft_model.py 0.4 to 0.6, create_or_update_model_card
    axolotl             nf4, double                     loaders/model.py, _set_quantization_config
    LLaMA-Factory       nf4, double                     hparams/model_args.py, model_utils/quantization.py
    TRL's recipes       nf4, one level                  trainer/model_config.py; alignment-handbook

axolotl's README.md holds its YAML. All of them leave the block size to bitsandbytes, whose default is 64, and
which modules are skipped to transformers 5.23.
"""

import posixpath
import re
from os import PathLike, fspath
from typing import Any

from lorafuse.errors import LorafuseError, UsageError, listed, shown
from lorafuse.files.folder import Folder
from lorafuse.files.folders import folder_and_file
from lorafuse.files.json_yaml import parse_json, parse_yaml, read_text
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.config_fields import (
    ONLY_BNB,
    Config,
    flag,
    module_names,
    plain_value,
    refuse_quantized,
    refuse_set,
    set_fields,
)

READ = (
    "what is read: a BitsAndBytesConfig, a config.json with one, a training config of axolotl, LLaMA-Factory "
    "or TRL, or a README.md into which PEFT or axolotl wrote theirs"
)
_SAY_IT = "say what training did with --base-quant"
_BNB = (
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
_DECISIVE = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_skip_modules")
_FLAGS = ("load_in_4bit", "load_in_8bit", "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload")
_KNOWN = _WITHOUT_EFFECT.union(_DECISIVE, _FLAGS, ["quant_method"])
_PEFT_CARD = re.compile(
    r"^The following `bitsandbytes` quantization config was used during training:\n+((?:- .*\n?)+)", re.M
)
_YAML_BLOCK = re.compile(r"^```ya?ml\n(.*?)^```", re.M | re.S)


def read_base_quant(path: str | PathLike[str]) -> BaseQuant:
    """What the file says of the base's quantization. Raises UsageError for a file that says nothing,
    contradicts itself, or has a setting whose effect on the weights is not known."""
    folder, name = folder_and_file(fspath(path))
    where = shown(folder / name)
    try:
        return _read(folder, name, where)
    except FileNotFoundError:
        raise UsageError(f"{where}: no such file.") from None
    except OSError as e:
        raise UsageError(f"{where}: cannot be read: {e.strerror}.") from None
    except UsageError:
        raise
    except (LorafuseError, ValueError) as e:
        raise UsageError(str(e)) from None


def _read(folder: Folder, name: str, where: str) -> BaseQuant:
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in (".bin", ".pt"):  # the Trainer's training_args.bin
        raise UsageError(f"{where}: holds Python objects, which are not loaded; {READ}.")
    text = read_text(folder, name)
    if suffix == ".md":
        return _from_card(text, where)
    config = parse_json(text, where) if suffix == ".json" else parse_yaml(text, where)
    if not isinstance(config, dict):
        raise UsageError(f"{where}: holds no fields; {READ}.")
    return _from_config(config, where)


def _from_card(text: str, where: str) -> BaseQuant:
    """PEFT adds its list again whenever it saves, and it is what was in effect; axolotl's config is what was
    asked for."""
    found: list[BaseQuant] = []
    text = text.replace("\r\n", "\n")
    for match in _PEFT_CARD.finditer(text):
        fields: dict[str, Any] = {}
        for line in parse_yaml(match[1], where):
            fields |= line if isinstance(line, dict) else {plain_value(line): None}
        found.append(
            _from_bnb({name: None if value == "None" else value for name, value in fields.items()}, where)
        )
    if not found:
        blocks = [_YAML_BLOCK.search(part) for part in text.split("See axolotl config")[1:]]
        found = [_axolotl(set_fields(parse_yaml(block[1], where)), where) for block in blocks if block]
    if not found:
        raise UsageError(
            f"{where}: neither PEFT nor axolotl wrote into it how the base was quantized; {READ}."
        )
    if any(other != found[0] for other in found):
        raise UsageError(
            f"{where}: says in {len(found)} places how the base was quantized, and not the same; {_SAY_IT}."
        )
    return found[0]


def _from_config(config: Config, where: str) -> BaseQuant:
    """Who wrote a config is told by the fields that no other has."""
    if {"base_model", "adapter"} & config.keys():
        return _axolotl(config, where)
    board = {name.removeprefix("top."): value for name, value in config.items() if name.startswith("top.")}
    if board:
        return _llama_factory(board | {"use_unsloth": board.get("booster") == "unsloth"}, where)
    if {"quantization_bit", "finetuning_type", "stage"} & config.keys():
        return _llama_factory(config, where)
    if {"model_name_or_path", "use_bnb_nested_quant"} & config.keys():
        return _trl(config, where)
    inside = [
        part["quantization_config"]
        for part in (config, *config.values())
        if set_fields(part).get("quantization_config")
    ]
    if inside:
        return _from_bnb(set_fields(inside[0]), f"{where}: quantization_config")
    if {"quant_method", "load_in_4bit", "load_in_8bit"} & config.keys():
        return _from_bnb(config, where)
    raise UsageError(f"{where}: says nothing of how the base was quantized; {READ}.")


def _from_bnb(config: Config, where: str) -> BaseQuant:
    """Fields of a BitsAndBytesConfig."""
    unknown = config.keys() - _KNOWN
    method = config.get("quant_method")
    if method is not None and method not in _BNB:
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
        raise UsageError(f"{where}: quantizes nothing: neither load_in_4bit nor load_in_8bit is set.")
    if eight and half:
        raise UsageError(
            f"{where}: llm_int8_has_fp16_weight is set, which keeps 16-bit weights: merge without "
            "--base-quant."
        )
    if offload:
        raise UsageError(
            f"{where}: llm_int8_enable_fp32_cpu_offload is set: which modules were on the CPU, and so not "
            f"quantized, is not in the file; {_SAY_IT} and --quant-skip."
        )
    skip = module_names(config, "llm_int8_skip_modules", where)
    if eight:
        return BaseQuant(kind="int8", skip=skip)
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise UsageError(f"{where}: bnb_4bit_quant_type is {plain_value(kind)}; expected nf4 or fp4.")
    return BaseQuant(kind=kind, double_quant=flag(config, "bnb_4bit_use_double_quant", where), skip=skip)


def _axolotl(config: Config, where: str) -> BaseQuant:
    """axolotl's own config: nf4 with double quantization for `adapter: qlora`, int8 for `adapter: lora`,
    where asked to."""
    refuse_set(config, ("gptq", "model_quantization_config"), where)
    refuse_quantized(config, "base_model", where)
    if re.search(r"jamba|falcon-?_?h1", plain_value(config.get("base_model")), re.IGNORECASE):
        raise UsageError(
            f"{where}: base_model is {plain_value(config['base_model'])}, of which axolotl leaves modules in "
            f"full precision, others in other versions; {_SAY_IT} and --quant-skip."
        )
    adapter, peft = config.get("adapter"), set_fields(config.get("peft"))
    bits = {
        "load_in_4bit": flag(config, "load_in_4bit", where),
        "load_in_8bit": flag(config, "load_in_8bit", where),
    }
    if peft.get("backend") not in (None, "bnb"):
        raise UsageError(f"{where}: peft.backend is {plain_value(peft['backend'])}; {ONLY_BNB}")
    if peft.get("backend") == "bnb" and peft.get("weight_dtype") in ("nf4", "int8"):
        field = "load_in_4bit" if peft["weight_dtype"] == "nf4" else "load_in_8bit"
        bits[field] |= field not in config
        adapter = "qlora" if (adapter, field) == ("lora", "load_in_4bit") else adapter
    for field, fitting in (("load_in_4bit", "qlora"), ("load_in_8bit", "lora")):
        if bits[field] and adapter != fitting:
            # adapter: lora with load_in_4bit was fp4 once, and is not quantized at all today.
            raise UsageError(
                f"{where}: adapter is {plain_value(adapter)} with {field}, expected {fitting}; what this "
                f"does depends on the version of axolotl: {_SAY_IT}."
            )
    fields: dict[str, Any] = dict(bits)
    if bits["load_in_4bit"]:
        fields |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | set_fields(
            config.get("bnb_config_kwargs")
        )
        for name in _DECISIVE:
            if name in config and config[name] != fields.get(name):
                raise UsageError(
                    f"{where}: {name} is not in bnb_config_kwargs, where alone axolotl reads it; {_SAY_IT}."
                )
    return _from_bnb(fields, where)


def _llama_factory(config: Config, where: str) -> BaseQuant:
    """LLaMA-Factory's arguments, its training_args.yaml, and with other names llamaboard_config.yaml."""
    refuse_quantized(config, "model_name_or_path", where)
    bits = plain_value(config.get("quantization_bit"))
    if bits in ("null", "none", ""):
        raise UsageError(f"{where}: quantizes nothing: quantization_bit is not set.")
    method = config.get("quantization_method") or "bnb"
    if method not in _BNB:
        raise UsageError(f"{where}: quantization_method is {plain_value(method)}; {ONLY_BNB}")
    if bits not in ("4", "8"):
        raise UsageError(
            f"{where}: quantization_bit is {plain_value(config['quantization_bit'])}; bitsandbytes has 4 and "
            "8."
        )
    if flag(config, "use_unsloth", where):
        raise UsageError(
            f"{where}: use_unsloth is set: unsloth may load a checkpoint that it quantized itself, with "
            "modules left out; take the config.json of that."
        )
    fields = {
        f"load_in_{bits}bit": True,
        "bnb_4bit_quant_type": config.get("quantization_type") or "nf4",
        "bnb_4bit_use_double_quant": flag(config, "double_quantization", where, True),
    }
    return _from_bnb(fields, where)


def _trl(config: Config, where: str) -> BaseQuant:
    """A recipe of TRL or of the alignment handbook: the fields of TRL's ModelConfig."""
    refuse_quantized(config, "model_name_or_path", where)
    fields = {
        "load_in_4bit": flag(config, "load_in_4bit", where),
        "load_in_8bit": flag(config, "load_in_8bit", where),
        "bnb_4bit_quant_type": config.get("bnb_4bit_quant_type") or "nf4",
        "bnb_4bit_use_double_quant": flag(config, "use_bnb_nested_quant", where),
    }
    return _from_bnb(fields, where)
