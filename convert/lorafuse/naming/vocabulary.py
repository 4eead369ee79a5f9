"""Do the sizes of a model's vocabulary agree: the rows of its embeddings, and vocab_size in its config?"""

from collections.abc import Iterator, Mapping
from typing import Any

from lorafuse.files.tensors import FLOATS, TensorInfo
from lorafuse.naming.names import Names


def n_tokens(shape: tuple[int, ...]) -> int:
    """Of an embedding, or of a bias of logits, which may be [1, n]."""
    return shape[-1] if shape[0] == 1 else shape[0]


def conflict_in(stored: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    """`size_conflict` of the tensors of a directory. Quantized embeddings, whose shapes are not those of the
    weights, are not compared."""
    plain = {name: info for name, info in stored.items() if info.spec.dtype in FLOATS and info.spec.shape}
    names = Names(plain, dict(config))  # type: ignore[arg-type]  # of a weight, only its spec is looked at
    return size_conflict(names, {name: n_tokens(info.spec.shape) for name, info in plain.items()}, config)


def size_conflict(names: Names, n_rows: Mapping[str, int], config: Mapping[str, Any]) -> str | None:
    """What of a model's vocabulary has another size than its input embedding, so that no program loads the
    model; None where all agree, or the class is not known. `n_rows` has the rows of the weights that the
    model holds; what it lacks is not compared."""
    embed = names.embed
    held = [name for name in names.rows_of_vocabulary() if name in n_rows]
    if names.vocab_fields is None or not held:
        return None
    first = embed if embed in held else held[0]
    for name in held:
        if names.one_vocabulary and n_rows[name] != n_rows[first]:
            return f"{name} has {n_rows[name]} rows and {first} {n_rows[first]}"
    for path, value in _values(names.vocab_fields, config):
        if value != n_rows[first]:
            return f"{path} in config.json is {value}, but {first} has {n_rows[first]} rows"
    return None


def _values(paths: tuple[str, ...], config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The fields that are there, with their values."""
    for path in paths:
        part: Any = config
        for name in path.split("."):
            part = part.get(name) if isinstance(part, Mapping) else None
        if type(part) is int:
            yield path, part
