"""Lists of modules that were not quantized, each read by the rule of the transformers that wrote it.

    to 4.39       an entry anywhere in the name                       integrations/bitsandbytes.py
    4.40 to 4.57  an entry and a dot anywhere in the name, or the     (_replace_with_bnb_linear)
                  whole name, or its last part
    5             a regular expression from the start of the name,    quantizers/quantizers_utils.py
                  or the end of the name                              (should_convert_module)

The names are those in memory of that version: from 4.52 to 4.57 vision-language models have names of their
own, before that those on disk.
"""

import re
from collections.abc import Iterable
from functools import cache

from lorafuse.errors import UsageError, shown
from lorafuse.files.patterns import Pattern
from lorafuse.naming.table import load_table
from lorafuse.trained_base.config_fields import parsed_version

WITH_A_DOT = (4, 40)  # https://github.com/huggingface/transformers/pull/29958
RENAMED = (4, 52)


def is_skipped(module: str, skip: Iterable[str]) -> bool:
    """transformers 5.23 quantizers/quantizers_utils.py, should_convert_module: an entry is a regular
    expression from the start of the name to a boundary between words, or the end of the name."""
    return any(_skip_pattern(entry).matches(module) or module.endswith(entry) for entry in skip)


@cache
def _skip_pattern(entry: str) -> Pattern:
    try:
        return Pattern(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    except re.error as e:
        raise UsageError(f"--quant-skip: {shown(entry)!r} cannot be matched: {e}.") from None


def is_skipped_by_4(module: str, skip: Iterable[str], version: tuple[int, int]) -> bool:
    """The rule of transformers 4."""
    if version < WITH_A_DOT:
        return any(entry in module for entry in skip)
    last = module.rpartition(".")[2]
    return any(f"{entry}." in module or entry in (module, last) for entry in skip)


def older_name(model_class: str, name: str) -> str:
    """The name in memory before 4.52 of what 4.52 to 4.57 call `name`: their renaming turned round."""
    for pattern, replacement in load_table()["v4"]["classes"].get(model_class, {}).items():
        old = re.sub(r"\(\?!.*", "", pattern.removeprefix("^"))
        found = re.search(("^" if pattern.startswith("^") else "") + re.escape(replacement) + r"(?!\w)", name)
        if found:
            return name[: found.start()] + old + name[found.end() :]
    return name


class SkipList:
    """The entries of one list. `version`: of the transformers that wrote it, None for 5."""

    def __init__(self, entries: Iterable[str], version: str | None, model_class: str) -> None:
        self._entries, self._version = tuple(dict.fromkeys(entries)), parsed_version(version)
        self._model_class = model_class

    def name_of(self, v4_name: str, v5_name: str) -> str:
        """The name that the list's version gives a module, of its names in transformers 4.52 to 4.57 and in
        5."""
        if self._version is None:
            return v5_name
        return older_name(self._model_class, v4_name) if self._version < RENAMED else v4_name

    def skips(self, name: str) -> bool:
        """Whether a module, under the name that the list's version gives it, is on the list."""
        return self._matches(name, self._entries)

    def _matches(self, name: str, entries: Iterable[str]) -> bool:
        if self._version is None:
            return is_skipped(name, entries)
        return is_skipped_by_4(name, entries, self._version)

    def without_match(self, names: Iterable[str]) -> list[str]:
        """The entries that match no module of all there are."""
        left = list(self._entries)
        for name in names:
            if not left:
                break
            left = [entry for entry in left if not self._matches(name, (entry,))]
        return left
