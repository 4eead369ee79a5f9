"""Streams that are closed, full, without a reader or in another encoding: a result that is complete is exit
0, and what is printed is escaped to what the stream can take."""

import errno
import os
import subprocess
import sys

import pytest
from build import write_checkpoint, write_told_adapter

CONVERT = [sys.executable, "-m", "lorafuse", "convert"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    return write_checkpoint(path / "ckpt"), write_told_adapter(path / "adapter")


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    """The weights of a result, {file: bytes}, that has nothing to print."""
    out = tmp_path_factory.mktemp("reference") / "out"
    subprocess.run([*CONVERT, "-q", *inputs, out], check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def shell(script, *arguments, **environment):
    return subprocess.run(
        ["bash", "-c", script, "bash", *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        encoding=environment.get("PYTHONIOENCODING"),
        text=True,
        check=False,
    )


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">/dev/full", ">&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("options", ["", "-v", "--json"])
def test_a_result_is_complete_whoever_listens(redirection, options, inputs, reference, tmp_path):
    out = tmp_path / "out"
    script = f'"$1" -m lorafuse convert {options} "$2" "$3" "$4" {redirection}'
    done = shell(script, sys.executable, *inputs, out)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == reference


def test_a_pipe_without_a_reader(inputs, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*CONVERT, *inputs, tmp_path / "out"], stdout=writing, stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == 0 and (tmp_path / "out/lorafuse_receipt.json").exists()


def test_an_error_keeps_its_exit_code(inputs, tmp_path):
    for redirection in ("2>&-", "2>/dev/full"):
        script = f'"$1" -m lorafuse convert "$2" "$3" "$4" {redirection}'
        assert (
            shell(script, sys.executable, inputs[0], tmp_path / "nowhere", tmp_path / "out").returncode == 4
        )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_plan_that_cannot_be_printed_is_an_error(unbuffered, inputs, tmp_path):
    """Also when Python flushes its buffer at the end, which has an exit code of its own."""
    script = '"$1" -m lorafuse convert --dry-run "$2" "$3" "$4" >/dev/full'
    done = shell(script, sys.executable, *inputs, tmp_path / "out", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (5, f"Error: the output: {os.strerror(errno.ENOSPC)}.\n")


def test_what_the_stream_cannot_spell_is_escaped(inputs, tmp_path):
    for command in (f"convert {inputs[0]} {tmp_path}/ä€ {tmp_path}/out", f"inspect {tmp_path}/ä€"):
        done = shell(
            f'"$1" -m lorafuse {command}', sys.executable, PYTHONIOENCODING="latin-1", PYTHONUTF8="0"
        )
        assert done.returncode in (3, 4) and "Traceback" not in done.stderr
        assert "\\u20ac" in done.stderr


def test_a_signal_that_the_caller_ignores_is_ignored(inputs, tmp_path):
    """As `nohup` and a script's background jobs want it."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from lorafuse.cli import main_convert\n"
        "import lorafuse.batching.one_pass as one_pass\n"
        "real = one_pass.merge\n"
        "def merge(*a, **k):\n    signal.raise_signal(signal.SIGINT)\n    return real(*a, **k)\n"
        "one_pass.merge = merge\n"
        "main_convert()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *inputs, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
