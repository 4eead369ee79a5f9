"""Everything in OUT_DIR beside weights and receipt: config.json, the index, and the side files that the plan
lists. These are copied as they are, never as links."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from lorafuse.files.folder import Folder, stream
from lorafuse.files.names import INDEX
from lorafuse.files.tensors import FLOATS
from lorafuse.files.uncollected import uncollected
from lorafuse.formats.not_converted import announces
from lorafuse.planning.plan import Plan
from lorafuse.side_files.checked import refuse_large
from lorafuse.side_files.older_readers import with_older_fields

READ_NBYTES = 1 << 20
JSON_NBYTES = 1 << 16


class TakesFiles(Protocol):
    """Where small files go: an OutDir, or what compares them."""

    def put(self, file: str, chunks: Iterable[bytes]) -> None: ...


@uncollected()  # what the index needed is given back before the receipt is made
def write_sidecars(plan: Plan, ckpt_config: dict[str, Any], out_dir: TakesFiles) -> None:
    """Write them all."""
    for folder, name in copied_files(plan):
        out_dir.put(name, _chunks(folder, name))
    for name, contents in plan.side_files.made:
        out_dir.put(name, [contents])
    write_json(out_dir, "config.json", output_config(ckpt_config, plan.config_changes, plan.stored_config))
    if len(plan.shards) > 1:
        write_json(out_dir, INDEX, index_of(plan))


def copied_files(plan: Plan) -> Sequence[tuple[Folder, str]]:
    """(folder, name in it) of each file that is copied as it is."""
    return plan.side_files.copied


def output_config(
    config: dict[str, Any], changes: dict[str, Any], stored: Mapping[str, Any]
) -> dict[str, Any]:
    """The checkpoint's config without quantization and with `changes`, each set where the config has the
    field, else at the top, and a path with dots in that section; then what readers need for the tensors as
    they are `stored`, and the fields that older readers look for."""
    result = _without_quantization(config)
    text = result.get("text_config") if isinstance(result.get("text_config"), dict) else None
    if "dtype" in changes:
        _set_dtype(result, changes["dtype"])
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        if section:
            _in_section(result, section.split("."))[name] = value
        elif name != "dtype":
            holders = [part for part in (result, text) if part is not None and name in part]
            for part in holders or [result]:
                part[name] = value
    for name, value in stored.items():
        inner = result.get(name)
        inside = isinstance(inner, dict) and not announces(name, value)
        result[name] = inner | value if inside else value
    return with_older_fields(result)


def _in_section(config: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The section of a config, which may be changed; made where it is missing."""
    part = config
    for name in path:
        inner = part.get(name)
        part[name] = dict(inner) if isinstance(inner, dict) else {}
        part = part[name]
    return part


def _without_quantization(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {name: _without_quantization(v) for name, v in part.items() if not announces(name, v)}


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Update `dtype` and `torch_dtype` where they stand, in sub-configs too. v4 writes and reads torch_dtype,
    v5 reads both."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        for name in ("dtype", "torch_dtype"):
            if part.get(name) is not None:
                part[name] = dtype
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        config["torch_dtype"] = dtype


def index_of(plan: Plan) -> dict[str, Any]:
    """The index as transformers writes it: total_size counts tensor bytes, headers not."""
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    n_parameters = sum(step.spec.numel for step in plan.steps if step.spec.dtype in FLOATS)
    return {
        "metadata": {"total_parameters": n_parameters, "total_size": plan.nbytes},
        "weight_map": dict(sorted(weight_map.items())),
    }


def write_json(out_dir: TakesFiles, file: str, value: Any) -> None:
    """Pretty-printed JSON. As transformers writes it: ASCII, so that any path or string can be
    spelled, and with Infinity and NaN, which some configs hold (Mamba's time_step_limit)."""
    out_dir.put(file, _json_chunks(value))


def json_bytes(value: Any) -> bytes:
    """The same, at once."""
    return b"".join(_json_chunks(value))


def _json_chunks(value: Any) -> Iterator[bytes]:
    """The file in pieces: the receipt of a model of many experts has tens of megabytes."""
    piece = io.StringIO()
    for text in json.JSONEncoder(indent=2).iterencode(value):
        piece.write(text)
        if piece.tell() >= JSON_NBYTES:
            yield piece.getvalue().encode("ascii")
            piece = io.StringIO()
    yield (piece.getvalue() + "\n").encode("ascii")


def _chunks(folder: Folder, name: str) -> Iterator[bytes]:
    """The contents of a file of a reasonable size. Raises CheckpointError for a larger one."""
    file = folder.open(name, inside=True)
    with stream(file) as f:
        refuse_large(folder, name, file.facts.nbytes)
        while chunk := f.read(READ_NBYTES):
            yield chunk
