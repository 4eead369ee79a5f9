"""How large the result is, and the files it was made from and consists of."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorafuse.errors import sized
from lorafuse.files.tensors import DTYPES, SAFETENSORS_NAMES
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import sizes_in_sum, stored_tensors
from lorafuse.reporting.markup import Child, Markup, element
from lorafuse.reporting.tables import code, folded, rest, section, table

MOST_LINES = 500
FOLD_AT = 12  # files


def is_number(value: object) -> bool:
    """Whether a figure of a receipt, whatever that holds, can be shown as a number."""
    return isinstance(value, int | float) and -1e18 < value < 1e18


def sizes(receipt: Receipt) -> Markup:
    """How large the result is, against its inputs and the dense result."""
    stored = sizes_in_sum(receipt["tensors"])
    of_role = {role: _nbytes_of(receipt, role) for role in ("checkpoint", "adapter")}
    lines = [
        ("this result", stored["nbytes"]),
        ("the same, dense", stored["dense_nbytes"]),
        ("the base's weights", of_role["checkpoint"]),
        ("the adapter's weights", of_role["adapter"]),
    ]
    most = max(*(nbytes for _, nbytes in lines), 1)
    rows = [(name, sized(nbytes), _bar(nbytes / most)) for name, nbytes in lines]
    bits = stored["bits_per_weight"]
    said = f"{bits:.2f} bits a weight" if bits is not None else ""
    by_dtype: Counter[str] = Counter()
    n_of: Counter[str] = Counter()
    for tensor in stored_tensors(receipt["tensors"]):
        known = SAFETENSORS_NAMES.get(tensor.dtype)
        by_dtype[tensor.dtype] += DTYPES[known][0] * math.prod(tensor.shape) if known else 0
        n_of[tensor.dtype] += 1
    head = ("stored as", "tensors", "size")
    dtypes = [(dtype, f"{n_of[dtype]:,}", sized(nbytes)) for dtype, nbytes in by_dtype.most_common(20)]
    return section(
        "Sizes",
        element("p", f"Format {receipt['settings'].get('format', 'dense')}: {said}."),
        table("Sizes", ("what", "size", "to scale"), rows, ("size",)),
        table("Stored tensors by dtype", head, dtypes, head[1:]),
    )


def _nbytes_of(receipt: Receipt, role: str) -> int:
    sizes = (
        entry.get("size")
        for entry in receipt["inputs"]
        if entry["role"] == role and entry["path"].endswith((".safetensors", ".bin"))
    )
    return sum(size for size in sizes if isinstance(size, int) and size > 0)


def _bar(share: float) -> Markup:
    rect = element("rect", class_="bar", width=f"{100 * share:.2f}%", height=12)
    return element("svg", rect, class_="bar", width=220, height=12, aria_hidden="true")


def files(receipt: Receipt) -> Markup:
    """Inputs and outputs with their hashes."""
    read = [(e["role"], e["path"], e.get("size"), e.get("sha256")) for e in receipt["inputs"]]
    written = [("output", e["file"], e["size"], e.get("sha256")) for e in receipt["outputs"]]
    tables = [
        _files("What was read", read),
        _files("What was written, beside this receipt", written),
    ]
    return section("Files", tables)


def _files(caption: str, entries: Sequence[tuple[Any, ...]]) -> Child:
    rows = (
        (code(path), role, sized(size) if is_number(size) else "–", code(str(sha256)))
        for role, path, size, sha256 in entries[:MOST_LINES]
    )
    head = ("file", "role", "size", "sha256")
    found = [table(caption, head, rows, ("size",)), rest(len(entries) - MOST_LINES, "files")]
    return folded(f"{caption}: {len(entries):,} files", *found) if len(entries) > FOLD_AT else found
