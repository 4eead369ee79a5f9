"""Tied weights: what an edit of one side does to the other, and whether the two have to come apart.

PEFT wraps modules, so that an update trained on one of two tied embeddings changes only that one; its merge
adds it to the tensor that both share. What it saves of the base is true of all that are tied."""

from lorafuse.adapters import AdapterDir, Edit
from lorafuse.adapters.reading.modules import Warn
from lorafuse.adapters.reading.saved_whole import is_base_copy
from lorafuse.errors import AdapterError, shown
from lorafuse.naming import Names, Tie


def fill_tied(names: Names, edits: dict[str, Edit], adapter: AdapterDir, warn: Warn) -> None:
    """Gives tied weights what an adapter says of one of them and means for all: rows of the embedding,
    copies of
    the base, and biases, which are one parameter under two names. Raises AdapterError where weights come
    apart that cannot."""
    _refuse_rows_of_shared(names, edits, adapter)
    for tie in names.ties:
        if not any(name in edits for name in tie.names):
            continue
        if tie.holder.endswith(".bias") or adapter.ties_embeddings:
            _fill(tie, edits, next(edits[name] for name in tie.names if name in edits))
        else:
            _fill_copies(tie, edits, names, adapter)
            _fill_rows(tie, edits, names)
        _refuse_shared(tie, edits, names, adapter)
    _warn_of_bias(names, edits, adapter, warn)


def settle_tied(names: Names, edits: dict[str, Edit], ignored: dict[str, str]) -> bool:
    """Whether tied weights have to be untied, since they are not edited alike. All ties of a model come apart
    together, as its config has one field for them."""
    edited = [tie for tie in names.ties if any(name in edits for name in tie.names)]
    if any(not _alike(tie, edits) for tie in edited):
        return True
    for tie in edited:
        kept = set(edits[tie.holder].keys)
        for name in tie.unstored:
            repeated = set(edits.pop(name).keys) - kept
            ignored |= dict.fromkeys(
                sorted(repeated), f"equal to the update of {tie.holder}, to which it is tied"
            )
    return False


def _alike(tie: Tie, edits: dict[str, Edit]) -> bool:
    own = [edits.get(name) for name in tie.names]
    first = own[0]
    return bool(first) and all(edit is not None and edit.same_as(first) for edit in own if first)


def _fill(tie: Tie, edits: dict[str, Edit], edit: Edit) -> None:
    for name in tie.names:
        edits.setdefault(name, edit)


def _fill_copies(tie: Tie, edits: dict[str, Edit], names: Names, adapter: AdapterDir) -> None:
    """A resized base that PEFT saved below an update, or because of its size, is that of all. Where the
    size is the checkpoint's, so are the values of the others."""
    copies = [
        edit
        for name in tie.names
        if (edit := edits.get(name)) and edit.replaced and is_base_copy(adapter, edit.replaced.names[0])
    ]
    if not copies:
        return
    copy = copies[0].replaced
    assert copy is not None
    if copy.spec.shape == names.base_of(tie.holder).spec.shape:
        return
    for name in tie.names:
        edit = edits.get(name, Edit())
        if edit.replaced is None:
            edits[name] = Edit(copy, edit.patches, [*copy.names, *edit.keys])


def _fill_rows(tie: Tie, edits: dict[str, Edit], names: Names) -> None:
    """Trained rows of the input embedding are also those of the others that have no rows of their own: PEFT
    replaces them there below any update."""
    embed = edits.get(names.embed or "") if names.embed in tie.names else None
    rows = [patch for patch in embed.patches if patch.traits.follows_tie] if embed else []
    for name in tie.names:
        edit = edits.get(name, Edit())
        if not rows or any(patch.traits.follows_tie for patch in edit.patches):
            continue
        assert embed is not None
        edits[name] = Edit(edit.replaced, [*rows, *edit.patches], [*embed.keys, *edit.keys])


def _warn_of_bias(names: Names, edits: dict[str, Edit], adapter: AdapterDir, warn: Warn) -> None:
    """PEFT 0.21 trainable_tokens/layer.py, forward, multiplies by the weight and adds nothing."""
    head = names.head or ""
    bias = f"{head.rpartition('.')[0]}.bias"
    if head in edits and any(patch.traits.follows_tie for patch in edits[head].patches) and names.has(bias):
        warn(
            f"{adapter.file}: trains rows of {shown(head)}, which PEFT then computes without {shown(bias)}. "
            "The output keeps the bias, as PEFT's own merge does, and so differs by it from the model that "
            "was trained."
        )


def _refuse_rows_of_shared(names: Names, edits: dict[str, Edit], adapter: AdapterDir) -> None:
    """Raises AdapterError for trained rows of models that tie whatever their config says, where the head has
    other values all the same: PEFT then computes the logits by the input embedding."""
    embed = next((tie for tie in names.ties if tie.fixed and names.embed in tie.names), None)
    apart = names.one_vocabulary and embed is not None and names.head not in embed.names
    patches = edits[names.embed or ""].patches if (names.embed or "") in edits else []
    if apart and any(patch.traits.follows_tie for patch in patches):
        raise AdapterError(
            f"{adapter.file}: trains rows of {shown(names.embed)}. With these PEFT takes "
            f"{shown(names.head)} for tied to it, which it is not in this checkpoint, so what was trained is "
            "another model than this; that is not supported."
        )


def _refuse_shared(tie: Tie, edits: dict[str, Edit], names: Names, adapter: AdapterDir) -> None:
    """Raises AdapterError for ties that do not come apart: of more than two weights, since programs read only
    the first of them, and of models that tie whatever their config says."""
    if _alike(tie, edits) or (len(tie.names) == 2 and not tie.fixed):
        return
    kind = shown(names.config.get("model_type"))
    if names.embed in tie.names:
        raise AdapterError(
            f"{adapter.file}: changes an embedding that {kind} shares between encoder, decoder and head; "
            "that is not supported."
        )
    changed = next(name for name in tie.names if name in edits)
    other = next(name for name in tie.names if name != changed)
    raise AdapterError(
        f"{adapter.file}: changes {shown(changed)}, which is one parameter with {shown(other)} in {kind}, in "
        "another way than that; that is not supported."
    )
