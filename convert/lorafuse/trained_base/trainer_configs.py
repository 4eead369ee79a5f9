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
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

from lorafuse.errors import LorafuseError, UsageError, listed, shown
from lorafuse.files.folder import Folder
from lorafuse.files.folders import folder_and_file
from lorafuse.files.json_yaml import parse_json, parse_yaml, read_text
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.bnb_config import BNB, DECISIVE, from_bnb
from lorafuse.trained_base.config_fields import (
    ONLY_BNB,
    READ,
    SAY_IT,
    Config,
    flag,
    plain_value,
    refuse_quantized,
    refuse_set,
    says_nothing,
    set_fields,
)

_OF_CARDS = "4"  # transformers, when PEFT 0.4 to 0.6 wrote cards; the rule did not change before 4.40
_PEFT_CARD = re.compile(
    r"^The following `bitsandbytes` quantization config was used during training:\n+((?:- .*\n?)+)", re.M
)
_QUANT_CONFIG = {"name", "quantization_bit", "compute_dtype", "double_quantization", "quantization_type"}
_YAML_BLOCK = re.compile(r"^```ya?ml\n(.*?)^```", re.M | re.S)


def read_base_quant(path: str | PathLike[str]) -> BaseQuant:
    """What the file says of the base's quantization. Raises UsageError for a file that says nothing,
    contradicts itself, or has a setting whose effect on the weights is not known."""
    return read_of_folder(*folder_and_file(fspath(path)))


def read_of_folder(folder: Folder, name: str) -> BaseQuant:
    """`read_base_quant` of a file in a folder."""
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
        written = {name: None if value == "None" else value for name, value in fields.items()}
        found.append(from_bnb(written, where, _OF_CARDS))
    if not found:
        blocks = [_YAML_BLOCK.search(part) for part in text.split("See axolotl config")[1:]]
        found = [_axolotl(set_fields(parse_yaml(block[1], where)), where) for block in blocks if block]
    if not found:
        raise UsageError(
            f"{where}: neither PEFT nor axolotl wrote into it how the base was quantized; {READ}."
        )
    if any(other != found[0] for other in found):
        raise UsageError(
            f"{where}: says in {len(found)} places how the base was quantized, and not the same; {SAY_IT}."
        )
    return found[0]


def _from_config(config: Config, where: str) -> BaseQuant:
    """Who wrote a config is told by the fields that no other has."""
    if {"base_model", "adapter"} & config.keys():
        return _axolotl(config, where)
    board = {name.removeprefix("top."): value for name, value in config.items() if name.startswith("top.")}
    if board:
        return _llama_factory(board | {"use_unsloth": board.get("booster") == "unsloth"}, where)
    if "quant_config" in config:
        return _llama_factory_1(config, where)
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
        version = config.get("transformers_version")
        return from_bnb(set_fields(inside[0]), f"{where}: quantization_config", version)
    if {"quant_method", "load_in_4bit", "load_in_8bit"} & config.keys():
        return from_bnb(config, where)
    raise says_nothing(where)


def _axolotl(config: Config, where: str) -> BaseQuant:
    """axolotl's own config: nf4 with double quantization for `adapter: qlora`, int8 for `adapter: lora`,
    where asked to."""
    refuse_set(config, ("gptq", "model_quantization_config"), where)
    refuse_quantized(config, "base_model", where)
    if re.search(r"jamba|falcon-?_?h1", plain_value(config.get("base_model")), re.IGNORECASE):
        raise UsageError(
            f"{where}: base_model is {plain_value(config['base_model'])}, of which axolotl leaves modules in "
            f"full precision, others in other versions; {SAY_IT} and --quant-skip."
        )
    adapter, peft = config.get("adapter"), set_fields(config.get("peft"))
    if not {"load_in_4bit", "load_in_8bit"} & config.keys() and "backend" not in peft:
        raise says_nothing(where)
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
                f"does depends on the version of axolotl: {SAY_IT}."
            )
    fields: dict[str, Any] = dict(bits)
    if bits["load_in_4bit"]:
        fields |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | set_fields(
            config.get("bnb_config_kwargs")
        )
        for name in DECISIVE:
            if name in config and config[name] != fields.get(name):
                raise UsageError(
                    f"{where}: {name} is not in bnb_config_kwargs, where alone axolotl reads it; {SAY_IT}."
                )
    made, stacked = from_bnb(fields, where), flag(config, "quantize_moe_experts", where)
    return replace(made, stacked_experts=stacked)


def _llama_factory(config: Config, where: str) -> BaseQuant:
    """LLaMA-Factory's arguments, its training_args.yaml, and with other names llamaboard_config.yaml."""
    refuse_quantized(config, "model_name_or_path", where)
    if "quantization_bit" not in config:
        raise says_nothing(where)
    bits = plain_value(config["quantization_bit"])
    if bits in ("null", "none", ""):
        raise UsageError(f"{where}: quantizes nothing: quantization_bit is not set.", unquantized=True)
    method = config.get("quantization_method") or "bnb"
    if method not in BNB:
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
    return from_bnb(fields, where)


def _llama_factory_1(config: Config, where: str) -> BaseQuant:
    """The arguments of LLaMA-Factory's second design (src/llamafactory/v1), whose quantization is a group of
    fields with a name. Its `bnb` takes 4 bits where none are given, its `auto` then quantizes nothing."""
    refuse_quantized(config, "model", where)
    inside, where = config["quant_config"], f"{where}: quant_config"
    if inside is None:
        raise UsageError(f"{where}: quantizes nothing: it is null.", unquantized=True)
    if not isinstance(inside, dict) or inside.get("name") not in ("bnb", "auto"):
        named = inside.get("name") if isinstance(inside, dict) else inside
        raise UsageError(f"{where}: its name is {plain_value(named)}; {ONLY_BNB}")
    unknown = inside.keys() - _QUANT_CONFIG
    if unknown:
        raise UsageError(f"{where}: {listed(sorted(unknown))}: no fields of it that are known; {SAY_IT}.")
    by_default = 4 if inside["name"] == "bnb" else None
    bits = inside.get("quantization_bit")
    return _llama_factory(inside | {"quantization_bit": by_default if bits is None else bits}, where)


def _trl(config: Config, where: str) -> BaseQuant:
    """A recipe of TRL or of the alignment handbook: the fields of TRL's ModelConfig."""
    refuse_quantized(config, "model_name_or_path", where)
    if not {"load_in_4bit", "load_in_8bit"} & config.keys():
        raise says_nothing(where)
    fields = {
        "load_in_4bit": flag(config, "load_in_4bit", where),
        "load_in_8bit": flag(config, "load_in_8bit", where),
        "bnb_4bit_quant_type": config.get("bnb_4bit_quant_type") or "nf4",
        "bnb_4bit_use_double_quant": flag(config, "use_bnb_nested_quant", where),
    }
    return from_bnb(fields, where)
