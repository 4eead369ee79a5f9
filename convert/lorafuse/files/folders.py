"""The kinds of folders, by the scheme of the URL that names them. A kind is added by one file, and one word
here."""

from collections.abc import Callable

from lorafuse.files.cloud_url import SCHEMES
from lorafuse.files.folder import Folder
from lorafuse.files.local_folder import LocalFolder


def _in_store(name: str) -> Folder:
    """Imported when it is asked for: of small limits on memory it would be a part."""
    from lorafuse.files.cloud_folder import CloudFolder

    return CloudFolder.at(name)


FOLDERS: dict[str, Callable[[str], Folder]] = {"": LocalFolder.at, **dict.fromkeys(SCHEMES, _in_store)}


PASSING = "memory"


def has_scheme(name: str) -> bool:
    """Whether a name is a URL of a kind that is known here, not a path or a hub id."""
    scheme, separator, _ = name.partition("://")
    return bool(scheme and separator) and scheme in FOLDERS


def is_passing(name: str) -> bool:
    """Whether a name is that of obstore's store in memory, which lasts as long as its process, and which no
    other sees."""
    return name.startswith(f"{PASSING}://") and FOLDERS[PASSING] is _in_store


def open_folder(name: str) -> Folder:
    """The folder of that name, which may not be there: a URL of a known kind, else a path."""
    return FOLDERS[name.partition("://")[0] if has_scheme(name) else ""](name)


def folder_and_file(name: str) -> tuple[Folder, str]:
    """The folder and the name in it of a file that a user names by a path or a URL."""
    folder, slash, file = name.rpartition("/")
    return open_folder(folder + slash or "."), file
