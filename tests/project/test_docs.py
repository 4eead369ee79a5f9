"""README and docs say what is so: the help text is the real one, commands exist, links lead somewhere."""

import ast
import re
import sys
import threading
from importlib import import_module
from inspect import unwrap
from pathlib import Path
from types import FunctionType

from click.testing import CliRunner

import lorafuse
from lorafuse import cli, errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(lorafuse.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
DOCS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def test_the_two_commands_come_first():
    assert re.search(r"```\n(.*?)```", README, re.S)[1].split("\n") == ["make demo", "make test", ""]


def test_the_exit_codes_are_those_of_the_exceptions():
    codes = {
        c.exit_code
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, errors.LorafuseError)
    }
    rows = re.search(r"## Exit codes\n\n(.*?)(?:\n\n|\Z)", OPTIONS, re.S)[1]
    listed = {int(code) for row in rows.splitlines()[2:] for code in re.findall(r"\d+", row.split("|")[1])}
    assert listed == codes | {0, 130, 143}


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCS:
        assert set(re.findall(r"`make ([a-z]+)`", path.read_text(encoding="utf-8"))) <= targets, path


def test_links_and_files_that_are_named_exist():
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
        for name in re.findall(r"`((?:bench|docs|tests|fixtures|convert)/[\w./-]*)`", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def defined_in(file: Path) -> set[str]:
    """The classes and tables of a file's top level."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, ast.ClassDef)}
    return names | {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}


def test_every_word_of_the_architecture_is_a_class_in_its_file():
    words = re.findall(r"^\| `(\w+)` \| `([\w/]+\.py)` \|", ARCHITECTURE, re.M)
    assert len(words) > 20
    for word, file in words:
        assert word in defined_in(PACKAGE / file), f"{file}: {word}"


def test_every_interface_has_its_line_in_the_architecture():
    """Every public Protocol, in its file; and the tables in which a further implementation is named."""
    there = {
        (node.name, str(path.relative_to(PACKAGE)))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
        if not node.name.startswith("_")
    }
    section = re.search(r"## Interfaces\n(.*?)\n### ", ARCHITECTURE, re.S)[1]
    assert set(re.findall(r"^\| `(\w+)` \| `([\w/]+\.py)` \|", section, re.M)) == there
    tables = re.findall(r"\| ([A-Z_]+) in `([\w/]+\.py)` \|", section)
    assert {table for table, _ in tables} == {
        "ADAPTERS",
        "CODECS",
        "ENGINES",
        "FOLDERS",
        "FORMATS",
        "OUT_DIRS",
    }
    for table, file in tables:
        assert table in defined_in(PACKAGE / file), f"{file}: {table}"


def test_files_that_the_architecture_names_exist():
    names = re.findall(r"`(\w[\w/]*(?:\.py|/))`", ARCHITECTURE.partition("<!-- rooms:end -->")[2])
    roots = [PACKAGE, ROOT]
    for name in names:
        assert name == "out/" or any((root / name).exists() for root in roots), name


FOLLOWED = re.findall(r"^\d+\. `([\w.]+)` — ", ARCHITECTURE, re.M)


def followed(name: str) -> FunctionType:
    """The function that a dotted name stands for: `module.function`, `module.Class.method`, or `module.Class`
    for its `__init__`. Of a decorated function it is the inner one."""
    module, *attributes = name.rsplit(".", 1)
    if module.rpartition(".")[2][:1].isupper():
        module, owner = module.rsplit(".", 1)
        attributes = [owner, *attributes]
    thing = import_module(f"lorafuse.{module}")
    for attribute in attributes:
        thing = vars(thing)[attribute]
    return unwrap(thing.__init__ if isinstance(thing, type) else thing)


def test_the_functions_that_a_weight_passes_are_there_and_called(tmp_path):
    """The functions of "Follow one weight" are the package's; a merge of the fixtures calls each of them."""
    functions = {followed(name).__code__: name for name in FOLLOWED}
    assert len(functions) == len(FOLLOWED) > 30
    called = set()

    def note(frame, event, _):
        if event == "call":
            called.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        lorafuse.convert(ROOT / "fixtures/llama-nf4", ROOT / "fixtures/llama-adapter", tmp_path / "merged")
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    assert not {name for code, name in functions.items() if code not in called}


def test_benchmarks_that_are_named_exist_and_name_themselves():
    scripts = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "bench").rglob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    for path in (*DOCS, ROOT / "Makefile", *(ROOT / "bench").rglob("*.py")):
        named = set(re.findall(r"(?<=python -m )bench[\w.]*", path.read_text(encoding="utf-8")))
        assert named <= scripts.keys(), path
    for name, path in scripts.items():
        assert f"python -m {name} " in path.read_text(encoding="utf-8"), path


def test_inspect_prints_what_its_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    out = tmp_path / "demo"
    lorafuse.convert("fixtures/llama-nf4", "fixtures/llama-adapter", out)
    for path, shown_as in (("fixtures/llama-nf4", "fixtures/llama-nf4"), (out, "build/demo --top 3")):
        block = re.search(rf"```\n\$ lorafuse inspect {shown_as}\n(.*?)```", page, re.S)[1]
        printed = (
            CliRunner()
            .invoke(cli.lorafuse, ["inspect", str(path), "--top", "3"])
            .output.replace(str(out), "build/demo")
        )
        versions = r"made by .*"
        assert re.sub(versions, "", block) == re.sub(versions, "", printed)
