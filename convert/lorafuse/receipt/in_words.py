"""What the figures of a receipt mean, in words for people. Needs no torch."""

import math
from typing import Any

from lorafuse.errors import shown
from lorafuse.receipt.read import ENOUGH_KEPT

# What happens to a weight.
ACTIONS = {
    "copied": "bit for bit",
    "decoded": "not changed, stored in another way than in the base",
    "merged": "changed by an update",
    "replaced": "saved whole by the adapter",
    "added": "not in the base",
}


def percent(share: float) -> str:
    """A share of the update, rounded down, so that 100% is all of it."""
    return f"{math.floor(share * 1000) / 10:.1f}%"


def too_little_text(update: dict[str, Any]) -> list[str]:
    """Where less than enough of an update is kept, or much noise is added to it, a line that says so, and
    what helps. `update`: what `kept_in_sum` returns."""
    remedy = f": {update['remedy']}" if update["remedy"] else ""
    if update["n_below"]:
        weights = "1 weight keeps" if update["n_below"] == 1 else f"{update['n_below']} weights keep"
        least = f"{shown(update['least_in'])} the least ({percent(update['least'])})"
        return [f"{weights} less than {ENOUGH_KEPT:.0%} of the update, {least}{remedy}."]
    if update["n_noisy"]:
        return [f"Rounding adds noise of {update['noise']:.2g} times the size of the update{remedy}."]
    return []
