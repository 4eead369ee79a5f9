"""Fields of a trainer's config, read strictly."""

import re
from collections.abc import Mapping
from typing import Any

from lorafuse.errors import UsageError, shown
from lorafuse.trained_base.model_names import quantized_by_name

Config = Mapping[str, Any]
_VERSION = re.compile(r"(\d{1,4})(?:\.(\d{1,4}))?(?!\d)")
ONLY_BNB = "only what bitsandbytes does to weights is simulated."
SAY_IT = "say what training did with --base-quant"
READ = (
    "what is read: a BitsAndBytesConfig, a config.json with one, a training config of axolotl, LLaMA-Factory "
    "or TRL, or a README.md into which PEFT or axolotl wrote theirs"
)


def refuse_set(config: Config, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if config.get(name):
            raise UsageError(f"{where}: {name} is {plain_value(config[name])}; {ONLY_BNB}")


def refuse_quantized(config: Config, field: str, where: str) -> None:
    """A base that was quantized before training: then its own config holds, and the trainer's settings have
    no effect."""
    name = config.get(field)
    kind = quantized_by_name(name) if isinstance(name, str) else None
    if kind:
        raise UsageError(
            f"{where}: {field} is {plain_value(name)}, which by its name was quantized ({kind}) before "
            "training; merge into that checkpoint, or take its config.json."
        )


def set_fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def plain_value(value: Any) -> str:
    """A value as it may be shown; the text of a nested one may be far longer than the file."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a group of fields"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else shown(value)


def flag(config: Config, name: str, where: str, default: bool = False) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{where}: {name} is {plain_value(value)}; expected true or false.")
    return default if value is None else value


def module_names(config: Config, name: str, where: str) -> tuple[str, ...] | None:
    value = config.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise UsageError(f"{where}: {name} is {plain_value(value)}; expected a list of names.")
    return None if value is None else tuple(value)


def says_nothing(where: str) -> UsageError:
    return UsageError(f"{where}: says nothing of how the base was quantized; {READ}.")


def parsed_version(version: object) -> tuple[int, int] | None:
    """(major, minor) of a version such as 4.51.3 or 4.46.0.dev0; None for what is none."""
    match = _VERSION.match(version) if isinstance(version, str) else None
    return (int(match[1]), int(match[2] or 0)) if match else None
