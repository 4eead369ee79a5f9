"""README and docs say what is so: the help text is the real one, commands exist, links lead somewhere."""

import re
from pathlib import Path

from click.testing import CliRunner

import lorafuse
from lorafuse import cli, errors

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def test_the_two_commands_come_first():
    assert re.search(r"```\n(.*?)```", README, re.S)[1].split("\n") == ["make demo", "make test", ""]


def test_the_help_block_is_what_the_command_prints():
    shown = CliRunner().invoke(cli.convert, ["--help"], prog_name="lorafuse-convert").output
    block = re.search(r"```\n\$ lorafuse-convert --help\n(.*?)```", README, re.S)[1]
    assert block == shown


def test_the_exit_codes_are_those_of_the_exceptions():
    codes = {
        c.exit_code
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, errors.LorafuseError)
    }
    rows = re.search(r"## Exit codes\n\n(.*?)\n\n", README, re.S)[1]
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


def test_every_module_has_its_line_in_the_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    package = ROOT / "convert" / "lorafuse"
    for module in package.rglob("*.py"):
        if not module.name.startswith("_"):
            assert module.name in text, module.name


def test_inspect_prints_what_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "demo"
    lorafuse.convert("fixtures/llama-nf4", "fixtures/llama-adapter", out)
    for path, shown_as in (("fixtures/llama-nf4", "fixtures/llama-nf4"), (out, "build/demo --top 3")):
        block = re.search(rf"```\n\$ lorafuse inspect {shown_as}\n(.*?)```", README, re.S)[1]
        printed = (
            CliRunner()
            .invoke(cli.lorafuse, ["inspect", str(path), "--top", "3"])
            .output.replace(str(out), "build/demo")
        )
        versions = r"made by .*"
        assert re.sub(versions, "", block) == re.sub(versions, "", printed)
