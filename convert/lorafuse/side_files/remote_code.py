"""The Python files that `auto_map` needs: those that it names, and what these import from beside them."""

import ast
import posixpath
import warnings
from collections.abc import Iterator
from typing import Any

from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import read_text
from lorafuse.files.names import stays_inside
from lorafuse.files.safetensors_file import FormatError

# Configs beside config.json that may have an auto_map.
WITH_AUTO_MAP = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
)


def named_code(config: dict[str, Any]) -> list[str]:
    """The files that a config's auto_map names; code in another repository (`org/name--module.Class`) stays
    there."""
    auto_map = config.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    names = [item for item in flat if isinstance(item, str) and "--" not in item and "." in item]
    files = [f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in names]
    return list(dict.fromkeys(file for file in files if stays_inside(file)))


def with_imports(folder: Folder, files: list[str]) -> list[str]:
    """`files`, what they import by relative imports, and what that imports, as far as it is there."""
    found: dict[str, None] = {}
    todo = [file for file in files if folder.exists(file)]
    while todo:
        file = todo.pop()
        if file not in found:
            found[file] = None
            for module in imported(folder, file):
                todo += _files_of(folder, module)
    return sorted(found)


def imported(folder: Folder, file: str) -> Iterator[str]:
    """The modules that the relative imports of a file name, as paths without a suffix. None for a file that
    cannot be read as Python: a loader will say more than a copy could."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in strings
            tree = ast.parse(read_text(folder, file))
    except (ValueError, SyntaxError, RecursionError, MemoryError, OSError, FormatError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = "../" * (node.level - 1)
            module = posixpath.normpath(
                posixpath.join(posixpath.dirname(file), above, *(node.module or "").split("."))
            )
            # What is imported from a package may be a module of it.
            package = module == "." or not folder.exists(f"{module}.py")
            inner = [posixpath.normpath(f"{module}/{alias.name}") for alias in node.names] if package else []
            names = [module, *(name for name in inner if folder.exists(f"{name}.py") or folder.exists(name))]
            yield from (name for name in names if name != "." and stays_inside(name))


def _files_of(folder: Folder, module: str) -> Iterator[str]:
    """The files of a module, and of the packages that it lies in."""
    parts = module.split("/")
    packages = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    names = [f"{module}.py", *(f"{package}/__init__.py" for package in packages)]
    yield from (name for name in names if folder.exists(name))
