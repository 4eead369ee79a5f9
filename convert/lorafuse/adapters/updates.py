"""What adapters say of parameters, and what that does to weights: Update, Choice, Edit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Sources
from lorafuse.files.tensors import Box
from lorafuse.patches.patch import Patch, same_patches
from lorafuse.patches.target import Parameter, Target

COMPARE_NUMEL = 1 << 18


@dataclass(frozen=True)
class Update:
    """What an adapter says about one parameter, before the checkpoint is known: a replacement, or a patch
    that `make(target)` builds, which raises AdapterError when it does not fit.

    An `optional` one is left out where the checkpoint has no such parameter (a bias); its keys belong to
    another update too.
    """

    parameter: str  # in the adapter's naming
    keys: tuple[str, ...]
    replaced: Sources | None = None
    make: Callable[[Target], Patch] | None = None
    optional: bool = False
    beside: str | None = (
        None  # another parameter that the patch has to read: a bias that depends on its weight
    )
    stacked: bool = False  # `make` knows stacks of matrices and their parts
    # rank and scale, where they are known before the weight is
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Choice:
    """What an adapter says about some of several parameters, without saying which: their shapes decide.

    `settle` maps the parameters found, by name, to updates; it raises AdapterError when none or several ways
    fit. The checkpoint must have `least` of the parameters, or all of them where it is None.
    """

    parameters: tuple[str, ...]  # in the adapter's naming
    keys: tuple[str, ...]
    settle: Callable[[Mapping[str, Parameter]], list[Update]]
    least: int | None = None


@dataclass
class Edit:
    """Everything that one adapter, or all of them, do to one weight: perhaps other sources, then patches in
    order."""

    replaced: Sources | None = None
    patches: list[Patch] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # the adapter tensors that it uses

    def same_as(self, other: "Edit") -> bool:
        return _same_sources(self.replaced, other.replaced) and same_patches(self.patches, other.patches)


def _same_sources(a: Sources | None, b: Sources | None) -> bool:
    """Whether two replacements are equal to the bit, compared in pieces."""
    if a is b:
        return True
    if a is None or b is None:
        return False
    if a.spec != b.spec:
        return False
    arenas = [Arena(torch.device("cpu")), Arena(torch.device("cpu"))]
    for start in range(0, a.spec.numel, COMPARE_NUMEL):
        box = Box.of_run(a.spec, start, min(start + COMPARE_NUMEL, a.spec.numel))
        raws = [s.fetch(box, arena) for s, arena in zip((a, b), arenas, strict=True)]
        if not all(torch.equal(x, y) for x, y in zip(*raws, strict=True)):
            return False
    return True
