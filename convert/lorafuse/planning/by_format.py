"""How large a result is in each format, so that a user can choose."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from lorafuse.codecs import Sources
from lorafuse.errors import UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.formats import FORMATS
from lorafuse.formats.format import Format
from lorafuse.planning.plan import Step
from lorafuse.settings import Settings


def sizes_by_format(
    ckpt: Checkpoint,
    settings: Settings,
    weights: Mapping[str, Sources],
    steps: Callable[[str, Format], Iterable[Step]],
) -> dict[str, int]:
    """{word of a format: bytes of all weights} of `dense`, and of the formats that are lighter, as far as
    these weights allow them, with everything else as it was chosen. `steps(dtype, format)` plans the
    weights."""
    sizes: dict[str, int] = {}
    for word, make in FORMATS.items():
        plain = word == "dense"
        chosen = replace(
            settings,
            format=word,
            dtype=settings.dtype if plain else "auto",
            keep_dense=() if word in ("dense", "mixed") else settings.keep_dense,
            rounding=None,
        )
        try:
            how = make(ckpt, chosen, weights)
            nbytes = sum(step.nbytes for step in steps(chosen.dtype, how))
            how.config()  # which may not have words for it
        except UsageError:
            continue
        if plain or nbytes < sizes["dense"]:
            sizes[word] = nbytes
    return sizes
