"""The jobs of a batch: which adapters, under which names, and which of them a worker takes. Nothing here
knows how a job is done.

JOBS is a directory whose sub-directories are adapters, or a JSONL file with a {"adapter", "name"?, "scale"?,
"dtype"?, "format"?, "repo"?} in each line.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from lorafuse.batching.places import around, folders_there, inside
from lorafuse.errors import LorafuseError, OutDirError, UsageError, listed, shown
from lorafuse.files.folder import Folder
from lorafuse.files.hub import hub_name
from lorafuse.files.local_folder import as_typed
from lorafuse.files.names import scheme_of, without_secrets
from lorafuse.outdir.apart import places_of
from lorafuse.settings import DTYPE_CHOICES, FORMAT_CHOICES, Settings, dtype_named

KEYS = ("adapter", "name", "scale", "dtype", "format", "repo")
MAX_NAME_NBYTES = 200  # a directory entry has 255, and the staging directory's name is longer
# What tells a worker its number, and how many there are.
SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
KUBERNETES = ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter and the name of its result. `scale`, `dtype`, `format` and `repo`, where the result goes on
    the hub, take the place of the call's, where they are given."""

    adapter: str  # a directory or a hub id
    name: str
    scale: float | None = None
    dtype: str | None = None
    format: str | None = None
    repo: str | None = None

    def settings(self, of_call: Settings) -> Settings:
        """The settings of a single run that makes the same."""
        scale = of_call.adapter_scale if self.scale is None else self.scale
        return replace(
            of_call,
            adapter_scale=scale,
            dtype=self.dtype or of_call.dtype,
            format=self.format or of_call.format,
            keep_dense=() if self.format == "dense" else of_call.keep_dense,
            rounding=None if self.format == "dense" else of_call.rounding,
        )


@dataclass(slots=True)
class JobState:
    """What became of a job: "done", "skipped" (its result was there already), "failed" with an error, or in a
    dry run "planned"."""

    name: str
    state: str
    out_dir: Path | str  # a URL is no path
    error: LorafuseError | None = None


def read_jobs(path: Path) -> list[Job]:
    """All jobs: sub-directories by name, lines in their order. Raises UsageError, with the line's number."""
    if path.is_dir():
        folders = [folder for folder in sorted(path.iterdir()) if _is_job(folder)]
        jobs = [Job(str(folder), folder.name) for folder in folders if not _is_other(folder)]
        empty = f"has no sub-directory{' with an adapter' if folders else ''}"
        if (path / "adapter_config.json").exists():
            empty += ", but is an adapter itself, which `lorafuse convert` merges"
    else:
        jobs = _read_lines(path)
        empty = "has no line"
    if not jobs:
        raise UsageError(
            f"{shown(path)}: {empty}; expected a directory of adapters, or a JSONL file with a job in each "
            "line."
        )
    return jobs


def _is_job(path: Path) -> bool:
    """Directories are jobs, whatever they hold, and links that lead nowhere: what is no adapter is reported.
    What is hidden is other programs'."""
    leads_nowhere = path.is_symlink() and not path.exists()
    return not path.name.startswith(".") and (path.is_dir() or leads_nowhere)


def left_out(path: Path) -> list[str]:
    """The names of the sub-directories that are no jobs: they hold something, and no file of an adapter."""
    if not path.is_dir():
        return []
    return [folder.name for folder in sorted(path.iterdir()) if _is_job(folder) and _is_other(folder)]


def _is_other(folder: Path) -> bool:
    """Whether a directory is plainly no adapter, such as logs/. An empty one may have lost its adapter."""
    try:
        inside = list(folder.iterdir())
        adapters = [*folder.glob("adapter*"), *folder.glob("*/adapter*")]
    except OSError:  # the job's own error, later
        return False
    return bool(inside) and not adapters


def _read_lines(path: Path) -> list[Job]:
    if not path.is_file():
        raise UsageError(
            f"{shown(path)}: {'is no regular file' if path.exists() else 'no such file or directory'}."
        )
    with open(path, "rb") as f:
        return parsed_lines(f, path, lambda adapter: _located(as_typed(adapter), path.parent))


def parsed_lines(lines: Iterable[bytes], file: object, locate: Callable[[str], str]) -> list[Job]:
    """Of a JSONL `file`; `locate` says where an adapter lies. Raises UsageError, with the line's number."""
    jobs: list[Job] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = _parse(line, locate)
            if job.name in line_of:
                raise ValueError(f"the name {shown(job.name)} is also that of line {line_of[job.name]}")
        except (ValueError, RecursionError, UsageError) as e:
            raise UsageError(
                f"{shown(file)}, line {number}: {shown(e).rstrip('.') or type(e).__name__}."
            ) from None
        line_of[job.name] = number
        jobs.append(job)
    return jobs


def _parse(line: bytes, locate: Callable[[str], str]) -> Job:
    """One line. Raises ValueError."""
    try:
        entry = json.loads(line)
    except ValueError as e:
        raise ValueError(f"is not valid JSON: {e}") from None
    if not isinstance(entry, dict) or "adapter" not in entry:
        raise ValueError('is not an object with "adapter"')
    if entry.keys() - set(KEYS):
        raise ValueError(
            f"has the unknown key {listed(sorted(entry.keys() - set(KEYS)))}; known are {listed(KEYS)}"
        )
    adapter, name, scale, dtype, form, repo = (entry.get(key) for key in KEYS)
    if not isinstance(adapter, str) or not adapter or "\0" in adapter:
        raise ValueError(f"the adapter is {shown(adapter)}; expected a directory or a hub id")
    if not (scale is None or _is_finite(scale)):
        raise ValueError(f"the scale is {shown(repr(scale), 50)}; expected a finite number")
    dtype = dtype_named(dtype)
    if dtype is not None and dtype not in DTYPE_CHOICES:
        raise ValueError(f"the dtype is {shown(dtype)}; expected one of {', '.join(DTYPE_CHOICES)}")
    if form is not None and form not in FORMAT_CHOICES:
        raise ValueError(f"the format is {shown(form)}; expected one of {', '.join(FORMAT_CHOICES)}")
    if repo is not None and not isinstance(repo, str):
        raise ValueError(f"the repo is {shown(repo)}; expected a repository on the hub")
    located = locate(adapter)
    named = _checked_name(_name_of(without_secrets(located)) if "name" not in entry else name)
    return Job(located, named, None if scale is None else float(scale), dtype, form, repo)


def _name_of(adapter: str) -> str:
    """The last part of a path or a hub id, without a revision."""
    hub = hub_name(adapter)
    return PurePath(os.path.normpath(str(hub).partition("@")[0] if hub else adapter)).name


def _is_finite(scale: object) -> bool:
    try:
        return isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _located(adapter: str, folder: Path) -> str:
    """A relative path starts at the file. What is no directory there may be a hub id."""
    if scheme_of(adapter):
        return adapter
    beside = str(folder / adapter)
    # A directory here, but not there, is neither. os.path.isdir: a path that is too long or may not be looked
    # at is the job's own error, later.
    hub = hub_name(adapter)
    is_path = os.path.isdir(beside) or os.path.isdir(adapter) or hub is None
    # As for a name on the command line: a folder of a repository, unless a directory is called as its owner.
    in_directory = hub and hub.folder and os.path.isdir(folder / hub.repo.partition("/")[0])
    return beside if is_path or in_directory else adapter


def _checked_name(name: Any) -> str:
    """The name of a result is one visible directory in OUT_ROOT. Raises ValueError."""
    plain = (
        isinstance(name, str)
        and name.isprintable()
        and not set(name) & set("/\\")
        and not name.startswith(".")
    )
    if not plain or not 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_NBYTES:
        raise ValueError(
            f"the name is {shown(name)!r}; expected the name of a directory in OUT_ROOT, not hidden and no "
            "path"
        )
    return str(name)


def refuse_overlap(jobs: Sequence[Job], out_root: Folder, ckpt: Folder) -> None:
    """Raises OutDirError when a result would take the place of an input: OUT_ROOT is, or lies in, the
    checkpoint, or one job's name is where the adapter or the checkpoint of another lies."""
    if out_root.exists("") and not out_root.is_there():
        raise OutDirError(f"{shown(out_root)}: exists and is not a directory.")
    if ckpt.is_there() and around(ckpt)[0] in around(out_root):
        raise OutDirError(
            f"{shown(out_root)}: is or lies inside the input {shown(ckpt)}; choose another directory."
        )
    name_of = {place: job.name for job in jobs for place in inside(out_root.sub_folder(job.name))}
    for folder in (ckpt, *folders_there(job.adapter for job in jobs)):
        places = places_of(folder.local_path) if folder.local_path else around(folder)
        name = next((name_of[place] for place in places if place in name_of), None)
        if name is not None:
            raise OutDirError(
                f"{shown(out_root)}: the result {shown(name)} would take the place of the input "
                f"{shown(folder.local_path or folder)}."
            )


def share_of(jobs: Sequence[Job], index: int, of: int) -> list[Job]:
    """The jobs of worker `index` (from 0) of `of`: every job is in exactly one share, and shares differ by
    one job at most."""
    return list(jobs[index::of])


def checked_share(index: int | None, of: int | None, environ: Mapping[str, str]) -> tuple[int, int]:
    """Which share a call takes: the one asked for, else that of a Slurm array or a Kubernetes Indexed Job,
    else all. Raises UsageError."""
    if (index is None) != (of is None):
        raise UsageError("--index and --of go together: --index I --of N takes share I (from 0) of N.")
    if index is None or of is None:
        index, of = _slurm(environ) or _kubernetes(environ) or (0, 1)
    if not 0 <= index < of:
        raise UsageError(
            f"--index is {index} of {of}; expected 0 to {of - 1}."
            if of > 0
            else f"--of is {of}; expected at least 1."
        )
    return index, of


def _slurm(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Arrays may start anywhere and go in steps. For a list with gaps the index of a task cannot be
    computed."""
    if SLURM[0] not in environ:
        return None
    task, count = (_number(environ, name) for name in SLURM)
    first, step = _number(environ, "SLURM_ARRAY_TASK_MIN", 0), _number(environ, "SLURM_ARRAY_TASK_STEP", 1)
    last = _number(environ, "SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
    if step < 1 or (task - first) % step or last != first + (count - 1) * step:
        raise UsageError(
            "The Slurm array is a list with holes, which does not tell a task's share; give --index and --of."
        )
    return (task - first) // step, count


def _kubernetes(environ: Mapping[str, str]) -> tuple[int, int] | None:
    if KUBERNETES[0] not in environ:
        return None
    return _number(environ, KUBERNETES[0]), _number(environ, KUBERNETES[1])


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"{name} is {'not set' if text is None else shown(text)}; expected a number, or give --index and "
            "--of."
        )
    return int(text)
