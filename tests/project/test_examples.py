"""The examples for clusters: each is what its program takes, and its commands do on the fixtures what they
say. The programs themselves (Slurm, Kubernetes) are not here; their schemas are."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from scenario import content

import lorafuse
from lorafuse import cli

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
MANIFESTS = [EXAMPLES / name for name in ("batch.yaml", "convert.yaml", "commit.yaml")]
SCRIPTS = sorted(EXAMPLES.glob("*.sbatch"))
# What `man sbatch` says of the options that the examples have.
SBATCH = {
    "job-name": r"[\w.-]+",
    "array": r"\d+-\d+(:\d+)?(%\d+)?",
    "cpus-per-task": r"[1-9]\d*",
    "mem": r"[1-9]\d*[KMGT]?",
    "time": r"(\d+-)?\d{1,2}:\d{2}(:\d{2})?",
    "signal": r"([RB]:)?(\w+)(@\d{1,5})?",
    "requeue": "",
    "kill-on-invalid-dep": r"yes|no",
    "dependency": r"after(ok|any|notok|corr)?:\d+",
}
SHIM = '#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done >> "$CALLS"; printf "\\n" >> "$CALLS"\n'


@pytest.fixture
def calls(tmp_path):
    """calls(command, **environment) → the command lines of lorafuse that it runs"""
    (tmp_path / "bin").mkdir()
    shim, log = tmp_path / "bin" / "lorafuse", tmp_path / "calls"
    shim.write_text(SHIM)
    shim.chmod(0o755)

    def run(command, **environment):
        log.write_text("")
        path = f"{shim.parent}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "CALLS": str(log)} | environment
        subprocess.run(command, check=True, env=env)
        return [line.split("\0")[:-1] for line in log.read_text().splitlines()]

    return run


@pytest.fixture
def models(tmp_path):
    """The fixtures under the names of the examples, and the result of one run."""
    path = tmp_path / "models"
    path.mkdir()
    shutil.copytree(ROOT / "fixtures/llama-nf4", path / "base")
    shutil.copytree(ROOT / "fixtures/llama-adapter", path / "adapter")
    lorafuse.convert(path / "base", path / "adapter", path / "alone", max_shard_size="50KB")
    return path


def invoke(words):
    ran = CliRunner().invoke(cli.lorafuse, words)
    assert ran.exit_code == 0, (words, ran.output)


def without_options(words):
    """`convert` with smaller files, so that there is something to divide."""
    return [*words, "--max-shard-size", "50KB"]


def check(models):
    assert content(models / "merged") == content(models / "alone")


# ---- Slurm


def options_of(text):
    """{name: value} of the lines of #SBATCH."""
    lines = re.findall(r"^#SBATCH (.*)$", text, re.M)
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    assert all(word.startswith("--") for word in words), words
    return {name: value for name, _, value in (word[2:].partition("=") for word in words)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_for_slurm_are_valid(path):
    text = path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    assert text.startswith("#!/bin/bash\n")
    options = options_of(text)
    assert {"job-name", "time", "mem"} <= options.keys()
    for name, value in options.items():
        assert re.fullmatch(SBATCH[name], value), f"--{name}={value}"
    body = text.partition("set -euo")[0]
    assert all(line.startswith("#") for line in body.splitlines() if line)  # sbatch reads no further


def test_a_model_by_an_array_and_the_job_that_depends_on_it(calls, models):
    script = EXAMPLES / "convert.sbatch"
    arguments = [str(models / name) for name in ("base", "adapter", "merged")]
    first, last = options_of(script.read_text())["array"].split("-")
    for array in (range(int(first), int(last) + 1), range(4, 7)):  # as it is, and as somebody may submit it
        parts = [
            calls(
                ["bash", script, *arguments],
                SLURM_ARRAY_TASK_ID=str(task),
                SLURM_ARRAY_TASK_MIN=str(array[0]),
                SLURM_ARRAY_TASK_COUNT=str(len(array)),
            )
            for task in array
        ]
        for (words,) in parts:
            invoke(without_options(words))
        ((words),) = calls(["bash", EXAMPLES / "commit.sbatch", *arguments])
        invoke(without_options(words))
        check(models)
        shutil.rmtree(models / "merged")


def test_the_comments_submit_them(tmp_path):
    """With a program in the place of sbatch that says what it is given."""
    shim = tmp_path / "sbatch"
    shim.write_text('#!/bin/sh\necho "$@" >> "$SAID"; echo 4711\n')
    shim.chmod(0o755)
    lines = re.findall(r"^#   (.*sbatch.*)$", (EXAMPLES / "convert.sbatch").read_text(), re.M)
    said = tmp_path / "said"
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said)}
    subprocess.run(["bash", "-euc", "\n".join(lines)], check=True, env=env, capture_output=True)
    first, second = said.read_text().splitlines()
    assert first.split()[:2] == ["--parsable", "docs/examples/convert.sbatch"]
    (dependency,) = (word for word in second.split() if word.startswith("--dependency="))
    assert dependency == "--dependency=afterok:4711"
    assert re.fullmatch(SBATCH["dependency"], dependency.partition("=")[2])
    assert second.split()[1] == "docs/examples/commit.sbatch" and first.split()[2:] == second.split()[2:]


# ---- Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path):
    manifest = yaml.safe_load(path.read_text())
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    spec = manifest["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container.get("env", [])}
    if spec.get("completionMode") == "Indexed":
        assert environment["JOB_COMPLETIONS"] == str(spec["completions"]) == str(spec["parallelism"])
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_what_a_schema_refuses():
    manifest = yaml.safe_load(MANIFESTS[1].read_text())
    manifest["spec"]["completion"] = manifest["spec"].pop("completions")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def container_of(path, models):
    """Command and environment, with the models of the test."""
    (container,) = yaml.safe_load(path.read_text())["spec"]["template"]["spec"]["containers"]
    command = [word.replace("/models", str(models)) for word in container["command"]]
    return command, {entry["name"]: entry["value"] for entry in container.get("env", [])}


def test_a_model_by_an_indexed_job_and_the_job_after_it(calls, models):
    command, environment = container_of(MANIFESTS[1], models)
    for index in range(int(environment["JOB_COMPLETIONS"])):
        (words,) = calls(command, JOB_COMPLETION_INDEX=str(index), **environment)
        invoke(without_options(words))
    ((words),) = calls(container_of(MANIFESTS[2], models)[0])
    invoke(without_options(words))
    check(models)
