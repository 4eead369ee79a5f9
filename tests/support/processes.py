"""Peak memory of processes."""

import subprocess
import sys
from functools import cache

# ru_maxrss of a child starts at its parent's, so a small process does the starting.
LAUNCH = (
    "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:]); r = os.wait4(p.pid, 0); print(r[1], "
    "r[2].ru_maxrss)"
)


def peak_nbytes(*command, exit_codes=(0,)):
    out = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCH, *command], capture_output=True, text=True, check=True
    ).stdout
    status, kilobytes = out.split()[-2:]
    assert int(status) in [code << 8 for code in exit_codes]
    return int(kilobytes) * 1024


@cache
def of_torch():
    """Peak memory of `import torch`. As for the runs that are compared with it, the libraries are in the page
    cache by then: of those that are not, up to 1 MB less is mapped."""
    command = (sys.executable, "-c", "import torch")
    peak_nbytes(*command)
    return min(peak_nbytes(*command) for _ in range(2))


def beyond_torch(*arguments, exit_codes=(0,)):
    """Peak memory of the command line beyond that of `import torch`."""
    command = [sys.executable, "-m", "lorafuse.cli", *map(str, arguments)]
    return peak_nbytes(*command, exit_codes=exit_codes) - of_torch()
