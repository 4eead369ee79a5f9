"""The jobs of a batch, by a path or by the URL of a folder of adapters or of a JSONL file."""

from contextlib import closing
from pathlib import Path

from lorafuse.batching.jobs import Job, left_out, parsed_lines, read_jobs
from lorafuse.errors import UsageError, shown, sized
from lorafuse.files.folder import Folder, read_fully
from lorafuse.files.folders import folder_and_file, has_scheme, open_folder
from lorafuse.files.hub import hub_name
from lorafuse.files.names import scheme_of, without_secrets

MOST_NBYTES = 100_000_000  # of a file of jobs, which is read whole


def listed_jobs(name: str) -> tuple[list[Job], list[str]]:
    """All jobs of JOBS, and what in it holds no adapter and is left out. Raises UsageError, StorageError."""
    if scheme_of(name) and not has_scheme(name):
        raise UsageError(
            f"{shown(without_secrets(name))}: is no URL of an object store, as s3://, gs:// and az:// are."
        )
    if not has_scheme(name):
        path = Path(name)
        return read_jobs(path), [str(path / folder) for folder in left_out(path)]
    folder = open_folder(name)
    if not folder.is_there():
        return _lines(name), []
    names = [sub for sub in folder.sub_folders() if not sub.startswith(".")]
    others = [sub for sub in names if _is_other(folder.sub_folder(sub))]
    jobs = [Job(str(folder.sub_folder(sub)), sub) for sub in names if sub not in others]
    if not jobs:
        raise UsageError(
            f"{shown(name)}: has no sub-directory{' with an adapter' if names else ''}; expected a directory "
            "of adapters, or a JSONL file with a job in each line."
        )
    return jobs, [str(folder.sub_folder(sub)) for sub in others]


def _is_other(folder: Folder) -> bool:
    """Whether a folder is plainly no adapter, such as logs/."""
    return not folder.names("adapter*") and not folder.names("*/adapter*")


def _lines(name: str) -> list[Job]:
    folder, file = folder_and_file(name)
    try:
        opened = folder.open(file)
    except FileNotFoundError:
        raise UsageError(f"{shown(name)}: no such file or directory.") from None
    with closing(opened):
        if opened.facts.nbytes > MOST_NBYTES:
            raise UsageError(
                f"{shown(name)}: has {sized(opened.facts.nbytes)}; a file of jobs may have "
                f"{sized(MOST_NBYTES)} at most. Divide it."
            )
        lines = bytes(read_fully(opened, 0, opened.facts.nbytes)).splitlines()
    jobs = parsed_lines(lines, name, lambda adapter: _located(adapter, folder))
    if not jobs:
        raise UsageError(
            f"{shown(name)}: has no line; expected a directory of adapters, or a JSONL file with a job in "
            "each line."
        )
    return jobs


def _located(adapter: str, folder: Folder) -> str:
    """A relative path starts at the file. What is no folder there may be a hub id."""
    if scheme_of(adapter) or adapter.startswith("/"):
        return adapter
    beside = folder.sub_folder(adapter)
    return adapter if hub_name(adapter) and not beside.is_there() else str(beside)
