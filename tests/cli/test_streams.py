"""stdout and stderr that are closed, full, without a reader, or in a narrow encoding: what is done is
done."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lorafuse

FIXTURES = Path(__file__).parents[2] / "fixtures"
CKPT, ADAPTER = FIXTURES / "llama-nf4", FIXTURES / "llama-adapter"
FULL = "No space left on device"
LOST = f"Warning: stdout: {FULL}; the rest of what is printed there is lost.\n"


def shell(redirected, *args, code="main", cwd=None, **env):
    """Runs a command of lorafuse in a shell that redirects its streams."""
    script = f"from lorafuse.cli import {code}; {code}()"
    command = f'exec "$@" {redirected}'
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-c", script, *map(str, args)],
        check=False, capture_output=True, text=True, cwd=cwd, env=os.environ | env,
    )  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    lorafuse.convert(CKPT, ADAPTER, out)
    return out


@pytest.mark.parametrize("redirected", ["2>/dev/full", ">/dev/full", "<&- >&- 2>&-"])
def test_a_merge_completes(redirected, tmp_path):
    """And no file of the result gets the number of a closed stream."""
    found = shell(redirected, "convert", CKPT, ADAPTER, tmp_path / "out")
    assert found.returncode == 0
    assert found.stdout == (f"{tmp_path}/out\n" if redirected.startswith("2") else "")
    assert (LOST in found.stderr) == (redirected == ">/dev/full")
    assert lorafuse.verify(tmp_path / "out")["files"] == 5


def test_a_batch_completes(tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(f'{{"adapter": "{ADAPTER}", "name": "a"}}\n{{"adapter": "{ADAPTER}", "name": "b"}}\n')
    assert shell("2>&- >/dev/full", "batch", CKPT, jobs, tmp_path / "root").returncode == 0
    assert lorafuse.verify(tmp_path / "root" / "b")["files"] == 5


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", ">&-"])
def test_the_exit_code_is_that_of_the_work(redirected, merged, tmp_path):
    assert shell(redirected, "inspect", merged).returncode == 0
    assert shell(redirected, "inspect", merged / "config.json").returncode == 3
    assert shell(redirected, "inspect", "--nope").returncode == 2


def test_a_check_ends_with_its_own_code(merged, tmp_path):
    assert shell("2>/dev/full >&-", "verify", merged).returncode == 0
    assert shell("2>/dev/full >&-", "verify", tmp_path).returncode == 8


@pytest.mark.parametrize("buffered", ["", "1"])
def test_what_is_printed_cannot_be_lost_where_it_is_the_result(buffered, merged):
    found = shell(">/dev/full", "inspect", merged, PYTHONUNBUFFERED=buffered)
    assert (found.returncode, found.stdout, found.stderr) == (5, "", f"Error: stdout: {FULL}.\n")


def test_a_plan_is_what_a_dry_run_prints(tmp_path):
    found = shell(">/dev/full", "convert", "--dry-run", CKPT, ADAPTER, tmp_path / "out")
    assert (found.returncode, found.stderr) == (5, f"Error: stdout: {FULL}.\n")


def test_a_reader_that_goes_away(tmp_path):
    """Before the result is complete."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafuse", "convert", "--json", CKPT, ADAPTER, tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0, error
    assert "Broken pipe" not in error
    assert lorafuse.verify(tmp_path / "out")["files"] == 5


def test_characters_that_the_stream_lacks_are_escaped(tmp_path):
    """The path of the result is bytes, and stays what it is."""
    (tmp_path / "base-日本").symlink_to(CKPT)
    found = shell("", "inspect", "base-日本", cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert found.returncode == 0
    assert found.stdout.startswith("checkpoint: base-\\u65e5\\u672c\n")
    found = shell("", "convert", "base-日本", ADAPTER, "out-日本", cwd=tmp_path, PYTHONIOENCODING="latin-1")
    assert (found.returncode, found.stdout) == (0, "out-日本\n")
    assert "into base-\\u65e5\\u672c (" in found.stderr


def test_sigint_that_the_caller_ignores_is_ignored(tmp_path):
    """As by nohup, or of a job in the background of a script. SIGTERM still ends the run."""
    script = (
        "import os, signal, sys\n"
        "from lorafuse.cli import exits\n"
        "with exits.exit_codes():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('goes on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    for how, expected in ((signal.SIG_IGN, (143, "goes on\n")), (signal.SIG_DFL, (130, ""))):
        found = subprocess.run(
            [sys.executable, "-c", script], check=False, capture_output=True, text=True,
            preexec_fn=lambda how=how: signal.signal(signal.SIGINT, how),
        )  # fmt: skip
        assert (found.returncode, found.stdout) == expected
    assert found.stderr == "Error: interrupted; nothing was changed.\n"
