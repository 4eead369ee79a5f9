"""The checks of an adapter's config: a field has the kind of value that a formula needs, or AdapterError
names it."""

import math
import re
from collections.abc import Mapping
from typing import Any

from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.module_patterns import ModulePatterns
from lorafuse.errors import AdapterError, listed, shown

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


def number(
    adapter: AdapterDir, field: str, default: float, *, least: float = -math.inf, null: bool = False
) -> float:
    """A finite number; `default` where the field is absent, or with `null` where it is null."""
    value = adapter.config.get(field, default)
    return checked(adapter, field, default if value is None and null else value, least=least)


def integer(adapter: AdapterDir, field: str, default: int, *, least: int = 1) -> int:
    """An integer; `default` where the field is absent."""
    return int(checked(adapter, field, adapter.config.get(field, default), least=least, kinds=(int,)))


def checked(
    adapter: AdapterDir,
    what: str,
    value: Any,
    *,
    least: float = -math.inf,
    kinds: tuple[type, ...] = (int, float),
) -> float:
    """A number of the config that was found somehow; `what` names it in the refusal."""
    if type(value) is int and int in kinds:
        in_float32(adapter, what, value)  # before anything makes a float of it
    if type(value) not in kinds or not math.isfinite(value) or value < least:
        expected = ("a number" if float in kinds else "an integer") + (
            f" of at least {least:g}" if least > -math.inf else ""
        )
        found = f'the text "{shown(value)}"' if isinstance(value, str) else shown(value)
        raise AdapterError(f"{adapter.folder / CONFIG}: {what} is {found}, expected {expected}.")
    return in_float32(adapter, what, value)


def in_float32(adapter: AdapterDir, what: str, value: float) -> float:
    """The number, which the arithmetic has to hold. Raises AdapterError for one beyond float32."""
    if abs(value) > MAX_FLOAT32:
        raise AdapterError(
            f"{adapter.folder / CONFIG}: {what} is {shown(value, 40)}, which is beyond float32."
        )
    return float(value)


def one_of(adapter: AdapterDir, field: str, default: str, known: tuple[str, ...]) -> str:
    """One of a few words."""
    value: Any = adapter.config.get(field, default)
    if value not in known:
        raise AdapterError(
            f"{adapter.folder / CONFIG}: {field} is {shown(value)}, which is not supported; known are "
            f"{listed(known)}."
        )
    return str(value)


def pattern(adapter: AdapterDir, field: str) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern; null means none."""
    value = adapter.config.get(field) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{adapter.folder / CONFIG}: {field} is {shown(value)}, expected an object.")
    return value


def pattern_value(adapter: AdapterDir, field: str, module: str, default: Any) -> Any:
    """What a rank_pattern or alpha_pattern says for a module; `default` where it says nothing. Raises
    AdapterError for a key that is no regular expression."""
    if field not in adapter.patterns:
        try:
            adapter.patterns[field] = ModulePatterns(pattern(adapter, field))
        except re.error as e:
            where = adapter.folder / CONFIG
            raise AdapterError(
                f"{where}: a pattern of {field} is not a regular expression: {shown(e)}."
            ) from None
    return adapter.patterns[field].value(module, default)


def refuse_fields(adapter: AdapterDir, refused: Mapping[str, str]) -> None:
    """Raises AdapterError for a field that is set and changes what is computed: field → what PEFT does with
    it."""
    for field, what in refused.items():
        if adapter.config.get(field):
            raise AdapterError(f"{adapter.folder / CONFIG}: {field} is set, which is not supported: {what}.")
