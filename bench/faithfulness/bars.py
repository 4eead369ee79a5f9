"""A bar chart and a scatter plot on logarithmic axes as SVG files, by hand: no plotting library is worth
being a dependency for two plots."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABELS, VALUES, LINE = 860, 330, 80, 22  # px: the whole, left and right of the bars, a bar's row
SPAN = WIDTH - LABELS - VALUES
# A background of its own: the page around it may be dark where the reader's system is not. No CSS variables:
# not every program that shows SVG knows them.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; } .small { font-size: 11px; } \
.end { text-anchor: end; } .middle { text-anchor: middle; }
.paper { fill: #ffffff; } .right { fill: #1a7f5a; } .light { fill: #3f7fbf; } \
.wrong { fill: #c4501b; } .none { fill: #8c959f; }
line { stroke: #d0d7de; }
line.spread { stroke: #1f2328; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .paper { fill: #0d1117; } .right { fill: #3fb68b; } .wrong { fill: #e5824f; }
  line { stroke: #30363d; } line.spread { stroke: #e6edf3; }
}
"""


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    colour: str  # a class of STYLE: right, light, wrong or none


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten that the axis goes from and to. It starts below the least value, so that each bar has
    a length."""
    positive = [value for value in values if value > 0]
    return math.ceil(math.log10(min(positive))) - 1, math.ceil(math.log10(max(positive)))


def svg(title: str, panels: Mapping[str, Sequence[Bar]]) -> str:
    """One panel below the other, all on the same axis. A value that is not positive has no bar."""
    first, last = decades([bar.value for bars in panels.values() for bar in bars])

    def x(value: float) -> float:
        return LABELS + SPAN * (math.log10(value) - first) / (last - first)

    out = [f'<text class="title" x="16" y="26">{escape(title)}</text>']
    top = 44
    for heading, bars in panels.items():
        bottom = top + LINE * (1 + len(bars))
        for power in range(first, last + 1):
            at = f"{x(10.0**power):.1f}"
            out.append(f'<line x1="{at}" y1="{top + 20}" x2="{at}" y2="{bottom}"/>')
            if (power - last) % 2 == 0:
                out.append(f'<text class="small middle" x="{at}" y="{bottom + 14}">1e{power}</text>')
        out.append(f'<text class="title" x="16" y="{top + 14}">{escape(heading)}</text>')
        for i, bar in enumerate(bars):
            y = top + LINE * (i + 1)
            width = max(x(bar.value) - LABELS, 0) if bar.value > 0 else 0
            out.append(f'<text class="end" x="{LABELS - 8}" y="{y + 15}">{escape(bar.label)}</text>')
            out.append(
                f'<rect class="{bar.colour}" x="{LABELS}" y="{y + 3}" width="{width:.1f}" '
                f'height="{LINE - 6}"/>'
            )
            out.append(
                f'<text class="small" x="{LABELS + width + 6:.1f}" y="{y + 15}">{bar.value:.1e}</text>'
            )
        top = bottom + 30
    return page(title, out, top)


def page(title: str, out: Sequence[str], height: int) -> str:
    """The whole file, of what is drawn on it."""
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        '<rect class="paper" width="100%" height="100%"/>',
    ]
    return "\n".join([*head, *out, "</svg>\n"])


@dataclass(frozen=True)
class Point:
    label: str
    x: float
    y: float


PANEL = 260  # px: the height of a panel of the scatter plot
LABEL, LABEL_LINE = 130, 13  # px: the size of its labels


def scatter(title: str, panels: Mapping[str, Sequence[Point]]) -> str:
    """One panel below the other, y on a logarithmic axis, all on the same axes."""
    every = [point for points in panels.values() for point in points]
    first, last = decades([point.y for point in every])
    right = max(point.x for point in every) * 1.05
    out = [f'<text class="title" x="16" y="26">{escape(title)}</text>']
    top = 44
    for heading, points in panels.items():
        bottom = top + PANEL
        out.append(f'<text class="title" x="16" y="{top + 14}">{escape(heading)}</text>')
        for power in range(first, last + 1):
            y = bottom - (PANEL - 30) * (power - first) / (last - first)
            out.append(f'<line x1="{VALUES}" y1="{y:.1f}" x2="{WIDTH - 16}" y2="{y:.1f}"/>')
            out.append(f'<text class="small end" x="{VALUES - 6}" y="{y + 4:.1f}">1e{power}</text>')
        placed = {
            point: (
                VALUES + (WIDTH - VALUES - 120) * point.x / right,
                bottom - (PANEL - 30) * (math.log10(point.y) - first) / (last - first),
            )
            for point in sorted(points, key=lambda point: -point.y)
        }
        out += [f'<circle class="light" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in placed.values()]
        out += _labels(placed)
        top = bottom + 30
    return page(title, out, top)


def _labels(placed: Mapping[Point, tuple[float, float]]) -> list[str]:
    """Beside each point, the highest first: on its left where another point is in the way, and lower where a
    label is."""
    out, boxes = [], list[tuple[float, float]]()  # left end and height of labels
    for point, (x, y) in placed.items():
        hidden = any(0 < at - x < LABEL and abs(height - y) < LABEL_LINE for at, height in placed.values())
        left, low = x - 8 - LABEL if hidden else x + 8, y + 4
        for at, height in boxes:
            if abs(at - left) < LABEL and abs(height - low) < LABEL_LINE:
                low = height + LABEL_LINE
        boxes.append((left, low))
        where = f'class="small end" x="{x - 8:.1f}"' if hidden else f'class="small" x="{left:.1f}"'
        out.append(f'<text {where} y="{low:.1f}">{escape(point.label)}, {point.x:.0f} MB</text>')
    return out
