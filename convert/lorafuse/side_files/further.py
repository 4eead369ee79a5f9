"""What has to be fetched of a hub repository once its first files tell that it is needed."""

import glob

from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.safetensors_file import FormatError
from lorafuse.side_files.choose import code_in
from lorafuse.side_files.modules import module_folders
from lorafuse.side_files.remote_code import WITH_AUTO_MAP, missing_code
from lorafuse.side_files.sets import LIKE_WEIGHTS


def further_files(folder: Folder) -> list[str]:
    """Patterns of the files that `folder` lacks: sub-folders that modules.json names, the code of an
    auto_map, and what looks like weights but is needed. Raises CheckpointError for a modules.json that
    cannot be read."""
    patterns = [f"{glob.escape(name)}/*" for name in module_folders(folder) if not folder.exists(name)]
    for name in ("config.json", *WITH_AUTO_MAP):
        patterns += missing_code(folder, code_in(folder, name))
    try:
        model_type = read_json_dict(folder, "config.json").get("model_type")
    except (ValueError, FormatError, OSError):
        model_type = None
    needed = LIKE_WEIGHTS.get(str(model_type), ())
    return [*patterns, *(name for name in needed if not folder.exists(name))]
