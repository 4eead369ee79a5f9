"""Small text files that people and trainers write, read as dicts, lists and scalars: JSON and YAML.

It replaces `yaml.safe_load`, which takes the last of two fields of one name and copies what `<<` merges,
again and again: a few lines can fill the memory. Here YAML is composed as nodes and built from these. Only
true, false and null are more than text: `4`, `0x4` and `2024-01-01` stay as they are written. What an alias
names is shared, not copied.
"""

import json
from collections import Counter
from contextlib import closing
from typing import Any

from lorafuse.errors import shown
from lorafuse.files.folder import Folder, read_fully
from lorafuse.files.safetensors_file import LFS_HINT, LFS_MAGIC

MAX_NBYTES = 1_000_000
_TAG = "tag:yaml.org,2002:"
_TRUE = ("true", "yes", "on")  # of YAML 1.1, which PyYAML and so every trainer reads


def read_limited(folder: Folder, name: str, max_nbytes: int) -> bytes:
    """A file that must be small. Raises ValueError with a message that names the file, FormatError or
    OSError."""
    with closing(folder.open(name)) as file:
        data = bytes(read_fully(file, 0, min(file.facts.nbytes, max_nbytes) + 1))
    if data.startswith(LFS_MAGIC):
        raise ValueError(f"{folder / name}: {LFS_HINT}")
    if len(data) > max_nbytes:
        raise ValueError(f"{folder / name}: is larger than {max_nbytes} bytes.")
    return data


def read_text(folder: Folder, name: str) -> str:
    """A file of UTF-8 text. Raises ValueError with a message that names the file, FormatError or OSError."""
    try:
        return read_limited(folder, name, MAX_NBYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{folder / name}: is not UTF-8 text.") from None


def parse_json(text: str, where: object) -> Any:
    """Raises ValueError with a message that begins with `where`."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply.") from None
    except ValueError as e:
        raise ValueError(f"{where}: is not valid JSON: {shown(e)}.") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{shown(next(name for name in counts if counts[name] > 1))} is there twice")
    return result


def parse_yaml(text: str, where: object) -> Any:
    """Raises ValueError with a message that begins with `where`."""
    import yaml

    try:
        node = yaml.compose(text, yaml.SafeLoader)
        return None if node is None else _built(node, where, {})
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply.") from None
    except yaml.YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(
            f"{where}: is not valid YAML: {line}{shown(problem or str(e).partition(chr(10))[0])}."
        ) from None


def _built(node: Any, where: object, built: dict[int, Any]) -> Any:
    """The value of a node. `built` holds what was made, by node, so that nothing is made twice."""
    if id(node) in built:
        return built[id(node)]
    if node.id == "scalar":
        return _scalar(node)
    if node.id == "sequence":
        items: list[Any] = []
        built[id(node)] = items
        items += [_built(item, where, built) for item in node.value]
        return items
    fields: dict[str, Any] = {}
    built[id(node)] = fields
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.id != "scalar":
            raise ValueError(f"{where}: has a key that is no text, in line {line}.")
        if key.tag == f"{_TAG}merge":
            raise ValueError(
                f"{where}: merges fields with << in line {line}, which is not read; write them out."
            )
        if key.value in fields:
            raise ValueError(
                f"{where}: has {shown(key.value)} twice, the second time in line {line}; which is meant?"
            )
        fields[key.value] = _built(value, where, built)
    return fields


def _scalar(node: Any) -> Any:
    if node.tag == f"{_TAG}null":
        return None
    return node.value.lower() in _TRUE if node.tag == f"{_TAG}bool" else node.value


MAX_JSON_NBYTES = 64_000_000


def read_json_dict(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON file that must hold an object. Raises ValueError with a message that names the file."""
    data = read_limited(folder, name, MAX_JSON_NBYTES)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{folder / name}: is not valid JSON: {shown(e) or type(e).__name__}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name}: holds {type(value).__name__}, expected an object.")
    return value
