"""A receipt as it may be published: inputs by their ids or by the names of their directories, and no path of
the machine that made the result."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorafuse.files.folder import Folder
from lorafuse.files.hub_folder import HubFolder


class InputName(NamedTuple):
    """An input as its user named it, and as anybody may name it: the id at its commit, or the name of a
    directory. `weight` is an adapter's."""

    named: str
    folder: Folder
    weight: float = 1.0

    @property
    def published(self) -> str:
        if isinstance(self.folder, HubFolder):
            return self.folder.pinned
        return self.folder.address.rstrip("/").rpartition("/")[2] or self.folder.address

    @property
    def repo(self) -> str | None:
        """The repository on the hub."""
        return self.folder.repo.repo if isinstance(self.folder, HubFolder) else None


def published(receipt: Mapping[str, Any], inputs: Iterable[InputName]) -> dict[str, Any]:
    """The receipt without paths of this machine. Ids stay as they were given: the commit stands beside."""
    names: dict[str, str] = {}
    for found in inputs:
        if found.repo is None:
            names |= dict.fromkeys((found.named, str(found.folder), found.folder.address), found.published)
    by_length = sorted(names, key=len, reverse=True)
    return {key: _renamed(value, {name: names[name] for name in by_length}) for key, value in receipt.items()}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _text(value, names)
    if isinstance(value, dict):
        return {_text(key, names): _renamed(inner, names) for key, inner in value.items()}
    return [_renamed(inner, names) for inner in value] if isinstance(value, list) else value


def _text(text: str, names: Mapping[str, str]) -> str:
    for name, short in names.items():
        rest = text.removeprefix(name.rstrip("/"))
        if rest != text and (not rest or rest.startswith(("/", ": "))):
            return short + rest
        if name.startswith("/") and len(name) > 1:  # anywhere in a sentence
            text = text.replace(name, short)
    return text
