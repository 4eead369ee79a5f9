"""What a config of GPTQ or auto-round says of one module, apart from all others.

dynamic        {expression: settings}: the first expression that matches the start of a module's name counts;
               "+:" may stand before it. After "-:" stands what is not quantized (gptqmodel 7.7,
               quantization/config.py)
extra_config   {name or expression: settings}: the whole name counts first; an expression may match any
               part of a name (auto-round 0.16, inference/utils.py)
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any

from lorafuse.files.patterns import Pattern

_OF_EXPRESSIONS = frozenset("*+?^$()[]{}|\\")


def group_size_of(module: str, section: Mapping[str, Any]) -> object:
    """Returns the group_size of a module, whatever it is: that of the whole section, where nothing else is
    said of the module."""
    settings = next(chain(_dynamic(module, section), _extra(module, section)), section)
    return settings.get("group_size", section.get("group_size"))


def _dynamic(module: str, section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for expression, settings in _entries(section.get("dynamic")):
        excluded = expression.startswith("-:")
        if _matches(expression.removeprefix("-:" if excluded else "+:"), module):
            if not excluded:
                yield settings
            return


def _extra(module: str, section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    entries = list(_entries(section.get("extra_config")))
    yield from (settings for name, settings in entries if name == module)
    for expression, settings in entries:
        if _OF_EXPRESSIONS & set(expression) and _matches(f".*(?:{expression})", module):
            yield settings


def _entries(value: object) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((name, settings) for name, settings in value.items() if isinstance(settings, dict))


def _matches(expression: str, module: str) -> bool:
    pattern = _pattern(expression)
    return pattern is not None and pattern.matches(module)


@cache
def _pattern(expression: str) -> Pattern | None:
    try:
        return Pattern(expression)
    except re.error:
        return None
