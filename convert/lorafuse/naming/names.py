"""The weights of one checkpoint by name, and which embeddings are tied.

The output carries the checkpoint's own names. A weight that is not stored because it is tied to the input
embedding can be named all the same: it exists as soon as an adapter makes it differ.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafuse.codecs import Sources
from lorafuse.errors import AdapterError, shown
from lorafuse.naming.resolve import Group, Resolver, Warn
from lorafuse.patches.target import Parameter

INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed")
OUTPUT_EMBEDDINGS = {"gpt_neox": "embed_out"}  # by model_type; lm_head elsewhere
# transformers' classes with an output embedding end in one of these.
HEADED = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel|LMHead)$")
# These share one matrix between encoder, decoder and head, and T5 scales its logits when the head is tied:
# untying changes more than the weight.
_SHARED_BY_MORE_THAN_TWO = frozenset(
    {"t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "pegasus", "marian", "m2m_100"}
)


@dataclass(frozen=True)
class TiedPair:
    """An input embedding and the output embedding tied to it. `head_stored`: both are in the checkpoint."""

    embed: str
    head: str
    head_stored: bool


class Names:
    """The weights of one checkpoint by name."""

    def __init__(self, weights: Mapping[str, Sources], config: dict[str, Any]) -> None:
        self.weights, self.config = weights, config
        self.embed = self._find_embed()
        self.head = self._head_of(self.embed) if self.embed else None
        self.tied = self._find_pair()

    def resolve(
        self, wanted: Mapping[str, str], file: object, warn: Warn, groups: Sequence[Group] = ()
    ) -> dict[str, Parameter]:
        """The parameters that an adapter names (parameter → the tensor that names it), found in the
        checkpoint by one rule for all. Of a group, those parameters that are there. Raises AdapterError
        naming the adapter's tensor and what was looked for."""
        shapes = {name: sources.spec.shape for name, sources in self.weights.items()}
        if self.tied:
            shapes.setdefault(self.tied.head, shapes[self.tied.embed])
        return Resolver(shapes, self.config, self.head).resolve(wanted, file, warn, groups)

    def base_of(self, weight: str) -> Sources:
        """What a weight is before any edit: an output embedding that is not stored is the input embedding
        that it is tied to."""
        return self.weights.get(weight) or self.weights[self.embed or ""]

    def may_resize(self, weight: str) -> bool:
        """Whether a replacement may have another number of rows: the embeddings and the head's bias."""
        module = weight.rpartition(".")[0]
        return weight in (self.embed, self.head) or bool(self.head and module == self.head.rpartition(".")[0])

    def refuse_shared(self, file: object) -> None:
        """Raises AdapterError for models whose tied embedding has more than one other user."""
        if self.config.get("model_type") in _SHARED_BY_MORE_THAN_TWO:
            kind = shown(self.config["model_type"])
            raise AdapterError(
                f"{file}: changes an embedding that {kind} shares between encoder, decoder and head; that is "
                "not supported."
            )

    def _find_embed(self) -> str | None:
        found = [
            name
            for name, sources in self.weights.items()
            if name.endswith(".weight")
            and name.split(".")[-2] in INPUT_EMBEDDINGS
            and len(sources.spec.shape) == 2
        ]
        text = [
            name for name in found if not re.search(r"vision|visual|audio|(en|de)coder\.embed_tokens", name)
        ]
        return min(text or found, key=len, default=None)

    def _head_of(self, embed: str) -> str:
        module = OUTPUT_EMBEDDINGS.get(str(self.config.get("model_type")), "lm_head")
        prefix = "language_model." if embed.startswith("language_model.model.") else ""
        head = f"{prefix}{module}.weight"
        return head if head in self.weights or "lm_head.weight" not in self.weights else "lm_head.weight"

    def _find_pair(self) -> TiedPair | None:
        if not self.embed or not self.head or not self.has_head:
            return None
        stored = self.head in self.weights
        flag = _flag(self.config, "tie_word_embeddings")
        # Some classes tie when the field is absent; then no head is stored, under whatever name.
        tied = not self._stores_another_like_embed() if flag is None else bool(flag)
        return TiedPair(self.embed, self.head, stored) if tied else None

    def _stores_another_like_embed(self) -> bool:
        shape = self.weights[self.embed or ""].spec.shape
        return any(
            name != self.embed and sources.spec.shape == shape for name, sources in self.weights.items()
        )

    @property
    def has_head(self) -> bool:
        architectures = self.config.get("architectures") or ["ForCausalLM"]
        return any(HEADED.search(str(name)) for name in architectures)


def _flag(config: dict[str, Any], name: str) -> Any:
    """A field of the config or of its text part."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get(name) is not None:
            return part[name]
    return None
