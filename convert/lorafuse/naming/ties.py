"""Which weights of a checkpoint are one parameter, by its class: `ties.json`.

fixtures/make_ties.py makes that table from transformers and explains it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lorafuse.naming.table import Renames

FLAG = "tie_word_embeddings"
_SHARED_BLOCK = re.compile(
    r"(?P<before>(?:.*\.)?layers\.)(?P<layer>\d+)(?P<after>\.shared_transf(?:ormer)?\..*)"
)


@dataclass(frozen=True)
class Tie:
    """One parameter that a model has under several names, those of the checkpoint: an input embedding and the
    output embedding that is tied to it, or a bias and its other name. The checkpoint holds `holder`, and of
    the others those that are not `unstored`. A tie that is `fixed` cannot be undone in config.json."""

    holder: str
    others: tuple[str, ...]
    unstored: frozenset[str]
    fixed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.holder, *self.others)


@dataclass
class Ties:
    """The weights of a class's input and output embedding by the checkpoint's names, whether stored or not;
    the ties; and the sections of config.json whose flag these follow too. `vocab_fields`, None where the
    class is not known, are the fields of config.json that hold the number of the embedding's rows, with dots
    between sections; `one_vocabulary` says whether the head has as many, since it may be tied."""

    embed: str | None
    head: str | None
    ties: list[Tie] = field(default_factory=list)
    sections: frozenset[str] = frozenset()
    vocab_fields: tuple[str, ...] | None = None
    one_vocabulary: bool = False


@cache
def load_ties() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("ties.json").read_text(encoding="utf-8"))
    return table


def find_ties(weights: Iterable[str], config: Mapping[str, Any]) -> Ties | None:
    """None where the class is not in the table, or neither of its embeddings is in the checkpoint."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    entry = _entry(name, config)
    if entry is None or config.get("auto_map"):  # remote code has classes of its own
        return None
    finder = _Finder(weights, config)
    embed, head = entry.get("embed"), entry.get("head")
    groups: dict[str, list[str]] = {}
    for target, source in _by_layout(entry.get("to", {}), weights, config).items():
        groups.setdefault(source, []).append(target)
    kin = [{source, *targets} for source, targets in groups.items()]
    known = {embed, head}.union(*(names for names in kin if names & {embed, head}))
    if not any(finder.stored(name) for name in known if name):
        return None
    ties = [
        tie
        for source, targets in groups.items()
        if (tie := _tie([source, *(t for t in targets if finder.is_tied(t, entry))], finder, entry))
    ]
    return Ties(
        embed and finder.name(embed),
        head and finder.name(head),
        ties,
        frozenset(entry.get("sections", {}).values()),
        tuple(entry.get("vocab", ["vocab_size"])) if embed else (),
        one_vocabulary=any({embed, head} <= names for names in kin),
    )


def _entry(name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry of a class. Of a model that AutoModel composes, the section of the config says which class is
    inside; where it is not the one that the table has, nothing is known."""
    classes = load_ties()["classes"]
    decoder = config.get("decoder")
    if name.endswith("EncoderDecoderModel") and isinstance(decoder, dict):
        return _of_decoder(classes.get(str((decoder.get("architectures") or [""])[0])))
    entry: dict[str, Any] | None = classes.get(name)
    for section, model_type in entry.get("inside", {}).items() if entry else ():
        part = config.get(section)
        if not isinstance(part, dict) or part.get("model_type", model_type) != model_type:
            return None
    return entry


def _of_decoder(inner: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The entry of a model whose decoder is of a class that has one."""
    if inner is None:
        return None
    to = {f"decoder.{target}": f"decoder.{source}" for target, source in inner.get("to", {}).items()}
    ends = {side: f"decoder.{inner[side]}" for side in ("embed", "head") if side in inner}
    vocab = [f"decoder.{path}" for path in inner.get("vocab", ["vocab_size"])]
    return {**inner, **ends, "to": to, "vocab": vocab, "sections": dict.fromkeys(to, "decoder")}


def _by_layout(to: dict[str, str], weights: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The pairs of the table, with those of Zamba's shared blocks for the layers that the config has: the
    hybrid layers take the first ones' blocks in turn (transformers 5.23, modeling_zamba2.py, get_layers)."""
    if not any(_SHARED_BLOCK.fullmatch(target) for target in to):
        return to
    kinds, hybrid = config.get("layers_block_type"), config.get("hybrid_layer_ids")
    if isinstance(kinds, list):
        hybrid = [number for number, kind in enumerate(kinds) if kind == "hybrid"]
    n_blocks = config.get("num_mem_blocks", 1)
    if not isinstance(hybrid, list) or not hybrid or type(n_blocks) is not int or n_blocks < 1:
        return to
    pairs = {target: source for target, source in to.items() if not _SHARED_BLOCK.fullmatch(target)}
    for weight in weights:
        match = _SHARED_BLOCK.fullmatch(weight)
        for first, layer in enumerate(hybrid[:n_blocks]) if match else ():
            if match and match["layer"] == str(layer):
                others = hybrid[first + n_blocks :: n_blocks]
                pairs |= {f"{match['before']}{other}{match['after']}": weight for other in others}
    return pairs


def _tie(members: list[str], finder: "_Finder", entry: Mapping[str, Any]) -> Tie | None:
    """The first of the members that is stored holds the values of all."""
    stored = {member: name for member in members if (name := finder.stored(member))}
    if len(members) < 2 or not stored:
        return None
    names = {member: stored.get(member) or finder.name(member) for member in members}
    holder = next(iter(stored.values()))
    others = tuple(name for name in dict.fromkeys(names.values()) if name != holder)
    unstored = frozenset(name for member, name in names.items() if member not in stored)
    return Tie(holder, others, unstored, bool(entry.get("always"))) if others else None


class _Finder:
    """The weights of one checkpoint by their names in memory."""

    def __init__(self, weights: Iterable[str], config: Mapping[str, Any]) -> None:
        self._weights, self._config = frozenset(weights), config
        self._renames = Renames(dict(config))
        # Few ties are inside numbered layers, and those keep their names.
        self._by_memory_name = {
            memory: weight
            for weight in sorted(self._weights)
            if not re.search(r"\.\d+\.", weight)
            for memory, component in self._renames.memory_names(weight)
            if component is None
        }

    def stored(self, parameter: str) -> str | None:
        """The weight that holds a parameter, perhaps in a checkpoint of the base model alone."""
        if parameter in self._weights:
            return parameter
        base = f"{self._renames.base_prefix}."
        return self._by_memory_name.get(parameter) or self._by_memory_name.get(parameter.removeprefix(base))

    def name(self, parameter: str) -> str:
        """The weight that holds a parameter, or the name under which it would be stored: with the prefix of
        its neighbours, where loading takes that off."""
        if stored := self.stored(parameter):
            return stored
        for prefix in ("language_model.",):
            name = prefix + parameter
            beside = any(weight.startswith(f"{prefix}model.") for weight in self._weights)
            if beside and self._renames.memory_names(name) == [(parameter, None)]:
                return name
        return parameter

    def is_tied(self, target: str, entry: Mapping[str, Any]) -> bool:
        """By the config's flag, that of the part where there is one; else by the class, and where the
        weight is not stored."""
        section = entry.get("sections", {}).get(target)
        parts = [self._config.get(section)] if section else [self._config, self._config.get("text_config")]
        flags = [part[FLAG] for part in parts if isinstance(part, dict) and part.get(FLAG) is not None]
        unstored = self.stored(target) is None
        if flags and not unstored:
            return bool(flags[0])
        # Some configs take the flag over from their text part.
        return (
            any(flags) or bool(entry.get("always")) or (not flags and (bool(entry.get("tied")) or unstored))
        )
