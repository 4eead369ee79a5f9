"""Which adapters a receipt says were merged, in which order and with which weights: told by their files, not
by their names."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lorafuse.errors import ResultError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.names import RECEIPT
from lorafuse.inputs.hashes import InputHashes
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.receipt.fields import InputEntry, Receipt
from lorafuse.settings import checked_weight

Identity = tuple[object, ...]  # what two entries of the same file have in common


def in_merged_order(
    folder: Folder,
    receipt: Receipt,
    base: Checkpoint,
    given: Sequence[WeightedAdapter],
    adapter_scale: float,
) -> list[WeightedAdapter]:
    """The adapters with the weights and in the order that the receipt says. `adapter_scale` is the first's
    weight. Raises ResultError unless the inputs are the files that were
    merged."""
    with InputHashes(base, str(base.folder), given) as hashes:
        inputs = hashes.result()
    _refuse_other_files(folder, receipt["inputs"], inputs)
    told = [entry for entry in receipt["inputs"] if entry["role"] == "adapter"]
    if len(given) == 1:
        return [WeightedAdapter(given[0].adapter, adapter_scale)]
    by_number = [_identities(entries) for entries in _entries_of_each(given, inputs)]
    order = _order(folder, list(map(_identity, told)), by_number)
    merged: list[WeightedAdapter] = []
    at = 0
    for number in order:
        weights = [entry.get("weight") for entry in told[at : at + len(by_number[number])]]
        merged.append(WeightedAdapter(given[number].adapter, _weight(folder, weights)))
        at += len(weights)
    if merged[0].weight != adapter_scale:
        raise ResultError(
            f"{shown(folder / RECEIPT)}: says that the first adapter's weight is {merged[0].weight}, and "
            f"that adapter_scale is {adapter_scale}."
        )
    return merged


def _identity(entry: Mapping[str, object]) -> Identity:
    return tuple(entry.get(name) for name in ("role", "size", "sha256"))


def _identities(entries: Iterable[Mapping[str, object]]) -> list[Identity]:
    return [_identity(entry) for entry in entries]


def _refuse_other_files(
    folder: Folder, told: Sequence[Mapping[str, object]], inputs: Sequence[InputEntry]
) -> None:
    """Raises ResultError unless the inputs are the files that the receipt lists, in whatever order."""
    merged = Counter(map(_identity, told))
    if merged == Counter(map(_identity, inputs)):
        return
    names = [shown(entry["path"]) for entry in inputs if _identity(entry) not in merged]
    raise ResultError(
        f"{shown(folder)}: was merged from other files than these: "
        + (
            f"{listed(names)} differ from what the receipt says."
            if names
            else "the receipt lists more of them."
        )
    )


def _entries_of_each(
    given: Sequence[WeightedAdapter], inputs: Sequence[InputEntry]
) -> list[list[InputEntry]]:
    """The entries of each adapter's files, which stand one behind the other."""
    entries = iter([entry for entry in inputs if entry["role"] == "adapter"])
    return [[next(entries) for _ in weighted.adapter.files] for weighted in given]


def _order(folder: Folder, told: list[Identity], by_number: Sequence[list[Identity]]) -> list[int]:
    """The numbers of the given adapters in the order of the receipt. Adapters of the same files are told
    apart by nothing, and need not be. Raises ResultError where no order of them has these files."""
    # The adapter with most files first: the files of another may be the beginning of its own.
    left = sorted(range(len(by_number)), key=lambda number: -len(by_number[number]))
    order: list[int] = []
    at = 0
    while left:
        fitting = (number for number in left if told[at : at + len(by_number[number])] == by_number[number])
        number = next(fitting, None)
        if number is None:
            raise ResultError(
                f"{shown(folder / RECEIPT)}: lists the files of the adapters in an order that no merge has."
            )
        left.remove(number)
        order.append(number)
        at += len(by_number[number])
    return order


def _weight(folder: Folder, weights: Sequence[object]) -> float:
    """The weight that all files of an adapter have in the receipt."""
    if len(set(map(repr, weights))) != 1 or not isinstance(weights[0], int | float):
        raise ResultError(f"{shown(folder / RECEIPT)}: gives the files of an adapter no weight, or several.")
    return checked_weight(folder / RECEIPT, weights[0])
