"""Every message that docs/troubleshooting.md quotes is a message of the package: its words stand, in this
order, in one string of the source. `…` on the page is what the program fills in."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Silent trouble")[0]
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE, re.M)
# Names of constants that are filled in, and read as they are here.
CONSTANTS = {"ORDER": "the order is CKPT ADAPTER OUT_DIR."}


def test_every_row_quotes_a_message():
    rows = re.findall(r"^\| (?!what is said)", PAGE.partition("\n## ")[2], re.M)
    assert len(QUOTED) == len(set(QUOTED)) == len(rows) > 40


def text_of(node: ast.JoinedStr) -> str:
    """A string as it is printed, with … for what is filled in."""
    parts = []
    for value in node.values:
        if isinstance(value, ast.Constant):
            parts.append(str(value.value))
        else:
            parts.append(CONSTANTS.get(ast.unparse(value)[1:-1], "…"))
    return "".join(parts)


@cache
def strings() -> list[str]:
    """All strings of the package that are not within another string."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.JoinedStr):
            yield text_of(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    files = (ROOT / "convert" / "lorafuse").rglob("*.py")
    return [text for file in files for text in walk(ast.parse(file.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_message_is_in_the_source(quoted):
    words = [part.strip() for part in quoted.split("…")]
    pattern = re.compile(".*?".join(map(re.escape, filter(None, words))), re.S)
    assert any(pattern.search(text) for text in strings())
