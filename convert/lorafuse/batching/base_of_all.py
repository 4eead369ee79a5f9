"""The base of a batch, where the user leaves it to the adapters to name it."""

from collections.abc import Sequence

from lorafuse.adapters.reading.directory import CONFIG, base_name_of
from lorafuse.batching.jobs import Job
from lorafuse.errors import LorafuseError, UsageError, listed, shown
from lorafuse.events import ignore
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.safetensors_file import FormatError
from lorafuse.inputs.located import located_adapter, named_base

NO_BASE = "no base"


def base_of_all(jobs: Sequence[Job]) -> str:
    """The base, with its revision, that the adapters of all jobs name. An adapter that cannot be read is the
    error of its own job, later. Raises UsageError where they do not name the same one, AdapterError for one
    that is nowhere."""
    names: dict[str, list[str]] = {}  # base → jobs
    for job in jobs:
        try:
            folder = located_adapter(job.adapter, 1.0, None, ignore).folder
            config = read_json_dict(folder, CONFIG)
        except (LorafuseError, OSError, FormatError, ValueError):
            continue
        named = NO_BASE if base_name_of(config) is None else named_base(folder, config)
        names.setdefault(named, []).append(job.name)
    if len(names) == 1 and NO_BASE not in names:
        return next(iter(names))
    told = "; ".join(f"{shown(base)} ({listed(of)})" for base, of in names.items())
    raise UsageError(
        f"The adapters do not name one base for all: {told or 'none of them can be read'}. Give the "
        "checkpoint."
    )
