"""The size of the output's vocabulary, which is that of all its embeddings, and whether these are tied."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorafuse.adapters import Edit
from lorafuse.adapters.reading.modules import Warn
from lorafuse.codecs.first_rows import FirstRows
from lorafuse.errors import AdapterError, listed
from lorafuse.naming import Names
from lorafuse.naming.ties import FLAG
from lorafuse.naming.vocabulary import n_tokens
from lorafuse.planning.plan import Step


def vocabulary_changes(names: Names, steps: Sequence[Step], *, untied: bool, files: str) -> dict[str, Any]:
    """The fields of config.json that change, with dots between sections. Raises AdapterError for embeddings
    that have not the same number of rows after a change of it."""
    changes: dict[str, Any] = {}
    if untied:
        changes |= dict.fromkeys([FLAG, *(f"{section}.{FLAG}" for section in sorted(names.sections))], False)
    rows = frozenset(names.rows_of_vocabulary())
    n_rows = {step.name: n_tokens(step.spec.shape) for step in steps if step.name in rows}
    resized = {name: n for name, n in n_rows.items() if n != n_tokens(names.base_of(name).spec.shape)}
    if not resized:
        return changes
    _refuse_other_sizes(names, n_rows, resized, files)
    size = next(iter(resized.values()))
    return changes | dict.fromkeys(_fields(names), size)


def cut_vocabulary(names: Names, edits: dict[str, Edit], files: str, warn: Warn) -> None:
    """Where adapters hold an embedding with fewer rows than the checkpoint, the others that they leave alone
    lose the same rows: transformers' resize_token_embeddings keeps the first of each."""
    rows = names.rows_of_vocabulary()
    before = {name: names.base_of(name).spec.shape for name in rows}
    sizes = {
        (n_tokens(before[name]), n_tokens(edits[name].replaced.spec.shape))  # type: ignore[union-attr]
        for name in rows
        if name in edits and edits[name].replaced
    }
    if len(sizes) != 1:
        return
    ((n_before, n_after),) = sizes
    alone = [name for name in rows if name not in edits and n_tokens(before[name]) == n_before]
    if n_after >= n_before or not alone:
        return
    for name in alone:
        shape = before[name]
        cut = (1, n_after) if shape[0] == 1 else (n_after, *shape[1:])
        edits[name] = Edit(FirstRows(names.base_of(name), cut))
    warn(
        f"{files}: the vocabulary has {n_after} tokens, not the checkpoint's {n_before}; "
        f"{listed(alone)} {'is' if len(alone) == 1 else 'are'} cut to the first {n_after} rows."
    )


def _fields(names: Names) -> list[str]:
    """Those that the class has. A config may repeat vocab_size beside its text part."""
    fields = list(names.vocab_fields) if names.vocab_fields is not None else ["vocab_size"]
    return [*fields, *(["vocab_size"] if "vocab_size" in names.config and "vocab_size" not in fields else [])]


def _refuse_other_sizes(
    names: Names, n_rows: Mapping[str, int], resized: Mapping[str, int], files: str
) -> None:
    """Also what is missing: rows that training added were random, or the mean of others, when it began."""
    if len(set(n_rows.values())) == 1:
        return
    size = next(iter(resized.values()))
    both = " and ".join(f"{name} has {n} rows" for name, n in n_rows.items())
    lacking = next(name for name, n in n_rows.items() if n != size)
    raise AdapterError(
        f"{files}: resizes the vocabulary on one side only: {both}. What the other rows of {lacking} were in "
        "training is in neither the checkpoint nor the adapter: save the base after resizing it, as it was "
        "when training began, and merge into that."
    )
