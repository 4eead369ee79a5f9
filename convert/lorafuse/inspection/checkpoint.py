"""A checkpoint by its headers, its config and the small tensors of its codecs: which model, how its weights
are stored, and what keeps it from being merged into. Of a checkpoint on the hub only config and headers are
read, which do not tell everything."""

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from lorafuse.codecs import Scheme, Sources, claims, open_weights, refuse_unknown_quantization
from lorafuse.errors import CheckpointError
from lorafuse.files.checkpoint import CONFIG_TYPES, Checkpoint, weights_of
from lorafuse.files.folder import Folder
from lorafuse.files.hub_folder import HubFolder
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.safetensors_file import FormatError
from lorafuse.files.said_beside import CONFIG, with_said_beside
from lorafuse.files.stores import ShardedStore
from lorafuse.files.tensors import DTYPES, FLOATS, TensorInfo
from lorafuse.naming import Names


@dataclass(frozen=True)
class Weight:
    """One weight: how it is stored, in how many bytes, and how many elements it has. The dtypes, those that
    it decodes to and that `--dtype auto` writes, are None where headers do not tell them."""

    scheme: Scheme
    numel: int
    nbytes: int
    dtype: str | None
    out_dtype: str | None


def inspect_checkpoint(folder: Folder, name: str) -> dict[str, Any]:
    """Of a folder. Raises CheckpointError where not even the headers can be read, StorageError."""
    try:
        with closing(Checkpoint(folder)) as ckpt:
            return _facts(
                name, ckpt.config, ckpt.tensors, [shard.name for shard in ckpt.shards], open_weights(ckpt), []
            )
    except CheckpointError as e:
        problem = e
    try:
        store = ShardedStore(folder, weights_of(folder))
    except (CheckpointError, FormatError, ValueError, OSError):
        raise problem from None
    with closing(store):
        config, _ = _config(folder, store)
        return _facts(name, config, store.tensors, [shard.name for shard in store.shards], {}, [str(problem)])


def inspect_remote(folder: Folder, name: str) -> dict[str, Any]:
    """Of a hub id, of which config and headers are read; all that a directory tells, where the files were
    fetched before. Raises CheckpointError, StorageError."""
    try:
        store = ShardedStore(folder, weights_of(folder))
    except (FormatError, ValueError) as e:
        raise CheckpointError(str(e)) from None
    except FileNotFoundError as e:
        raise CheckpointError(f"{e.filename}: not found; {folder} is no complete checkpoint.") from None
    problems = []
    with closing(store):
        config, said_in = _config(folder, store)
        if isinstance(folder, HubFolder) and all(folder.is_here(shard.name) for shard in store.shards):
            with suppress(CheckpointError):
                return inspect_checkpoint(folder, name)
        try:
            refuse_unknown_quantization(config, folder, store.tensors, said_in)
        except CheckpointError as e:
            problems.append(str(e))
        return _facts(name, config, store.tensors, [shard.name for shard in store.shards], {}, problems)


def _config(folder: Folder, store: ShardedStore) -> tuple[dict[str, Any], str]:
    """The fields that are of the right type, of a config that may be broken or missing, and the file that
    says how weights are stored."""
    config: dict[str, Any] = {}
    files: tuple[str, ...] = (CONFIG,)
    with suppress(FormatError, OSError, ValueError):
        config = read_json_dict(folder, CONFIG)
        config, files = with_said_beside(folder, config, store.tensors)
    good = {
        name: value for name, value in config.items() if isinstance(value, CONFIG_TYPES.get(name, object))
    }
    return good, folder / files[-1]


def _facts(
    name: str,
    config: dict[str, Any],
    stored: Mapping[str, TensorInfo],
    files: list[str],
    opened: Mapping[str, Sources],
    problems: list[str],
) -> dict[str, Any]:
    weights = list(_weights(stored, config, opened))
    # What is decoded has no shape here without its sources; embeddings, the only ones that are asked for, are
    # rarely quantized.
    dense = {
        weight: stored[names[0]]
        for codec, weight, names in claims(stored, config)
        if codec.scheme(names, stored, config).kind == "dense"
    }
    names = Names({**dense, **opened}, config)  # type: ignore[dict-item]  # of a weight, only its spec is looked at
    embed = opened.get(names.embed or "") or dense.get(names.embed or "")
    out_dtypes = Counter(
        weight.out_dtype for weight in weights if weight.out_dtype is None or weight.out_dtype in FLOATS
    )
    return {
        "kind": "checkpoint",
        "path": name,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "vocab_size": embed.spec.shape[0] if embed else None,
        "tied": bool(names.tied) if embed else None,
        "n_weights": len(weights),
        "n_parameters": sum(
            weight.numel for weight in weights if weight.dtype is None or weight.dtype in FLOATS
        ),
        "nbytes": sum(info.spec.nbytes for info in stored.values()),
        "files": [posixpath.basename(file) for file in files],
        "storage": _storage(weights),
        "auto_dtypes": None
        if None in out_dtypes
        else {DTYPES[str(dtype)][1]: n for dtype, n in out_dtypes.most_common()},
        "problems": problems,
    }


def _weights(
    stored: Mapping[str, TensorInfo], config: dict[str, Any], opened: Mapping[str, Sources]
) -> Iterator[Weight]:
    """Those that were opened, which are all, or else what the headers tell of each."""
    for sources in opened.values():
        nbytes = sum(stored[tensor].spec.nbytes for tensor in sources.names)
        yield Weight(sources.scheme, sources.spec.numel, nbytes, sources.spec.dtype, sources.out_dtype)
    for codec, _, names in () if opened else claims(stored, config):
        scheme, spec = codec.scheme(names, stored, config), stored[names[0]].spec
        nbytes = sum(stored[tensor].spec.nbytes for tensor in names)
        dtype = spec.dtype if scheme.kind == "dense" else None
        yield Weight(scheme, scheme.numel_of(spec), nbytes, dtype, dtype)


def _storage(weights: list[Weight]) -> list[dict[str, Any]]:
    """Weights of one scheme and dtype together, the most bytes first."""
    groups: dict[tuple[Scheme, str | None], list[Weight]] = {}
    for weight in weights:
        groups.setdefault((weight.scheme, weight.dtype), []).append(weight)
    rows = [
        {
            "scheme": str(scheme),
            "quantized": None if scheme.kind == "dense" else scheme.kind,
            "double_quant": scheme.double_quant,
            "bits": scheme.bits or None,
            "blocksize": scheme.blocksize or None,
            "dtype": DTYPES[dtype][1] if dtype else None,
            "n_weights": len(group),
            "n_parameters": sum(weight.numel for weight in group),
            "nbytes": sum(weight.nbytes for weight in group),
        }
        for (scheme, dtype), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["nbytes"])
