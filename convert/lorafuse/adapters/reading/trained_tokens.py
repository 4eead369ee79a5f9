"""PEFT's trainable tokens, alone or beside another type: rows of an embedding that replace those of the base.

W[token_indices] = trainable_tokens_delta (PEFT 0.21 trainable_tokens/layer.py, merge): the stored rows are
the new ones, not differences. When the head is tied to the embedding, PEFT saves the same rows for both.
"""

from collections import Counter

from lorafuse.adapters.reading.check_tensors import misfit
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import Modules, check_float, take_one, unwrapped
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.patches.factor import Factor
from lorafuse.patches.replace_rows import ReplaceRows
from lorafuse.patches.target import Target

ROWS_LEAF = "trainable_tokens_delta"


def replace_rows(
    adapter: AdapterDir, key: str, field: str, indices: object, scale: float, target: Target
) -> ReplaceRows:
    """The patch for token indices out of the config's `field`. Raises AdapterError when they, the rows and
    the weight do not fit."""
    where = adapter.folder / CONFIG
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise AdapterError(f"{where}: {field} is {shown(indices)}, expected a list of integers.")
    check_float(adapter, key)
    spec = adapter.store.tensors[key].spec
    if len(spec.shape) != 2 or spec.shape[0] != len(indices):
        raise AdapterError(
            f"{adapter.file}: {shown(key)} is {spec}, expected one row for each of the {len(indices)} in "
            f"{field}."
        )
    if spec.shape[1:] != target.spec.shape[1:]:
        raise misfit(adapter, target, key)
    n_rows = target.spec.shape[0]
    for i in indices:
        if not 0 <= i < n_rows:
            raise AdapterError(
                f"{where}: {field} has {i}, but {shown(target.name)} has {n_rows} rows; is the adapter for "
                "another base, or was the vocabulary resized without saving the embedding?",
                misfit=True,
            )
    if len(set(indices)) < len(indices):
        counts = Counter(indices)
        twice = next(i for i in counts if counts[i] > 1)
        raise AdapterError(f"{where}: {field} has {twice} twice; which row is meant?")
    return ReplaceRows(Factor(adapter.store, key), indices, scale)


def take_tokens(adapter: AdapterDir, modules: Modules, scale: float) -> list[Update]:
    """Rows of embeddings trained beside another type (trainable_token_indices); takes their leaves. Raises
    AdapterError where the config has them and the file has not."""
    updates = [
        tokens_update(adapter, unwrapped(path), key, "trainable_token_indices", scale)
        for path, leaves in modules.items()
        if (key := take_one(adapter, leaves, ROWS_LEAF)) is not None
    ]
    if adapter.config.get("trainable_token_indices") and not updates:
        raise AdapterError(
            f"{adapter.folder / CONFIG}: trainable_token_indices is set, but no {ROWS_LEAF} is in "
            f"{adapter.file_name}."
        )
    return updates


def tokens_update(adapter: AdapterDir, module: str, key: str, field: str, scale: float) -> Update:
    """The rows `key` of the module, at the indices in the config's `field`: one list, or one by the end of
    the module's name."""
    indices = adapter.config.get(field)
    if isinstance(indices, dict):
        # An output embedding that is tied follows the other's indices and has no entry of its own.
        own = [value for name, value in indices.items() if f".{module}".endswith(f".{name}")]
        indices = own[0] if own else indices if len(indices) != 1 else next(iter(indices.values()))
    return Update(
        f"{module}.weight",
        (key,),
        make=lambda target: replace_rows(adapter, key, field, indices, scale, target),
    )
