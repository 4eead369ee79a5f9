"""The weights of one checkpoint by name, and which embeddings are tied.

The output carries the checkpoint's own names. A weight that is not stored because it is tied to the input
embedding can be named all the same: it exists as soon as an adapter makes it differ.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorafuse.codecs import Sources
from lorafuse.naming.resolve import Group, Resolver, Warn
from lorafuse.naming.ties import FLAG, Tie, Ties, find_ties
from lorafuse.patches.target import Parameter

INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed")
OUTPUT_EMBEDDINGS = {"gpt_neox": "embed_out"}  # by model_type; lm_head elsewhere
_IN_LAYER = re.compile(r"\.\d+\.")
# transformers' classes with an output embedding end in one of these.
HEADED = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|DoubleHeadsModel|LMHead)$")
# These share one matrix between encoder, decoder and head, and T5 scales its logits when the head is tied:
# untying changes more than the weight.
_SHARED_BY_MORE_THAN_TWO = frozenset(
    {"t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "pegasus", "marian", "m2m_100"}
)


class Names:
    """The weights of one checkpoint by name. `embed` and `head` are the weights of its input and output
    embedding, whether stored or not."""

    def __init__(self, weights: Mapping[str, Sources], config: dict[str, Any]) -> None:
        self.weights, self.config = weights, config
        found = find_ties(weights, config) or self._by_usual_names()
        self.embed, self.head, self.ties, self.sections = found.embed, found.head, found.ties, found.sections
        self.vocab_fields, self.one_vocabulary = found.vocab_fields, found.one_vocabulary
        # That of the embeddings; the others are biases, and weights of parts.
        self.tied = next((tie for tie in self.ties if {self.embed, self.head} <= set(tie.names)), None)
        self._held_by = {name: tie.holder for tie in self.ties for name in tie.others}

    def resolve(
        self, wanted: Mapping[str, str], file: object, warn: Warn, groups: Sequence[Group] = ()
    ) -> dict[str, Parameter]:
        """The parameters that an adapter names (parameter → the tensor that names it), found in the
        checkpoint by one rule for all. Of a group, those parameters that are there. Raises AdapterError
        naming the adapter's tensor and what was looked for."""
        shapes = {name: sources.spec.shape for name, sources in self.weights.items()}
        for name, sources in self.unstored().items():
            shapes[name] = sources.spec.shape
        return Resolver(shapes, self.config, self.head).resolve(wanted, file, warn, groups)

    def base_of(self, weight: str) -> Sources:
        """What a weight is before any edit: one that is not stored is the weight that it is tied to."""
        return self.weights.get(weight) or self.weights[self._held_by[weight]]

    def has(self, weight: str) -> bool:
        """Whether the model has a weight, stored or not."""
        return weight in self.weights or weight in self._held_by

    def unstored(self) -> dict[str, Sources]:
        """The tied weights that are not in the checkpoint, as they are there under another name."""
        return {name: self.weights[tie.holder] for tie in self.ties for name in tie.unstored}

    def rows_of_vocabulary(self) -> list[str]:
        """The weights that have a row for each token: embeddings, whatever is tied to them, and the head's
        bias."""
        names = [name for name in (self.embed, self.head) if name]
        names += [name for tie in self.ties if set(names) & set(tie.names) for name in tie.names]
        bias = f"{self.head.rpartition('.')[0]}.bias" if self.head else ""
        names += [name for tie in self.ties if bias in tie.names for name in tie.names]
        return [name for name in dict.fromkeys([*names, bias, *self._biases_of_logits()]) if self.has(name)]

    def _biases_of_logits(self) -> list[str]:
        """Those beside the head, such as BART's final_logits_bias: outside of layers, one number for each
        token."""
        size = self.base_of(self.embed).spec.shape[0] if self.embed and self.has(self.embed) else 0
        return [
            name
            for name, sources in self.weights.items()
            if name.endswith("bias")
            and sources.spec.shape in ((size,), (1, size))
            and not _IN_LAYER.search(name)
        ]

    def may_resize(self, weight: str) -> bool:
        """Whether a replacement may have another number of rows."""
        return weight in self.rows_of_vocabulary()

    def _by_usual_names(self) -> Ties:
        """For classes that the table does not have."""
        embed = self._find_embed()
        head = self._head_of(embed) if embed else None
        if not embed or not head or not self._usually_tied(embed, head):
            return Ties(embed, head)
        fixed = self.config.get("model_type") in _SHARED_BY_MORE_THAN_TWO
        unstored = frozenset({head} - self.weights.keys())
        return Ties(embed, head, [Tie(embed, (head,), unstored, fixed)])

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

    def _usually_tied(self, embed: str, head: str) -> bool:
        flag = _flag(self.config, FLAG)
        # Some classes tie when the field is absent; then no head is stored, under whatever name.
        return self.has_head and (not self._stores_another_like(embed) if flag is None else bool(flag))

    def _stores_another_like(self, embed: str) -> bool:
        shape = self.weights[embed].spec.shape
        return any(name != embed and sources.spec.shape == shape for name, sources in self.weights.items())

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
