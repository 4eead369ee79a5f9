"""Names that trainers other than PEFT with transformers give to parameters, and where the parameters are.

Unsloth has a linear layer for each expert of gpt-oss; transformers 4, vLLM and others have it for the experts
of every model, also of those whose checkpoints hold stacks. Tinker calls the head `unembed_tokens`, has
`attn` in gpt-oss, `in_proj_q`, `_k` and `_v` in Qwen3.5, and `w1`, `w2`, `w3` for the matrices of experts
(tinker-cookbook, weights/_merge_*.py).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorafuse.naming.aliases import FoundAs, Shape, whole
from lorafuse.patches.target import InStack, Parameter, Part

# Model types whose gate and up take turns in the columns of one stack.
_INTERLEAVED = frozenset({"gpt_oss", "openai_privacy_filter"})

_EXPERT = re.compile(r"(.*\bexperts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_UNSLOTH = re.compile(r"(.*\bexperts)\.(gate_up|down)_projs\.(\d{1,6})\.weight")
_ROUTER = re.compile(r"(.*\brouter)\.linear\.(weight|bias)")
_QKV = re.compile(r"(.*\.linear_attn)\.in_proj_([qkv])\.weight")
_ATTENTION = re.compile(r"(.*\.layers\.\d+)\.attn\.(.*)")
_WORDS = ("experts.", "router.linear.", "in_proj_", ".attn.")  # of the patterns above
_HEAD = re.compile(r"(?:.*\.)?unembed_tokens\.weight")
_HUB = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_PART = {"gate_proj": (0, 2), "up_proj": (1, 2), "down_proj": (0, 1)}
# Whose format a name is, for refusals.
_WHOSE = (
    (re.compile(r"\bunembed_tokens\b|\.in_proj_[qkv]\.|\bexperts\.w[123]\b"), "Tinker"),
    (re.compile(r"\bexperts\.(gate_up|down)_projs\.\d+\.|\brouter\.linear\."), "Unsloth"),
    (re.compile(r"\blm_p\."), "NeMo (a biencoder, of which only `lm_q` is merged)"),
)


def whose(name: str) -> str | None:
    """The trainer that gives such names."""
    return next((trainer for pattern, trainer in _WHOSE if pattern.search(name)), None)


@dataclass(frozen=True, slots=True)
class Origin:
    """A parameter under its own name, and what the other name stands for in it; None where that cannot be."""

    name: str
    cut: Callable[[FoundAs], FoundAs | None]


@dataclass(frozen=True)
class OtherNames:
    """Of one checkpoint. `is_in_out` tells of a weight whether it is a stack (experts, in, out), None where
    that is not known."""

    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    head: str | None
    is_in_out: Callable[[str], bool | None]

    def origins(self, name: str) -> Iterator[Origin]:
        """Where to look for a name that is not there, the first first."""
        if self._has_base_layers:
            module, _, leaf = name.rpartition(".")
            yield Origin(f"{module}.base_layer.{leaf}", lambda found: found)
        if not any(word in name for word in _WORDS):
            return
        model_type = self.config.get("model_type")
        if match := _EXPERT.fullmatch(name):
            experts, number, kind = match.groups()
            leaf = _HUB.get(kind, kind)
            part, n_parts = _PART[leaf]
            if kind != leaf:
                yield Origin(f"{experts}.{number}.{leaf}.weight", lambda found: found)
            for stack, place in (
                (leaf, (0, 1)),
                ("gate_up_proj" if n_parts == 2 else leaf, (part, n_parts)),
            ):
                for suffix in ("", ".weight"):
                    yield self._matrix(f"{experts}.{stack}{suffix}", int(number), *place)
        elif match := _UNSLOTH.fullmatch(name):
            yield self._matrix(f"{match[1]}.{match[2]}_proj", int(match[3]), 0, 1)
        elif match := _ROUTER.fullmatch(name):
            yield Origin(f"{match[1]}.{match[2]}", lambda found: found)
        elif match := _QKV.fullmatch(name):
            which = "qkv".index(match[2])
            yield Origin(f"{match[1]}.in_proj_qkv.weight", lambda found: self._rows(found, which))
        elif model_type == "gpt_oss" and (match := _ATTENTION.fullmatch(name)):
            yield Origin(f"{match[1]}.self_attn.{match[2]}", lambda found: found)

    @cached_property
    def _has_base_layers(self) -> bool:
        """Whether the checkpoint was saved with PEFT's layers in it, as Phi-4-multimodal was."""
        return any(".base_layer." in weight for weight in self.shapes)

    def find_head(self, name: str) -> FoundAs | None:
        """The head, if that is what the name stands for."""
        if self.head is None or self.head not in self.shapes or not _HEAD.fullmatch(name):
            return None
        return whole(self.head, self.shapes[self.head])

    def _matrix(self, stack: str, expert: int, part: int, n_parts: int) -> Origin:
        return Origin(stack, lambda found: self._cut(found, expert, part, n_parts))

    def _cut(self, found: FoundAs, expert: int, part: int, n_parts: int) -> FoundAs | None:
        if not isinstance(found, Parameter) or len(found.parts) != 1 or not found.parts[0].whole:
            return None
        weight, shape = found.parts[0].weight, found.shape
        if len(shape) != 3 or expert >= shape[0]:
            return None
        interleaved = n_parts > 1 and self.config.get("model_type") in _INTERLEAVED
        place = InStack(expert, part, n_parts, interleaved, self.is_in_out(weight))
        return Parameter(shape[1:], (Part(weight, in_stack=place),))

    def _rows(self, found: FoundAs, which: int) -> FoundAs | None:
        """Query, key or value of a linear attention, whose sizes the config has."""
        if not isinstance(found, Parameter) or len(found.parts) != 1 or not found.parts[0].whole:
            return None
        text = self.config.get("text_config")
        config = text if isinstance(text, dict) and "linear_num_key_heads" in text else self.config
        heads = [config.get(f"linear_num_{kind}_heads") for kind in ("key", "key", "value")]
        dims = [config.get(f"linear_{kind}_head_dim") for kind in ("key", "key", "value")]
        sizes = [n * d for n, d in zip(heads, dims, strict=True) if isinstance(n, int) and isinstance(d, int)]
        if len(sizes) < 3 or min(sizes) <= 0 or sum(sizes) != found.shape[0]:
            return None
        part = Part(found.parts[0].weight, sizes[which], weight_row=sum(sizes[:which]))
        return Parameter((sizes[which], *found.shape[1:]), (part,))
