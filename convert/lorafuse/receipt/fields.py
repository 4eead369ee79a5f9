"""What stands in a receipt: docs/receipt.md says what each field means. Needs no torch."""

from typing import Any, Literal, NotRequired, TypedDict

SCHEMA = 1


class Tool(TypedDict):
    """What made the result. `kernel`: the level of the compiled kernel, or "none"; `device`: `cpu`, `cuda` or
    `cuda:N`."""

    name: str
    version: str
    torch: str
    python: str
    kernel: str
    device: str


class InputEntry(TypedDict):
    """A file that was read. `weight`: of its adapter, where there were several. `commit`: of the repository
    on the hub that it is from."""

    role: Literal["checkpoint", "adapter"]
    path: str
    size: int
    sha256: str
    weight: NotRequired[float]
    commit: NotRequired[str]


class OutputEntry(TypedDict):
    """A file that was written."""

    file: str
    size: int
    sha256: str


class StoredSpec(TypedDict):
    """A stored tensor: its dtype in torch's terms, and its shape."""

    dtype: str
    shape: list[int]


class TensorEntry(TypedDict):
    """What became of a weight. The measures are those of a merged weight, None where a ratio has no meaning;
    `stored`: the tensors that it is stored as, unless that is one tensor of its own name."""

    action: str
    dtype: str
    shape: list[int]
    delta_norm: NotRequired[float | None]
    delta_rel: NotRequired[float | None]
    kept: NotRequired[float | None]
    noise: NotRequired[float | None]
    clipped: NotRequired[float]
    changed: NotRequired[float | None]
    rounding: NotRequired[str]
    rank: NotRequired[int]
    scale: NotRequired[float]
    updates: NotRequired[list[dict[str, Any]]]
    stored: NotRequired[dict[str, StoredSpec]]
    source: NotRequired[str]


class AdapterTensors(TypedDict):
    """The adapter's tensors: names of those that are used, name → reason of the ignored."""

    used: list[str]
    ignored: dict[str, str]


class TimingEntry(TypedDict):
    """Seconds."""

    wall_s: float
    compute_cpu_s: float
    stats_cpu_s: float
    read_s: float
    write_s: float


class Receipt(TypedDict):
    """The whole receipt. `settings`: `Settings.that_decide_bytes`; `dropped`: tensors of the checkpoint that
    are no weights, name → reason; `peak_rss` in bytes."""

    schema: int
    tool: Tool
    settings: dict[str, Any]
    plan_id: str
    inputs: list[InputEntry]
    outputs: list[OutputEntry]
    tensors: dict[str, TensorEntry]
    adapter_tensors: AdapterTensors
    base_semantics: str
    timing: TimingEntry
    peak_rss: int
    dropped: NotRequired[dict[str, str]]
