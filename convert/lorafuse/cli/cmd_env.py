"""`lorafuse env`: what a bug report begins with."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from lorafuse._version import __version__
from lorafuse.cli.options import CONTEXT
from lorafuse.cli.streams import tell

PACKAGES = (
    *("torch", "numpy", "safetensors", "huggingface_hub", "click", "tqdm", "pyyaml"),  # what lorafuse needs
    *("bitsandbytes", "transformers", "peft", "accelerate", "compressed-tensors"),  # what loads results
)
# Variables whose values change what a run does. None of them is a secret.
VARIABLES = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@click.command(context_settings=CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def env(*, as_json: bool) -> None:
    """Print versions and the machine, for a bug report: no paths, no names, no secrets.

    \b
    Example:
      lorafuse env
    """
    facts = _facts()
    if as_json:
        tell(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        tell(f"{name:{width}}  {value}")


def _facts() -> dict[str, Any]:
    versions = {name: _version(name) for name in PACKAGES}
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "lorafuse": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        **versions,
        "platform": platform.platform(),
        "processors": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}, {platform.machine()}",
        "memory": f"{memory / 1e9:.1f} GB",
        "cuda": _cuda(),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    """What torch sees of it."""
    try:
        import torch

        from lorafuse.arithmetic.devices import cuda_devices
    except ImportError as e:
        return f"torch cannot be imported: {e}"
    return f"{', '.join(cuda_devices()) or 'no device'} (torch for {torch.version.cuda or 'the CPU'})"
