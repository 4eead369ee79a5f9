"""`lorafuse env` and `lorafuse completion`."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import lorafuse
from lorafuse import cli


def test_env_says_versions_and_the_machine_and_no_path_or_name(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = CliRunner().invoke(cli.lorafuse, ["env"])
    assert result.exit_code == 0
    said = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert said["lorafuse"] == lorafuse.__version__
    assert said["torch"] == version("torch")
    assert said["HF_HUB_OFFLINE"] == "1"
    assert said["cuda"].endswith(f"(torch for {torch.version.cuda or 'the CPU'})")
    for hidden in ("hf_secret", str(Path.home()), os.uname().nodename):
        assert hidden not in result.stdout
    facts = json.loads(CliRunner().invoke(cli.lorafuse, ["env", "--json"]).stdout)
    assert {name: str(value) for name, value in facts.items()} == said


def test_env_of_a_machine_without_a_package(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from lorafuse.cli import cmd_env

    def version_of(package):
        if package == "peft":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(cmd_env, "version", version_of)
    assert json.loads(CliRunner().invoke(cli.lorafuse, ["env", "--json"]).stdout)["peft"] == "not installed"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_both_commands(shell, tmp_path):
    result = CliRunner().invoke(cli.lorafuse, ["completion", shell])
    assert result.exit_code == 0
    for name in ("_LORAFUSE_COMPLETE", "_LORAFUSE_CONVERT_COMPLETE"):
        assert f"{name}={shell}_complete" in result.stdout
    if shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(result.stdout)
        subprocess.run([shell, "-n", script], check=True)


@pytest.mark.parametrize(
    ("words", "offered"), [("lorafuse ver", "verify"), ("lorafuse convert --dt", "--dtype")]
)
def test_what_bash_completes(words, offered):
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_LORAFUSE_COMPLETE": "bash_complete"}
    code = "from lorafuse.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert f"plain,{offered}" in done.stdout.splitlines()
