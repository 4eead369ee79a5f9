"""Everything in OUT_DIR beside weights and receipt: config.json, the index, generation config, tokenizer,
processor, remote code.

Files are copied by a fixed list of names, never as links. The tokenizer's files are one set: the adapter's
when it brings a vocabulary, else the checkpoint's; a mixture of both is a tokenizer that never existed.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from lorafuse.errors import CheckpointError
from lorafuse.files.folder import Folder, stream
from lorafuse.files.names import INDEX
from lorafuse.files.tensors import FLOATS
from lorafuse.planning.plan import Plan

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
)
TOKENIZER = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "target.spm",
    "tokenizer.model.v3",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
)
GENERATION = "generation_config.json"  # not for a model with another head
ALWAYS = (GENERATION, "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
MAX_NBYTES = 1_000_000_000
READ_NBYTES = 1 << 20


class TakesFiles(Protocol):
    """Where small files go: an OutDir, or what compares them."""

    def put(self, file: str, chunks: Iterable[bytes]) -> None: ...


def write_sidecars(
    plan: Plan,
    ckpt: Folder,
    ckpt_config: dict[str, Any],
    adapter_folders: Sequence[Folder],
    out_dir: TakesFiles,
) -> None:
    """Write them all. `adapter_folders` are where the adapter's may be, the first first."""
    for folder, name in copied_files(plan, ckpt, adapter_folders):
        out_dir.put(name, _chunks(folder, name))
    write_json(out_dir, "config.json", output_config(ckpt_config, plan.config_changes, plan.stored_config))
    if len(plan.shards) > 1:
        write_json(out_dir, INDEX, index_of(plan))


def copied_files(plan: Plan, ckpt: Folder, adapter_folders: Sequence[Folder]) -> Iterator[tuple[Folder, str]]:
    """(folder, name in it) of each file that is copied as it is."""
    tokenizer_folder = _first_with(VOCABULARIES, adapter_folders) or ckpt
    processor_folder = _first_with(PROCESSOR, adapter_folders) or ckpt
    always = [
        pattern
        for pattern in ALWAYS
        if not ("architectures" in plan.config_changes and pattern == GENERATION)
    ]
    for folder, patterns in ((ckpt, always), (tokenizer_folder, TOKENIZER), (processor_folder, PROCESSOR)):
        for pattern in patterns:
            yield from ((folder, name) for name in folder.names(pattern))


def _first_with(names: Sequence[str], folders: Sequence[Folder]) -> Folder | None:
    return next((folder for folder in folders if any(folder.exists(name) for name in names)), None)


def output_config(config: dict[str, Any], changes: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's config without quantization and with `changes`, each set where the config has the
    field, else at the top; then what readers need for the tensors as they are `stored`."""
    result = {name: _without_quantization(value) for name, value in _without_quantization(config).items()}
    text = result.get("text_config") if isinstance(result.get("text_config"), dict) else None
    if "dtype" in changes:
        _set_dtype(result, changes["dtype"])
    for name, value in changes.items():
        if name != "dtype":
            holders = [part for part in (result, text) if part is not None and name in part]
            for part in holders or [result]:
                part[name] = value
    return result | stored


def _without_quantization(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    drop = ("quantization_config", "compression_config", "_load_in_4bit", "_load_in_8bit")
    return {name: value for name, value in part.items() if name not in drop}


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
    out_dir.put(file, [(json.dumps(value, indent=2) + "\n").encode("ascii")])


def _chunks(folder: Folder, name: str) -> Iterator[bytes]:
    """The contents of a file of a reasonable size. Raises CheckpointError for a larger one."""
    file = folder.open(name, inside=True)
    with stream(file) as f:
        nbytes = file.facts.nbytes
        if nbytes > MAX_NBYTES:
            raise CheckpointError(f"{folder / name}: has {nbytes} bytes, too many for a file of its kind.")
        while chunk := f.read(READ_NBYTES):
            yield chunk
