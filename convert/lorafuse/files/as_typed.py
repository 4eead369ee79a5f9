"""Names of inputs and outputs as people type them, as the names that they mean."""

import os
from os import PathLike, fspath

# Whoever names one of these means the directory that it lies in.
SUFFIXES = (".safetensors", ".json", ".bin", ".gguf")


def as_typed(name: str | PathLike[str]) -> str:
    """A path with the home directory in place of `~`, which a shell leaves alone in quotes. What is called so
    wins."""
    path = fspath(name)
    return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path


def directory_as_typed(name: str | PathLike[str]) -> str:
    """The same; of a file of weights, of a config or of an index, the directory that it lies in."""
    path = as_typed(name)
    if path.endswith(SUFFIXES) and os.path.isfile(path):
        return os.path.dirname(path) or "."
    return path
