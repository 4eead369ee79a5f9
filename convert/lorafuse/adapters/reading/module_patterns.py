"""rank_pattern and alpha_pattern: values for the modules whose names match, without trying every key."""

import re
from collections.abc import Mapping
from typing import Any

from lorafuse.files.patterns import Pattern

# Names, in which a dot matches any character but a line's end.
_PLAIN = re.compile(r"[\w.\-]*")


class ModulePatterns:
    """PEFT's look-up: the first key in file order that matches as a regular expression anchored at the end,
    preceded by nothing or by a dot (PEFT 0.21 utils/other.py, get_pattern_key). Raises re.error for a key
    that is none.

    Trainers write an entry for each module, so keys that are names are looked up: those of one length with
    dots at the same places have one dict, by their other characters.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._entries = list(values.items())
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[tuple[int, Pattern]] = []
        for number, key in enumerate(values):
            if _PLAIN.fullmatch(key):
                dots = tuple(i for i, c in enumerate(key) if c == ".")
                self._plain.setdefault((len(key), dots), {}).setdefault(key.replace(".", ""), number)
            else:
                self._others.append((number, Pattern(rf"(.*\.)?({key})$")))

    def value(self, module: str, default: Any) -> Any:
        """The value of the first key that matches the module's name; `default` where none does."""
        first = min(self._plain_matches(module), default=len(self._entries))
        for number, pattern in self._others:
            if number > first:
                break
            if pattern.matches(module):
                first = number
        return self._entries[first][1] if first < len(self._entries) else default

    def _plain_matches(self, module: str) -> list[int]:
        found = []
        for (length, dots), keys in self._plain.items():
            start = len(module) - length
            if start == 0 or (start > 0 and module[start - 1] == "."):
                rest, at = [], start
                for dot in dots:
                    rest.append(module[at : start + dot])
                    at = start + dot + 1
                number = keys.get("".join([*rest, module[at:]]))
                if number is not None:
                    found.append(number)
        return found
