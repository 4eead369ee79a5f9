"""Every command and every piece of Python in the pages runs: page by page, in a directory where the names of
the pages are the fixtures, and against a hub on this machine. Commands within lines name options that exist.
Pages with tests of their own: docs/hub.md (test_docs_hub.py), docs/object-storage.md
(test_docs_object_storage.py), docs/accuracy.md (test_faithfulness.py).

`python tests/project/test_docs_commands.py` writes the pages' blocks of --help.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hub_server import HubServer

import lorafuse
from lorafuse import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"hub.md", "object-storage.md", "accuracy.md"}
ABOUT_RESULTS = {"inspect.md", "report.md"}  # pages that begin with one
PROGRAMS = {"lorafuse-convert": cli.convert, "lorafuse": cli.lorafuse}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
HELP = re.compile(r"(```\n\$ (lorafuse[\w -]*) --help\n)(.*?)(```)", re.S)
INLINE = re.compile(r"`((?:lorafuse|lorafuse-convert) [^`]+)`")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def runnable(page: Path) -> list[tuple[str, str]]:
    """("python", code) and ("", command) of a page, in their order."""
    found = []
    for kind, block in BLOCK.findall(text_of(page)):
        if kind == "python":
            found.append((kind, block))
        elif kind in ("", "sh"):
            lines = [line for line in block.splitlines() if line.split(" ")[0] in PROGRAMS]
            found += [("", line) for line in lines]
    return found


RUN = [page for page in PAGES if page.name not in ELSEWHERE and runnable(page)]


@pytest.fixture
def here(hub: HubServer, tmp_path: Path) -> Iterator[None]:
    """The names that the pages use, in the current directory and on the hub."""
    nf4, lora = ROOT / "fixtures" / "llama-nf4", ROOT / "fixtures" / "llama-adapter"
    tuned = tmp_path / "tuned"
    shutil.copytree(lora, tuned)
    config = json.loads((tuned / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (tuned / "adapter_config.json").write_text(json.dumps(config))
    hub.add("org/base", nf4)
    for repo, branch in (("org/tuned", "main"), ("org/name", "v2"), ("someone/their-lora", "main")):
        hub.add(repo, tuned, branch)
    shutil.copytree(nf4, "base-nf4")
    lorafuse.convert("base-nf4", lora, "base-16bit", adapter_scale=0.0)
    Path("base-16bit/lorafuse_receipt.json").unlink()
    shutil.copytree(tuned, "tuned-adapters/a")
    for name in ("my-adapter", "style-adapter", "my-adapters/a", "my-adapters/b", "adapters/alice"):
        shutil.copytree(lora, name)
    (line,) = re.findall(r"```\n(\{\"adapter\".*?)```", text_of(ROOT / "docs" / "batch.md"), re.S)
    Path("jobs.jsonl").write_text(line)
    Path("fixtures").symlink_to(ROOT / "fixtures")
    return


def run(line: str) -> None:
    """A command line, without its comment. An earlier result of that name gives way."""
    program, *words = shlex.split(line, comments=True)
    if program == "lorafuse-convert":
        shutil.rmtree(words[2], ignore_errors=True)
    elif words[0] == "convert":
        shutil.rmtree(words[3], ignore_errors=True)
    ran = CliRunner().invoke(PROGRAMS[program], words)
    assert ran.exit_code == 0, f"{line}: {ran.output}"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page):
    if page.name in ABOUT_RESULTS:
        lorafuse.convert("base-nf4", "my-adapter", "merged")
    for kind, text in runnable(page):
        if kind:
            exec(compile(text, page.name, "exec"), {})
        else:
            run(text)


@pytest.mark.usefixtures("here")
def test_what_a_batch_prints():
    """One job is done, one fails, one was there already."""
    for name in ("bob", "carol"):
        shutil.copytree("adapters/alice", f"adapters/{name}")
    config = Path("adapters/bob/adapter_config.json")
    config.write_text(config.read_text().replace('"LORA"', '"PREFIX_TUNING"'))
    lorafuse.convert("base-nf4", "adapters/carol", "merged/carol")
    ran = CliRunner().invoke(cli.lorafuse, ["batch", "base-nf4", "adapters", "merged"])
    (shown,) = re.findall(r"```\n(bob: failed.*?)```", text_of(ROOT / "docs" / "batch.md"), re.S)
    times = re.compile(r" in [\w. ]+$", re.M)
    assert (ran.exit_code, times.sub("", ran.stderr)) == (9, times.sub("", shown))


def words_of(line: str) -> list[str]:
    return shlex.split(line.replace("…", "X"), comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_lines_exist(page):
    """By the names of the command and of its options."""
    for line in INLINE.findall(BLOCK.sub("", text_of(page))):
        program, *words = words_of(line)
        command: click.Command = PROGRAMS[program]
        if isinstance(command, click.Group) and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        known = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        known |= {"-h", "--help"}
        assert {word for word in words if word.startswith("-")} <= known, line


def help_of(command: str) -> str:
    """What `command --help` prints."""
    program, *words = command.split()
    return CliRunner().invoke(PROGRAMS[program], [*words, "--help"], prog_name=program).output


@pytest.mark.parametrize(
    "name", ["lorafuse-convert", *(f"lorafuse {name}" for name in cli.lorafuse.commands)]
)
def test_help_is_in_the_pages_and_has_an_example(name):
    blocks = {command: text for page in PAGES for _, command, text, _ in HELP.findall(text_of(page))}
    expected = help_of(name)
    if name != "lorafuse convert":  # which is lorafuse-convert
        assert blocks[name] == expected
    assert re.search(r"^  Examples?:\n    lorafuse", expected, re.M), name


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(HELP.sub(lambda m: m[1] + help_of(m[2]) + m[4], text_of(path)), encoding="utf-8")
