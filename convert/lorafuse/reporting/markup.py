"""HTML as text. Whatever comes from a file is escaped on its way into an element."""

from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

from lorafuse.errors import shown

MOST_CHARACTERS = 400  # of a name from a file
VOID = {"meta", "rect"}  # elements that hold nothing


class Markup(NamedTuple):
    """Text that is HTML already."""

    html: str


Child = Any  # text, a number, Markup, None for nothing, or an iterable of these


def element(name: str, *children: Child, **attributes: object) -> Markup:
    """`<name …>children</name>`. An attribute is named as in HTML, with `_` for `-` and after a word of
    Python (`class_`); None leaves it out. Text is escaped unless it is Markup."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(shown(value, MOST_CHARACTERS))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children).html}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Markup and text one after the other."""
    return Markup("".join(map(_text, children)))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child.html
    if isinstance(child, str | int | float):
        return escape(shown(child, MOST_CHARACTERS))
    return join(child).html
