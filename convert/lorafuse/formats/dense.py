"""The format `dense`: every weight in full precision."""

from collections.abc import Mapping
from typing import Any

from lorafuse.codecs.encoder import Encoder
from lorafuse.codecs.plain import PlainEncoder
from lorafuse.codecs.sources import Sources
from lorafuse.codecs.stored import StoredEncoder
from lorafuse.errors import UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.formats.format import Format, WeightToStore
from lorafuse.settings import Settings


def dense_encoder(weight: WeightToStore) -> Encoder:
    """Of a weight in full precision. Bytes that would not change are copied."""
    sources = weight.sources
    if weight.untouched and sources.as_stored and sources.spec == weight.spec:
        return StoredEncoder(sources.store, {weight.name: sources.names[0]})
    return PlainEncoder(weight.name, weight.spec)


class Dense(Format):
    """Every weight in full precision."""

    def __init__(self, ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> None:
        for option, given in (("--keep-dense", settings.keep_dense), ("--rounding", settings.rounding)):
            if given:
                raise UsageError(f"{option} is for a --format of quantized weights, and dense has none.")

    def encoder_of(self, weight: WeightToStore) -> Encoder:
        return dense_encoder(weight)

    def config(self) -> Mapping[str, Any]:
        return {}

    def warnings(self) -> list[str]:
        return []


class Values(Format):
    """The values of every weight, also of bytes that would not change: what other results are compared
    with."""

    def __init__(self, ckpt: Checkpoint, settings: Settings, weights: Mapping[str, Sources]) -> None:
        pass

    def encoder_of(self, weight: WeightToStore) -> Encoder:
        return PlainEncoder(weight.name, weight.spec)

    def config(self) -> Mapping[str, Any]:
        return {}

    def warnings(self) -> list[str]:
        return []
