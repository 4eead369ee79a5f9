"""PEFT's trainable tokens: some rows of an embedding are trained and replace those of the base.

W[token_indices] = trainable_tokens_delta (PEFT 0.21 trainable_tokens/layer.py, merge): the stored rows are the new ones, not
differences. When the head is tied to the embedding, PEFT saves the same rows for both.
"""

from collections.abc import Callable

from lorafuse.adapters.keys import Modules, drop_copies, group, refuse_left_over, replacements, take_one, unwrapped
from lorafuse.adapters.patch import Update
from lorafuse.adapters.rows import replace_rows
from lorafuse.adapters.store import CONFIG, AdapterDir
from lorafuse.errors import AdapterError

SUPPORTED = "rows of embeddings, also tied ones"
MEMORY = "tiles"

_LEAF = "trainable_tokens_delta"


def updates(adapter: AdapterDir, scale: float, warn: Callable[[str], None]) -> tuple[list[Update], dict[str, str]]:
    modules = group(adapter, rf"{_LEAF}(\.(?P<name>[^.]+))?")
    ignored = drop_copies(modules)
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        key = leaves.pop(_LEAF, None)
        if key is not None:
            result.append(tokens_update(adapter, module, key, "token_indices", scale))
        refuse_left_over(adapter, leaves)
    return result, ignored


def take_tokens(adapter: AdapterDir, modules: Modules, scale: float) -> list[Update]:
    """Rows of embeddings trained beside another type (trainable_token_indices); takes their leaves. Raises AdapterError where
    the config has them and the file has not."""
    found = [
        tokens_update(adapter, unwrapped(path), key, "trainable_token_indices", scale)
        for path, leaves in modules.items()
        if (key := take_one(adapter, leaves, _LEAF)) is not None
    ]
    if adapter.config.get("trainable_token_indices") and not found:
        raise AdapterError(f"{adapter.path / CONFIG}: trainable_token_indices is set, but no {_LEAF} is in {adapter.file.name}.")
    return found


def tokens_update(adapter: AdapterDir, module: str, key: str, field: str, scale: float) -> Update:
    """The rows `key` of the module, at the indices in the config's `field`: one list, or one by the end of the module's name."""
    indices = adapter.config.get(field)
    if isinstance(indices, dict):
        # An output embedding that is tied follows the other's indices and has no entry of its own.
        own = [value for name, value in indices.items() if f".{module}".endswith(f".{name}")]
        indices = own[0] if own else indices if len(indices) != 1 else next(iter(indices.values()))
    return Update(f"{module}.weight", (key,), make=lambda target: replace_rows(adapter, key, field, indices, scale, target))
