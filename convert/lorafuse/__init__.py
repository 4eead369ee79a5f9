"""Merge LoRA and QLoRA adapters into safetensors checkpoints, a tile at a time, without loading the model.

    >>> import lorafuse
    >>> receipt = lorafuse.convert("base-nf4", "my-adapter", "merged")

The command line (`lorafuse-convert`) is a thin layer over `convert`.
"""

from typing import TYPE_CHECKING, Any

from lorafuse._version import __version__
from lorafuse.errors import LorafuseError

if TYPE_CHECKING:
    from lorafuse.batching.batch import batch
    from lorafuse.inspection import inspect
    from lorafuse.pipeline import convert
    from lorafuse.verification.verify import verify

__all__ = ["LorafuseError", "__version__", "batch", "convert", "inspect", "verify"]


def __getattr__(name: str) -> Any:
    # `import lorafuse` must not import torch: the command line shows its help without it.
    if name == "convert":
        from lorafuse.pipeline import convert

        return convert
    if name == "inspect":
        from lorafuse.inspection import inspect

        return inspect
    if name == "batch":
        from lorafuse.batching.batch import batch

        return batch
    if name == "verify":
        from lorafuse.verification.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
