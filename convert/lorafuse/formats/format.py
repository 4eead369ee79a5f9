"""What a format of the output (`--format`) decides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lorafuse.codecs.encoder import Encoder
from lorafuse.codecs.sources import Sources
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import TensorSpec
from lorafuse.settings import Settings


@dataclass(frozen=True, slots=True)
class WeightToStore:
    """A weight of the output, as a format sees it before it says how the weight is stored. `spec` has the
    dtype that `--dtype` asks for; `untouched`: no adapter has a say in it, so that `sources` are its values;
    `base`: the base's own sources of it, from which `sources` differ where an adapter replaces the weight;
    None where the adapter brings it.
    """

    name: str
    spec: TensorSpec
    sources: Sources
    untouched: bool
    base: Sources | None


class Format(Protocol):
    """How the weights of one output are stored."""

    def foresee(self, weights: Mapping[str, Sources], changing: Mapping[str, Sources]) -> None:
        """Is told, before the first encoder, all weights before any update, and those that an adapter has a
        say in, each with what it is made from then."""
        return

    def encoder_of(self, weight: WeightToStore) -> Encoder:
        """Returns the encoder of a weight. Raises UsageError where the weight cannot be stored so."""

    def config(self) -> Mapping[str, Any]:
        """Returns the fields of config.json that a reader of the weights needs, once all of them have had
        their encoders from here."""

    def left_out(self, dropped: Mapping[str, str]) -> Mapping[str, str]:
        """Returns those of the stored tensors that no weight is made from (→ why) which the output is not to
        have, once all weights have had their encoders from here. The others are copied."""
        return dropped

    def warnings(self) -> list[str]:
        """Returns what a user should know of the weights that had their encoders from here."""


# The base, the settings of a run and the base's weights → a format. Raises UsageError for settings that make
# no sense with it.
MakeFormat = Callable[[Checkpoint, Settings, Mapping[str, Sources]], Format]
