"""Merges that change nothing, or weights whose update is zero, by what was measured."""

from collections.abc import Mapping
from typing import Any

from lorafuse.errors import listed

_UNCHANGED = ("merged", "copied", "decoded")


def no_update(tensors: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What to say of the tensors of a receipt: that the result is a copy of the base, or which updates are
    zero; None where every update changes its weight."""
    merged = [name for name, entry in tensors.items() if entry["action"] == "merged"]
    zero = [name for name in merged if tensors[name].get("delta_norm") == 0]
    if not any(entry["action"] in ("merged", "replaced", "added") for entry in tensors.values()):
        return "The adapter changes no weight: the result is a copy of the base."
    if not zero:
        return None
    why = "an adapter that was not trained, or not saved rightly, has lora_B all zero"
    if len(zero) == len(merged) and all(entry["action"] in _UNCHANGED for entry in tensors.values()):
        return f"The update of every weight is zero, {listed(zero)}: the result is a copy of the base; {why}."
    return f"The update of {len(zero)} of {len(merged)} weights is zero: {listed(zero)}; {why}."
