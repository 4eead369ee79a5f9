"""Run by test_kill.py: a process that has imported torch, and forks for each command line that it is given.

A line of its input is {"argv", "kill_after", "strace"}, and of its output {"status", "wall_s", "stderr"}, or
{"refused"} where strace may not trace. `strace` are options of it, for a trace from before the command's
first system call.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time

import lorafuse.batching.batch  # noqa: F401
from lorafuse.cli import main

PR_SET_PTRACER, ANY = 0x59616D61, -1


def command(argv, may_begin, stderr):
    """The child: strace, which is its parent's too, may trace it."""
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(ANY))
    os.read(may_begin, 1)
    sys.stdin = sys.stdout = open(os.devnull, "r+")
    sys.stderr = open(stderr, "w", buffering=1, closefd=False)
    sys.argv = ["lorafuse", *argv]
    try:
        main()
    except SystemExit as e:
        os._exit(e.code or 0)


def attached(options, child):
    """(strace of that process, what it says when it traces it or may not)"""
    strace = ["strace", "-f", "-o", os.devnull, *options, "-p", str(child)]
    tracer = subprocess.Popen(strace, stderr=subprocess.PIPE, text=True)
    return tracer, tracer.stderr.readline().strip()


def run(argv, kill_after, strace):
    reading, writing = os.pipe()
    stderr = os.memfd_create("stderr")
    child = os.fork()
    if not child:
        command(argv, reading, stderr)
    tracer, said = attached(strace, child) if strace else (None, "attached")
    began = time.monotonic()
    os.write(writing, b"!")
    if not said.endswith("attached"):
        os.kill(child, signal.SIGKILL)
    elif kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    wall_s = time.monotonic() - began
    if tracer:
        tracer.communicate()
    written = os.pread(stderr, 1 << 20, 0).decode()
    for fd in (reading, writing, stderr):
        os.close(fd)
    if not said.endswith("attached"):
        return {"refused": said}
    return {"status": os.waitstatus_to_exitcode(status), "wall_s": wall_s, "stderr": written}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(**json.loads(line))) + "\n")
        sys.stdout.flush()
