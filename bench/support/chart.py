"""Bars on an axis from zero, with the spread of what they stand for, as an SVG file."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.faithfulness.bars import LABELS, LINE, SPAN, page


@dataclass(frozen=True)
class Spread:
    """A bar: the median of `values`, with a line from the least to the greatest."""

    label: str
    values: Sequence[float]
    colour: str = "light"  # a class of bars.STYLE

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def bars(title: str, panels: Mapping[str, Sequence[Spread]]) -> str:
    """One panel below the other, each with an axis of its own, which its heading names."""
    out = [f'<text class="title" x="16" y="26">{escape(title)}</text>']
    top = 44
    for heading, spreads in panels.items():
        longest = max(value for spread in spreads for value in spread.values) or 1.0
        out.append(f'<text class="title" x="16" y="{top + 14}">{escape(heading)}</text>')
        for i, spread in enumerate(spreads):
            out += _bar(spread, top + LINE * (i + 1), SPAN / longest)
        top += LINE * (1 + len(spreads)) + 24
    return page(title, out, top)


def _bar(spread: Spread, y: int, scale: float) -> list[str]:
    """`scale`: px of a unit."""
    low, high, width = (LABELS + scale * n for n in (min(spread.values), max(spread.values), spread.median))
    middle = y + LINE / 2
    return [
        f'<text class="end" x="{LABELS - 8}" y="{y + 15}">{escape(spread.label)}</text>',
        f'<rect class="{spread.colour}" x="{LABELS}" y="{y + 3}" width="{width - LABELS:.1f}" '
        f'height="{LINE - 6}"/>',
        f'<line class="spread" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>',
        f'<text class="small" x="{max(high, width) + 6:.1f}" y="{y + 15}">{spread.median:.3g}</text>',
    ]
