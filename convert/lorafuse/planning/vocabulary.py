"""The size of the output's vocabulary, and whether its embeddings are tied: what config.json has to say."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorafuse.errors import AdapterError
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
