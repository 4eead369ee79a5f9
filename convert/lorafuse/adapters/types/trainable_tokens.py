"""PEFT's trainable tokens: some rows of an embedding are trained and replace those of the base.

W[token_indices] = trainable_tokens_delta (PEFT 0.21 trainable_tokens/layer.py, merge): the stored rows are
the new ones, not differences. When the head is tied to the embedding, PEFT saves the same rows for both.
"""

from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import drop_copies, group, refuse_left_over, replacements
from lorafuse.adapters.reading.modules import Updates, Warn
from lorafuse.adapters.reading.trained_tokens import ROWS_LEAF, tokens_update
from lorafuse.adapters.updates import Update

SUPPORTED = "rows of embeddings, also tied ones"
MEMORY = "tiles"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for each embedding."""
    modules = group(adapter, rf"{ROWS_LEAF}(\.(?P<name>[^.]+))?")
    ignored = drop_copies(modules)
    result: list[Update] = []
    for module, leaves in modules.items():
        result += replacements(adapter, module, leaves)
        key = leaves.pop(ROWS_LEAF, None)
        if key is not None:
            result.append(tokens_update(adapter, module, key, "token_indices", scale))
        refuse_left_over(adapter, leaves)
    return result, ignored
