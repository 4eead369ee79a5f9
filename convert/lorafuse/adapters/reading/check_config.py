"""The checks of an adapter's config: a field has the kind of value that a formula needs, or AdapterError
names it."""

import math
from collections.abc import Mapping
from typing import Any

from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.errors import AdapterError, listed, shown


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
    if type(value) not in kinds or not math.isfinite(value) or value < least:
        expected = ("a number" if float in kinds else "an integer") + (
            f" of at least {least:g}" if least > -math.inf else ""
        )
        found = f'the text "{shown(value)}"' if isinstance(value, str) else shown(value)
        raise AdapterError(f"{adapter.folder / CONFIG}: {what} is {found}, expected {expected}.")
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


def refuse_fields(adapter: AdapterDir, refused: Mapping[str, str]) -> None:
    """Raises AdapterError for a field that is set and changes what is computed: field → what PEFT does with
    it."""
    for field, what in refused.items():
        if adapter.config.get(field):
            raise AdapterError(f"{adapter.folder / CONFIG}: {field} is set, which is not supported: {what}.")
