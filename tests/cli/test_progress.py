"""How far a run is: a bar on a terminal that leaves nothing behind, lines from time to time elsewhere."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from build import adapter_tensors, checkpoint_tensors, write_checkpoint, write_told_adapter

from lorafuse import cli
from lorafuse.cli import progress
from lorafuse.cli.progress import Progress, lasting

ROOT = str(Path(cli.__file__).parents[2])
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import lorafuse.outdir.output as output
real = output.Output.write
def write(self, *args):
    time.sleep(0.05)
    return real(self, *args)
output.Output.write = write
from lorafuse.cli import main
main()
"""


def on_a_terminal(*args, interrupt=False, **environment):
    """Everything that the command prints when stdout and stderr are one terminal, and its exit code."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(root=ROOT), *map(str, args)], stdin=theirs, stdout=theirs,
        stderr=theirs, env=os.environ | environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    last_resort = threading.Timer(60, child.kill)
    last_resort.start()
    printed = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        printed += data
        if interrupt and b"%" in printed:
            child.send_signal(signal.SIGINT)
            interrupt = False
        if not data:
            break
    os.close(ours)
    last_resort.cancel()
    return child.wait(timeout=60), printed.decode()


def screen(printed):
    """The lines that a terminal shows in the end: a carriage return goes back to the beginning of a line."""
    lines = []
    for line in ESCAPE.sub("", printed).replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


@pytest.fixture
def inputs(tmp_path):
    return write_checkpoint(tmp_path / "ckpt"), write_told_adapter(tmp_path / "adapter"), tmp_path / "out"


def test_a_bar_with_label_rate_and_time_left_that_leaves_a_clean_line(inputs):
    code, printed = on_a_terminal("convert", *inputs)
    assert code == 0
    assert re.search(r"merging +\d+% \|.*\| [\d.]+k?B of 10\.9kB, +[\d.?]+k?B/s, [\d:?]+ left", printed)
    first, second = screen(printed)
    assert first.startswith("Merged ") and second == str(inputs[2])


def test_ctrl_c_leaves_a_clean_line(inputs):
    code, printed = on_a_terminal("convert", *inputs, interrupt=True)
    assert code == 130
    assert screen(printed)[-1].startswith("Error: interrupted; ")
    assert not [line for line in screen(printed) if "%" in line]


def test_what_is_said_meanwhile_has_lines_of_its_own(inputs, tmp_path):
    """A batch with a warning: no rest of the bar is before or after it."""
    tensors = adapter_tensors(checkpoint_tensors(), 0.01)
    for name in ("one", "two"):
        write_told_adapter(tmp_path / "jobs" / name, tensors)
    code, printed = on_a_terminal("batch", inputs[0], tmp_path / "jobs", tmp_path / "root")
    assert code == 0
    lines = screen(printed)
    starts = [
        r"(one|two): done, \d+\.\d% of the update kept",
        "Warning: (one|two): 4 weights keep less",
        "/",
    ] * 2
    assert len(lines) == 7
    for line, start in zip(lines, [*starts, r"In all: 2 done; 26\.\d KB in "], strict=True):
        assert re.match(start, line), line


def test_files_that_two_results_share_count_once(inputs, tmp_path):
    """The bar of a pass ends at 100 %: its bytes are those that are written."""
    import lorafuse

    for name in ("one", "two"):
        write_told_adapter(tmp_path / "jobs" / name)
    events = []
    lorafuse.batch(
        inputs[0], tmp_path / "jobs", tmp_path / "root", max_shard_size="3KB", on_event=events.append
    )
    (begun,) = [event for event in events if event["event"] == "pass"]
    written = sum(event["nbytes"] for event in events if event["event"] == "progress")
    plans = sum(event["nbytes"] for event in events if event["event"] == "plan")
    assert begun["nbytes"] == written < 0.8 * plans


def test_colours_on_a_terminal_only(inputs):
    """None with NO_COLOR, and none where nothing is a terminal."""
    args = ("convert", inputs[0], inputs[1] / "nowhere", inputs[2])
    code, printed = on_a_terminal(*args)
    assert code == 4 and "\x1b[31m" in printed
    assert "\x1b[3" not in on_a_terminal(*args, NO_COLOR="1")[1]
    done = subprocess.run([sys.executable, "-m", "lorafuse", *map(str, args)], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": ROOT})  # fmt: skip
    assert done.stderr.startswith("Error: ") and "\x1b" not in done.stderr


def test_a_heartbeat_where_nothing_is_a_terminal(monkeypatch, capsys):
    """A line every 30 seconds, with the rate since the beginning, in which what was there has no part."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shown = Progress()
    shown.begin("merging", 10_000_000)
    shown.skip(2_000_000)
    for seconds in (10, 29, 31, 59, 62):
        now = 1000.0 + seconds
        shown.advance(1_000_000)
    shown.end()
    assert capsys.readouterr() == (
        "",
        "merging: 5.00 MB of 10.0 MB (50%), 96.8 KB/s, about 52 s left\n"
        "merging: 7.00 MB of 10.0 MB (70%), 80.6 KB/s, about 37 s left\n",
    )
    quiet = Progress(quiet=True)
    quiet.begin("merging", 10)
    now += progress.HEARTBEAT_S
    quiet.advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_heartbeat_of_a_download(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = progress.Progress()
    shown.begin("merging", 10**9)
    shown.wait("model.safetensors", 10**9, 5 * 10**9)
    assert capsys.readouterr().err == ""
    now += progress.HEARTBEAT_S
    shown.wait("model.safetensors", 2 * 10**9, 5 * 10**9)
    assert capsys.readouterr().err == "Fetching model.safetensors: 2.00 GB of 5.00 GB\n"


def test_more_than_all_is_not_counted(monkeypatch, capsys):
    """Two results may both have a file that they share."""
    shown = Progress()
    shown.begin("pass 1", 100)
    shown.skip(80)
    shown.skip(80)
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.0)
    shown.advance(0)
    assert "100 bytes of 100 bytes (100%)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "less than a second"), (1, "1 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"),
     (7290, "2 h 2 min")],
)  # fmt: skip
def test_lasting(seconds, said):
    assert lasting(seconds) == said
