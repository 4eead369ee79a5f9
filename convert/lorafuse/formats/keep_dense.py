"""`--keep-dense`, and what `--format light` adds to it: which of the weights that change stay in full
precision."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from lorafuse.errors import listed
from lorafuse.naming.value_projections import ValueProjections
from lorafuse.settings import Settings


class KeepDense:
    """Patterns of module names, and which of them have matched none; and perhaps value projections."""

    def __init__(self, patterns: tuple[str, ...], values: ValueProjections | None = None) -> None:
        self._patterns, self._unmatched = patterns, set(patterns)
        self._values, self._without_values = values, values is not None

    @classmethod
    def asked_for(cls, settings: Settings, config: Mapping[str, Any]) -> "KeepDense":
        """What a run keeps dense; `config`: that of the base."""
        return cls(settings.keep_dense, ValueProjections(config) if settings.format == "light" else None)

    def names(self, weight: str) -> bool:
        """Whether a weight that changes is named: its module matches a pattern, or it holds values."""
        module = weight.removesuffix(".weight")
        matching = {pattern for pattern in self._patterns if fnmatchcase(module, pattern)}
        self._unmatched -= matching
        holds_values = self._values is not None and self._values.has(weight)
        self._without_values &= not holds_values
        return bool(matching) or holds_values

    def warnings(self) -> list[str]:
        found = []
        if self._without_values:
            found.append(
                "--format light: no quantized value projection changes, so that none becomes dense; the "
                "result is that of --format base."
            )
        if self._unmatched:
            found.append(
                f"--keep-dense {listed(sorted(self._unmatched))}: matches no quantized module that changes."
            )
        return found
