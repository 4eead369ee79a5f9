"""What pages say of each other and of the package: anchors, figures, parameters, exceptions."""

import inspect
import re
from pathlib import Path

import pytest

import lorafuse

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Of the headings, as the places where pages are read make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(path), flags=re.M | re.S), re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_of_links_exist(page):
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text_of(page)):
        assert anchor in anchors(page.parent / file if file else page), f"{file}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\(docs/([\w-]+\.md)", text_of(ROOT / "README.md")))
    assert linked == {path.name for path in DOCS.glob("*.md")}


def test_the_figures_of_choosing_are_those_of_accuracy():
    """KL and MB of the first adapter's light results."""
    block = text_of(DOCS / "accuracy.md").partition("<!-- light:begin -->")[2].partition("\n### ")[2]
    table = block.partition("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if " | " in line]
    cells = {row[0]: (row[2], row[-1]) for row in rows}
    shown = re.findall(r"^\| (`[\w-]+`) \| (\S+e-\d+) \| (\d+) \|$", text_of(DOCS / "choosing.md"), re.M)
    assert len(shown) > 8
    assert {name: (kl, size) for name, kl, size in shown} == {name: cells[name] for name, _, _ in shown}


def parameters_of(function: str) -> set[str]:
    """Those that may be left out."""
    given = inspect.signature(getattr(lorafuse, function)).parameters.values()
    return {parameter.name for parameter in given if parameter.default is not parameter.empty}


@pytest.mark.parametrize("function", ["convert", "batch", "verify"])
def test_the_page_on_python_has_every_parameter(function):
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \| ", text_of(DOCS / "python-api.md"), re.M)
    of_function = [names for names, of in rows if f"`{function}`" in of]
    shown = {name for names in of_function for name in re.findall(r"\w+", names)}
    assert shown == parameters_of(function)


def test_the_page_on_python_has_every_public_name():
    page = text_of(DOCS / "python-api.md")
    for name in set(lorafuse.__all__) - {"__version__"}:
        assert re.search(rf"`{name}\b", page), name
    codes = dict(re.findall(r"^\| `(\w+Error)` \| (\d) \|", page, re.M))
    errors = {name: getattr(lorafuse, name) for name in lorafuse.__all__ if name.endswith("Error")}
    assert codes == {name: str(kind.exit_code) for name, kind in errors.items() if name != "LorafuseError"}
