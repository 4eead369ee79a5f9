"""Ratios of what was measured in turns, and whether they got worse.

A ratio says how much of another thing's time or memory lorafuse takes: less is better. Each round gives a
quotient; their median counts, since whatever else the machine does meanwhile falls on both sides of a round.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

WORSE = 1.25  # times a committed ratio: a regression


class Ratio(NamedTuple):
    """The median of the rounds' quotients, the least and the greatest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """Of figures that were measured in pairs."""
    quotients = [a / b for a, b in zip(ours, others, strict=True)]
    return Ratio(statistics.median(quotients), min(quotients), max(quotients))


def regressions(committed: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, str]:
    """Name → what is wrong: a ratio that is worse by more than a quarter, is not measured any more, or is
    not committed."""
    wrong = dict.fromkeys(measured.keys() - committed.keys(), "is not in bench/ratios.json")
    for name, before in committed.items():
        now = measured.get(name)
        if now is None:
            wrong[name] = "is not measured any more"
        elif now > before * WORSE:
            wrong[name] = f"is {now:.3f}, {now / before:.2f} times the committed {before:.3f}"
    return wrong


def better(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Of two measurements the less noisy: noise makes a ratio greater or less, and a regression stays."""
    return {name: min(value, second.get(name, value)) for name, value in first.items()}


def save(path: Path, ratios: Mapping[str, float], machine: str) -> None:
    """`machine`: what they were measured on."""
    content = {"machine": machine, "ratios": {name: round(ratios[name], 4) for name in sorted(ratios)}}
    path.write_text(json.dumps(content, indent=2) + "\n")


def load(path: Path) -> dict[str, float]:
    """The committed ratios."""
    ratios: dict[str, float] = json.loads(path.read_text())["ratios"]
    return ratios
