"""The sub-folders that sentence-transformers' modules.json names: pooling, dense layers, their weights."""

import glob
import json
import posixpath
import re
from collections.abc import Iterator

from lorafuse.errors import CheckpointError, shown
from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import MAX_NBYTES, read_limited
from lorafuse.files.kinds import HIDDEN, matches
from lorafuse.files.names import stays_inside
from lorafuse.side_files.checked import check_side_file
from lorafuse.side_files.sets import MODULES

MAX_DEPTH = 8  # a link to a folder above it has no end


def module_folders(folder: Folder) -> list[str]:
    """The names of the sub-folders; empty where there is no modules.json. A module without files has no
    folder. Raises CheckpointError for a name that leads out of `folder`."""
    if not folder.exists(MODULES):
        return []
    check_side_file(folder, MODULES)
    try:
        entries = json.loads(read_limited(folder, MODULES, MAX_NBYTES))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{folder / MODULES}: is not valid JSON: {shown(e)}.") from None
    if not isinstance(entries, list):
        # Names of sentence-transformers' own making: 1_Pooling, 2_Dense.
        return [name for name in folder.sub_folders() if re.fullmatch(r"\d+_\w+", name)]
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    names = dict.fromkeys(posixpath.normpath(path) for path in paths if isinstance(path, str))
    for name in names:
        if not stays_inside(name):
            raise CheckpointError(f"{folder / MODULES}: names {shown(name)}, which is no folder beside it.")
    return [name for name in names if name != "."]


def files_below(root: Folder, name: str, depth: int = 0) -> Iterator[str]:
    """The files in the sub-folder `name`, at any depth, but hidden files. Raises CheckpointError for folders
    in folders without end."""
    if depth == MAX_DEPTH:
        raise CheckpointError(f"{root / name}: is nested too deeply.")
    yield from (file for file in root.names(f"{glob.escape(name)}/*") if not matches(file, HIDDEN))
    for inner in root.sub_folder(name).sub_folders():
        if not matches(inner, HIDDEN):
            yield from files_below(root, f"{name}/{inner}", depth + 1)
