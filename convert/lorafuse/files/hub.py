"""Names of repositories on the hub: ids and URLs, and the folders that they stand for."""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from lorafuse.errors import LorafuseError, shown
from lorafuse.files.folder import Folder
from lorafuse.files.folders import FOLDERS, open_folder
from lorafuse.files.hub_folder import HubFolder
from lorafuse.files.hub_repo import HubRepo
from lorafuse.files.names import scheme_of, stays_inside, without_secrets

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<folder>[\w.-][^@]*))?(@(?P<revision>[^@]+))?"
)
_URL = re.compile(r"https?://", re.IGNORECASE)
_PAGES = ("tree", "blob", "resolve")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


class HubName(NamedTuple):
    """A repository, one of its folders, and a branch, tag or commit. `str()` is the id."""

    repo: str
    folder: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        folder = f"/{self.folder}" if self.folder else ""
        return f"{self.repo}{folder}" + (f"@{self.revision}" if self.revision else "")


def hub_name(name: str) -> HubName | None:
    """What `org/name[/folder][@revision]`, or the URL of a repository's page, stands for; None for what can
    only be a path."""
    if _URL.match(name):
        return _of_url(name)
    match = _HUB_ID.fullmatch(name)
    if match is None:
        return None
    folder = match["folder"]
    # A path with a typo in it, as a rule, where its beginning is a directory here.
    if folder is not None and (Path(match["repo"]).parent.exists() or not stays_inside(folder)):
        return None
    return HubName(match["repo"], folder.rstrip("/") if folder else None, match["revision"])


def _of_url(url: str) -> HubName | None:
    parts = urlsplit(url)
    if parts.hostname not in (*_HOSTS, _own_host()):
        return None
    org, name, *rest = [unquote(part) for part in parts.path.strip("/").split("/")] + [""] * 2
    repo, inside = f"{org}/{name}", [part for part in rest if part]
    if not _HUB_ID.fullmatch(repo):
        return None
    if not inside or inside[0] not in _PAGES or len(inside) == 1:
        return HubName(repo)
    page, *inside = inside
    # A pull request is the only revision whose name has slashes that a URL keeps.
    n = 3 if inside[:2] == ["refs", "pr"] else 1
    revision, folder = "/".join(inside[:n]), inside[n:]
    if page != "tree":  # a file: its folder
        folder = folder[:-1]
    return HubName(repo, "/".join(folder) or None, revision)


def _own_host() -> str | None:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname


def as_named(name: str) -> str:
    """What messages and receipts call an input: a URL of the hub as the id that it stands for."""
    found = hub_name(name) if _URL.match(name) else None
    return str(found) if found else name


def folder_of(name: str, kind: type[LorafuseError], *, whole: bool = False) -> Folder:
    """The folder of that name, else that of the repository of that id, at one commit. `whole`: its files are
    fetched when they are opened, the large ones too, instead of read from afar. Raises `kind` where there is
    neither, StorageError."""
    folder = open_folder(name)
    if folder.is_there():
        return folder
    found = hub_name(name)
    if found is None or folder.exists(""):
        what = "is not a directory" if folder.exists("") else "no such directory"
        if scheme_of(name) not in ("", "http", "https", *FOLDERS):
            what += ", and no URL of an object store, as s3://, gs:// and az:// are"
        raise kind(f"{shown(without_secrets(name))}: {what}.")
    root = HubFolder(HubRepo.at(found.repo, found.revision, kind), whole=whole)
    if found.folder is None:
        return root
    inside = root.sub_folder(found.folder)
    if not inside.is_there():
        raise kind(f"{shown(root)}: has no folder {shown(found.folder)}.")
    return inside
