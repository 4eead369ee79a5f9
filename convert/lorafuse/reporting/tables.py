"""Tables and lists of facts, as HTML."""

from collections.abc import Iterable, Sequence
from html import escape

from lorafuse.errors import shown
from lorafuse.reporting.markup import Child, Markup, element


def section(title: str, *children: Child) -> Markup:
    """A part of the page, with a heading that can be linked to."""
    number = anchor(title)
    return element("section", element("h2", title, id=number), *children, aria_labelledby=number)


def anchor(title: str) -> str:
    """The id of a section's heading."""
    return title.lower().replace(" ", "-")


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]], numbers: Sequence[str] = ()
) -> Markup:
    """A table that scrolls sideways where it is too wide. The first cell of a row is its heading; columns
    whose heading is in `numbers` are aligned to the right."""
    right = [i for i, name in enumerate(head) if name in numbers]
    heads = [
        element("th", name, scope="col", class_="number" if i in right else None)
        for i, name in enumerate(head)
    ]
    lines = [
        element("tr", element("th", first, scope="row"), [
            element("td", cell, class_="number" if i in right else None) for i, cell in enumerate(cells, 1)
        ])
        for first, *cells in rows
    ]  # fmt: skip
    inner = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", heads)),
        element("tbody", lines),
    )
    return element("div", inner, class_="scroll", tabindex=0, role="group", aria_label=caption)


def facts(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """A list of labels and what they stand for."""
    items = [element("div", element("dt", label), element("dd", said)) for label, said in pairs]
    return element("dl", items, class_="facts")


def folded(summary: str, *children: Child) -> Markup:
    """What is shown when it is asked for."""
    return element("details", element("summary", summary), *children)


def rest(n: int, what: str) -> Markup | None:
    """What a table leaves out."""
    return element("p", f"and {n:,} more {what}.", class_="note") if n > 0 else None


def code(text: str) -> Markup:
    return element("code", text)


def command(text: str) -> Markup:
    """The lines of a command, however long."""
    lines = (escape(shown(line, 10 * len(line))) for line in text.split("\n"))
    return element("pre", element("code", Markup("\n".join(lines))), tabindex=0)
