"""What is installed and published, and the examples of where it runs."""

import json
import re
import tomllib
from pathlib import Path

import click
import yaml

from lorafuse import cli

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = ROOT / "docs" / "examples" / "Dockerfile"
WORKFLOW = ROOT / "docs" / "examples" / "merge.yml"


def test_license_and_authors():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert PROJECT["authors"] == [{"name": "lorafuse contributors"}]
    assert not any(word.startswith("License ::") for word in PROJECT["classifiers"]), (
        "the license field says it"
    )


def test_data_files_of_the_package_are_installed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {
        ROOT.joinpath("convert", *room.split("."), file) for room, files in data.items() for file in files
    }
    there = {
        path
        for path in (ROOT / "convert" / "lorafuse").rglob("*")
        if path.is_file() and path.suffix in (".json", ".typed", ".css", ".html", ".js")
    }
    assert there <= named


def instructions():
    """(instruction, its arguments) of the Dockerfile, lines that go on joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line]


def test_the_dockerfile():
    """As hadolint would have it: pinned bases, a user by number, no cache of pip, commands that are there.
    What is installed is built where there is a compiler, and nothing else comes from there."""
    steps = instructions()
    words = [word for word, _ in steps]
    assert set(words) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    bases = [argument for word, argument in steps if word == "FROM"]
    assert words[0] == "FROM" and re.fullmatch(r"(python:3\.\d+) AS build", bases[0])
    assert bases[1:] == [bases[0].replace(" AS build", "-slim")]
    assert re.fullmatch(r"[1-9]\d*", dict(steps)["USER"]) and "RUN" not in words[words.index("USER") :]
    build, install = (argument for word, argument in steps if word == "RUN")
    assert build == "pip wheel --no-cache-dir --no-deps --wheel-dir /wheels ."
    assert "pip install --no-cache-dir" in install and f"--uid {dict(steps)['USER']} " in install
    copies = [argument for word, argument in steps if word == "COPY"]
    assert copies.pop() == "--from=build /wheels /wheels"
    for argument in copies:
        *sources, _ = argument.split()
        assert all((ROOT / source).exists() for source in sources)
    (command,) = json.loads(dict(steps)["ENTRYPOINT"])
    assert command in PROJECT["scripts"]
    copied = {source for argument in copies for source in argument.split()[:-1]}
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "convert"} <= copied


def test_the_workflow():
    """Its commands are ours, with options that exist."""
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[0] == f"pip install {PROJECT['name']}"
    kinds = {"lorafuse-convert": cli.convert, "lorafuse": cli.lorafuse}
    for line in commands[1:]:
        name, *words = line.split()
        command = kinds[name]
        if isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known
        n_arguments = sum(isinstance(parameter, click.Argument) for parameter in command.params)
        assert len([word for word in words if not word.startswith("-")]) == n_arguments
