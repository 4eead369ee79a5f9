"""The compiled kernel of the sources that are tested, whether it is installed or not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafuse.arithmetic import kernel as lorafuse_kernel
from lorafuse.arithmetic.arena import Arena

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "convert/lorafuse/arithmetic/kernel.c", ROOT / "setup.py")


def built(folder: Path) -> Path:
    """The library: the one that is installed, where it is not older than its sources, or a new one. Skips
    the test where there is no C compiler."""
    for path in SOURCES[0].parent.glob("_kernel.*"):
        if path.stat().st_mtime > max(source.stat().st_mtime for source in SOURCES):
            return path
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("the compiled kernel needs a C compiler, and there is none here")
    command = ["setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return next(folder.rglob("_kernel.*"))


def at_every_level(path: Path) -> list[lorafuse_kernel.Kernel]:
    """The kernel at each level that this processor has."""
    best = lorafuse_kernel.load(str(path))
    assert best, "the kernel cannot be loaded"
    return [best.at(level) for level in range(best.level + 1)]


def arena_of(kernel: lorafuse_kernel.Kernel | None) -> Arena:
    """An arena whose work a kernel does; None: torch."""
    arena = Arena(torch.device("cpu"))
    arena.kernel = kernel
    return arena
