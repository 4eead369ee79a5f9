"""What a run says while it goes on: one dictionary for each event, all of which JSON can hold."""

from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict


class WarningEvent(TypedDict):
    """Something that the user should know and that stops nothing."""

    event: Literal["warning"]
    message: str
    job: NotRequired[str]  # of a batch, here and below


class PlannedFile(TypedDict):
    """An output file that is going to be made."""

    file: str
    nbytes: int
    n_weights: int


class PlannedSideFiles(TypedDict):
    """The files beside the weights: copied and made ones, and the folders that the tokenizer and the chat
    template come from, if there are any."""

    copied: list[str]
    made: list[str]
    tokenizer: str | None
    chat_template: str | None


class PlannedInput(TypedDict):
    """What is read, and what kind of checkpoint or adapter it is, in words."""

    role: Literal["checkpoint", "adapter"]
    path: str
    kind: str


class PlannedPart(TypedDict):
    """What one of several workers makes."""

    files: list[str]
    nbytes: int


class PartNumber(TypedDict):
    """A worker, counted from 0, and how many there are."""

    index: int
    of: int


class Disk(TypedDict):
    """What is going to be written, and what is free; None where nobody can tell."""

    needed_nbytes: int
    free_nbytes: int | None


class Estimate(TypedDict):
    """How long it may take, in seconds, by a probe of half a second: in all, to compute all tiles, and to
    hash and write the result."""

    wall_s: float
    compute_s: float
    write_s: float


class PlanEvent(TypedDict):
    """What is going to happen. `weights`: the number of weights by action; `decoded`: the number of elements
    by how they are stored, where they are quantized; `held_whole`: the weights that are held in memory whole;
    `notes`: what to ask oneself, though nothing is wrong;
    `parts`: what each of several workers makes, and `part`: which of them this is, whose files alone are in
    `shards`; `job`: of a batch. The fields after it are those of a dry run: the bytes of all weights in each
    format that the base allows; the inputs; the weights that change, by name and as a number for each kind of
    module; the memory limit; the disk; the time, None where nobody can tell; of `convert` the device, and why
    it was chosen where there was a choice. A verification says `nbytes` and no shards."""

    event: Literal["plan"]
    nbytes: int
    shards: list[PlannedFile]
    plan_id: NotRequired[str]
    n_workers: NotRequired[int]
    weights: NotRequired[dict[str, int]]
    decoded: NotRequired[dict[str, int]]
    adapter_tensors: NotRequired[dict[str, Any]]
    config_changes: NotRequired[dict[str, Any]]
    side_files: NotRequired[PlannedSideFiles]
    held_whole: NotRequired[list[str]]
    notes: NotRequired[list[str]]
    parts: NotRequired[list[PlannedPart]]
    part: NotRequired[PartNumber]
    job: NotRequired[str]
    formats: NotRequired[dict[str, int]]
    inputs: NotRequired[list[PlannedInput]]
    changes: NotRequired[dict[str, int]]
    changed: NotRequired[list[str]]
    memory_nbytes: NotRequired[int]
    disk: NotRequired[Disk]
    estimate: NotRequired[Estimate | None]
    device: NotRequired[str]
    push_to_hub: NotRequired[str]


class ResumedEvent(TypedDict):
    """What a run that was cut off had finished."""

    event: Literal["resumed"]
    n_shards: int
    nbytes: int
    job: NotRequired[str]


class ProgressEvent(TypedDict):
    """So many bytes more are written, or compared; fewer, where a worker's process ended and its task begins
    again."""

    event: Literal["progress"]
    nbytes: int
    job: NotRequired[str]


class FetchingEvent(TypedDict):
    """A merge waits for a file of the base, of which `nbytes` of `of_nbytes` are here; said once a second."""

    event: Literal["fetching"]
    file: str
    nbytes: int
    of_nbytes: int
    job: NotRequired[str]


class FetchedEvent(TypedDict):
    """A file of the base is on this machine, and is what the hub lists."""

    event: Literal["fetched"]
    file: str
    nbytes: int
    job: NotRequired[str]


class ShardEvent(TypedDict):
    """A file of weights is complete."""

    event: Literal["shard"]
    file: str
    nbytes: int
    sha256: str
    job: NotRequired[str]


class DoneEvent(TypedDict):
    """The result has its name. The figures of time are those of the receipt's `timing`. `url`: of the commit
    or pull request on the hub, and `kept_here`: whether OUT_DIR is there too."""

    event: Literal["done"]
    out_dir: str
    base_semantics: str
    update: dict[str, Any]
    wall_s: float
    compute_cpu_s: float
    stats_cpu_s: float
    read_s: float
    write_s: float
    peak_rss: int
    url: NotRequired[str]
    kept_here: NotRequired[bool]


class PartEvent(TypedDict):
    """A worker has made the files that fall to it, of a result that another call commits. `nbytes`: of their
    weights, also where an earlier run made them."""

    event: Literal["part"]
    out_dir: str
    index: int
    of: int
    n_shards: int
    nbytes: int
    wall_s: float
    peak_rss: int


class WorkerDid(TypedDict):
    """What a machine did of what an engine spread. `nbytes`: of weights that it wrote, or resumed."""

    host: str
    n_tasks: int
    nbytes: int
    busy_s: float


class WorkersEvent(TypedDict):
    """What an engine spread is done. `n_again`: tasks that were begun again, since a process had ended."""

    event: Literal["workers"]
    workers: list[WorkerDid]
    n_again: int


class PassEvent(TypedDict):
    """A pass over the base begins. `nbytes`: of weights that it is going to write, shared files once."""

    event: Literal["pass"]
    jobs: list[str]
    nbytes: int
    n_workers: int


class JobEvent(TypedDict):
    """What became of a job of a batch. `update`: how much of it was kept, and `url`, as in DoneEvent."""

    event: Literal["job"]
    job: str
    state: str
    out_dir: str
    error: NotRequired[str]
    exit_code: NotRequired[int]
    wall_s: NotRequired[float]
    nbytes: NotRequired[int]
    update: NotRequired[dict[str, Any]]
    url: NotRequired[str]


class ErrorEvent(TypedDict):
    """The command ends with an error, whose message stands on stderr, too. In Python it is an exception."""

    event: Literal["error"]
    message: str
    exit_code: int


class TotalEvent(TypedDict):
    """A batch is over. `states`: the number of jobs by what became of them; `nbytes`: of all files of the
    results that were made, or are planned. A dry run says disk and time, too."""

    event: Literal["total"]
    states: dict[str, int]
    nbytes: int
    wall_s: float
    disk: NotRequired[Disk]
    estimate: NotRequired[Estimate | None]


Event = (
    WarningEvent
    | PlanEvent
    | ResumedEvent
    | ProgressEvent
    | FetchingEvent
    | FetchedEvent
    | ShardEvent
    | DoneEvent
    | PartEvent
    | WorkersEvent
    | PassEvent
    | JobEvent
    | TotalEvent
)
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The sink of those who do not listen."""


def of_job(on_event: OnEvent, name: str) -> OnEvent:
    """A sink that adds the job's name to what it passes on."""

    def pass_on(event: Event) -> None:
        named: Any = {**event, "job": name}
        on_event(named)

    return pass_on


def warned_once(on_event: OnEvent) -> OnEvent:
    """A sink that leaves out the warnings that it has passed on already: workers that plan the same give the
    same."""
    said = set[tuple[str | None, str]]()

    def pass_on(event: Event) -> None:
        if event["event"] == "warning":
            key = (event.get("job"), event["message"])
            if key in said:
                return
            said.add(key)
        on_event(event)

    return pass_on


def warn_by(on_event: OnEvent) -> Callable[[str], None]:
    """Messages as warnings."""
    return lambda message: on_event({"event": "warning", "message": message})
