"""`--keep-dense`: which of the weights that change stay in full precision."""

from fnmatch import fnmatchcase

from lorafuse.errors import listed


class KeepDense:
    """Patterns of module names, and which of them have matched none."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns, self._unmatched = patterns, set(patterns)

    def names(self, weight: str) -> bool:
        """Whether a pattern matches the module of a weight that changes."""
        module = weight.removesuffix(".weight")
        matching = {pattern for pattern in self._patterns if fnmatchcase(module, pattern)}
        self._unmatched -= matching
        return bool(matching)

    def warnings(self) -> list[str]:
        if not self._unmatched:
            return []
        return [f"--keep-dense {listed(sorted(self._unmatched))}: matches no quantized module that changes."]
