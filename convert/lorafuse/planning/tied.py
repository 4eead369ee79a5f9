"""Tied embeddings: what an edit of one side does to the other, and whether the pair has to come apart."""

from lorafuse.adapters import AdapterDir, Edit
from lorafuse.naming import Names


def fill_tied(names: Names, edits: dict[str, Edit], adapter: AdapterDir) -> None:
    """What an adapter that names one side of a tied pair does to the other. Replaced rows are those of both,
    unless the head has its own."""
    pair = names.tied
    if pair is None or not (pair.embed in edits or pair.head in edits):
        return
    names.refuse_shared(adapter.file)
    embed, head = edits.get(pair.embed), _with_tied_rows(edits.get(pair.embed), edits.get(pair.head))
    if adapter.ties_embeddings:
        embed, head = embed or head, head or embed
    edits |= {weight: edit for weight, edit in ((pair.embed, embed), (pair.head, head)) if edit}


def settle_tied(names: Names, edits: dict[str, Edit], ignored: dict[str, str]) -> bool:
    """Whether a tied pair has to be untied, since its sides are not edited alike.

    LoRA on one side of a tied pair changes only that side in training, so the pair comes apart; PEFT's merge
    adds the update to the shared tensor, and so to both.
    """
    pair = names.tied
    if pair is None or not (pair.embed in edits or pair.head in edits):
        return False
    embed, head = edits.get(pair.embed), edits.get(pair.head)
    if not embed or not head or not embed.same_as(head):
        return True
    if not pair.head_stored:
        del edits[pair.head]
        repeated = set(head.keys) - set(embed.keys)
        ignored |= dict.fromkeys(
            sorted(repeated), f"equal to the update of {pair.embed}, to which it is tied"
        )
    return False


def _with_tied_rows(embed: Edit | None, head: Edit | None) -> Edit | None:
    """The head's edit, with the rows that it takes over from the embedding: PEFT replaces them below any LoRA
    of the head."""
    rows = [patch for patch in embed.patches if patch.traits.follows_tie] if embed else []
    if not rows or (head and any(patch.traits.follows_tie for patch in head.patches)):
        return head
    assert embed is not None
    head = head or Edit()
    return Edit(head.replaced, [*rows, *head.patches], [*embed.keys, *head.keys])
