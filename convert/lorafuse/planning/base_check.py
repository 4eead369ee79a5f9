"""Is the checkpoint the base that the adapter was trained on?

Shapes and names that do not fit are refused elsewhere; `naming_the_base` adds the base's name to such a
refusal. Beyond these the files tell the name of the base in the adapter's config, copies of base weights in
the adapter, and the receipt of a merge.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lorafuse.adapters import AdapterDir, Edit
from lorafuse.adapters.reading.directory import is_mlx
from lorafuse.adapters.reading.lora_config import changes_base
from lorafuse.adapters.reading.saved_whole import is_trained_whole
from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs import Sources
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.folder import Folder, read_fully
from lorafuse.files.hashing import hash_file
from lorafuse.files.names import RECEIPT
from lorafuse.files.safetensors_file import FormatError
from lorafuse.naming import Names
from lorafuse.patches.patch import Base
from lorafuse.trained_base.beside_adapter import base_of_card, not_told, said_beside
from lorafuse.trained_base.model_names import is_named, quantized_by_name

# At most as many as torch's ops take in one thread: more threads would bring stacks and arenas of their own.
_CHUNK_NUMEL = 1 << 15
# What casts on loading and saving leave: half a step of bfloat16, and of float16's smallest numbers.
_RTOL, _ATOL = 2.0**-8, 2.0**-25
_RECEIPT_NBYTES = 1_000_000
_LORA = re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)(?:\.|$)")


@contextmanager
def naming_the_base(adapter: AdapterDir) -> Iterator[None]:
    """Adds to the refusal of an adapter that does not fit the base that its config names."""
    try:
        yield
    except AdapterError as e:
        if not e.misfit or adapter.base_name is None:
            raise
        raise AdapterError(
            f"{e} The adapter's config names {shown(adapter.base_name)} as its base."
        ) from None


def base_warnings(
    ckpt: Folder, weights: Mapping[str, Sources], adapters: Sequence[AdapterDir], note: Callable[[str], None]
) -> Iterator[str]:
    """What to say about adapters that were trained on other weights than those of the checkpoint, or
    on what it was before they were merged into it. `note` gets what to ask where no file tells."""
    yield from _adapters_in_base(ckpt, weights)
    yield from _other_precision(ckpt, weights, adapters, note)
    yield from _before_the_scale(ckpt, weights, adapters)
    yield from _merged_before(ckpt, adapters)


def _adapters_in_base(ckpt: Folder, weights: Mapping[str, Sources]) -> Iterator[str]:
    """Of a checkpoint that was saved with an adapter in it which was not merged."""
    inside = [weight for weight in weights if _LORA.search(weight)]
    if inside:
        yield (
            f"{shown(ckpt)}: holds tensors of an adapter, {listed(inside, most=2)}. They are copied and not "
            "merged; programs that do not know them ignore them."
        )


def _before_the_scale(
    ckpt: Folder, weights: Mapping[str, Sources], adapters: Sequence[AdapterDir]
) -> Iterator[str]:
    """Adapters of parameters, on experts in FP8. PEFT adds their update to the codes: a model whose experts
    stayed FP8 multiplied it with the scale, and rounded it."""
    in_fp8 = (name for name, sources in weights.items() if sources.scheme.kind == "fp8" and "expert" in name)
    expert = next(in_fp8, None)
    for adapter in adapters if expert is not None else ():
        if adapter.config.get("target_parameters"):
            yield (
                f"{adapter.file}: was trained with target_parameters, and {shown(expert)} of {shown(ckpt)} "
                "is stored in FP8. If experts stayed FP8 in training, what they computed is no sum of "
                "weights and update, and the result is another model; the files do not tell. If training "
                "dequantized the base (FineGrainedFP8Config(dequantize=True)), the result is the model that "
                "was trained."
            )


def _merged_before(ckpt: Folder, adapters: Sequence[AdapterDir]) -> Iterator[str]:
    """By the checkpoint's own receipt: all files with tensors are the same. They are read only where the
    receipt has one of that size."""
    entries = _merged_files(ckpt)
    for adapter in adapters:
        names = adapter.files[1:]  # the first is the config, in which no tensor is
        if all(any(_is_file(entry, adapter.folder, name) for entry in entries) for name in names):
            yield (
                f"{adapter.file}: was merged into {shown(ckpt)} already, as its {RECEIPT} says; now its "
                "update is added once more. Merge into the checkpoint before that, unless this is what you "
                "want."
            )


def _merged_files(ckpt: Folder) -> list[dict[str, Any]]:
    """The inputs in the receipt of a checkpoint. Only the beginning is read, where they stand: that of a
    large model has megabytes. Empty where it cannot be read: nothing depends on it."""
    try:
        with closing(ckpt.open(RECEIPT)) as file:
            text = read_fully(file, 0, _RECEIPT_NBYTES).decode("ascii")
        inputs, _ = json.JSONDecoder().raw_decode(text.partition('"inputs": ')[2])
    except (OSError, ValueError, RecursionError, FormatError):
        return []
    return [entry for entry in inputs if isinstance(entry, dict)] if isinstance(inputs, list) else []


def _is_file(entry: dict[str, Any], folder: Folder, name: str) -> bool:
    """Whether a receipt's entry has the size, and then the hash, of a file."""
    return (
        entry.get("size") == folder.facts(name).nbytes
        and entry.get("sha256") == hash_file(folder, name).sha256
    )


def _other_quantization(
    ckpt: Folder, weights: Mapping[str, Sources], adapters: Sequence[AdapterDir]
) -> Iterator[str]:
    """Adapters whose base was quantized otherwise than the checkpoint is, going by the name that their config
    or their card has."""
    schemes = {sources.scheme for sources in weights.values() if sources.scheme.kind != "dense"}
    for adapter in adapters if schemes else ():  # none where --base-quant says how training quantized it
        named = _quantized_base(adapter)
        kind = quantized_by_name(named)
        if kind is None or any(is_named(named, s.kind, s.bits, f"{s.kind} {s}") for s in schemes):
            continue
        stored = listed(sorted(map(str, schemes)), most=2)
        yield (
            f"{adapter.file}: was trained on {shown(named)}, whose weights are quantized "
            f"({kind}), but {shown(ckpt)} is stored in {stored}: the update was trained on weights that were "
            "rounded otherwise, so the result is not the model that was trained."
        )


def _folders_of(adapter: AdapterDir) -> tuple[Folder, ...]:
    """Where files about the adapter may lie."""
    return (adapter.folder,) if adapter.sub_folder is None else (adapter.folder, adapter.root)


def _quantized_base(adapter: AdapterDir) -> str | None:
    """The base that the adapter's config names, else that of its card, if the name says that it is
    quantized."""
    named = adapter.base_name
    return named if quantized_by_name(named) else base_of_card(adapter.folder)


def _other_precision(
    ckpt: Folder, weights: Mapping[str, Sources], adapters: Sequence[AdapterDir], note: Callable[[str], None]
) -> Iterator[str]:
    """Adapters whose base was quantized, going by its name or by the files beside them, when the checkpoint's
    weights are not, nor taken as if they were. `note` gets a question where nothing tells."""
    if any(not sources.as_stored for sources in weights.values()):
        yield from _other_quantization(ckpt, weights, adapters)
        return
    for adapter in adapters:
        named = _quantized_base(adapter)
        kind = quantized_by_name(named)
        merged = f"{shown(ckpt)} is in full precision"
        lost = (
            "the update was trained on rounded weights, so on these the result is not the model that was "
            "trained"
        )
        if kind is None:
            told = said_beside(*_folders_of(adapter))
            if not told:
                note(not_told(adapter.name))
            yield from (
                f"{said.file}: says that training quantized the base ({said.quant}), but {merged}: {lost}. "
                f"Take --base-quant-from {said.file}, or --base-quant auto, which takes what the files "
                "beside the adapter say."
                for said in told
                if said.quant is not None
            )
            continue
        base = shown(named)
        if kind in ("nf4", "fp4", "int8"):
            yield (
                f"{adapter.file}: was trained on {base}, whose weights are quantized ({kind}), but {merged}: "
                f"{lost}. Merge into that checkpoint, or take --base-quant {kind}, or --base-quant-from its "
                "config.json, which names the modules that it leaves out."
            )
        else:
            yield (
                f"{adapter.file}: was trained on {base}, whose weights are quantized ({kind}), but {merged}: "
                f"{lost}. How {kind} rounds them cannot be repeated here."
            )


@dataclass(frozen=True)
class BaseCopy:
    """A weight of the base that an adapter holds whole without having trained it, and the checkpoint's
    own."""

    adapter: AdapterDir
    key: str
    weight: str
    copy: Sources
    base: Sources

    def difference(self) -> str | None:
        """What to say when the two are not the same in the rows that both have. Reads both, a few rows at a
        time."""
        n_rows = min(self.copy.spec.shape[0], self.base.spec.shape[0])
        n_cols = max(self.base.spec.n_cols, 1)
        ours, theirs = (Base(sources, Arena(torch.device("cpu"))) for sources in (self.copy, self.base))
        step, n_differing = max(_CHUNK_NUMEL // n_cols, 1), 0
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            same = torch.isclose(
                ours.rows(start, stop), theirs.rows(start, stop), _RTOL, _ATOL, equal_nan=True
            )
            n_differing += int((~same.all(dim=1)).sum())
        if not n_differing:
            return None
        base = f", {shown(self.adapter.base_name)}" if self.adapter.base_name else ""
        return (
            f"{self.adapter.file}: {shown(self.key)} is the adapter's own copy of {shown(self.weight)}, and "
            f"is taken; it differs from the checkpoint's in {n_differing} of {n_rows} rows: is this the base "
            f"that it was trained on{base}?"
        )


def base_copies(adapter: AdapterDir, edits: Mapping[str, Edit], names: Names) -> list[BaseCopy]:
    """The copies of base weights in an adapter. PEFT saves the weight below an adapted embedding, and whole
    embeddings when the vocabulary was resized (save_embedding_layers); those in modules_to_save were trained,
    and PiSSA's are no copies."""
    if is_mlx(adapter.config) or changes_base(adapter):
        return []
    copies: dict[str, BaseCopy] = {}
    for weight, edit in edits.items():
        if edit.replaced and edit.replaced.as_stored and names.has(weight):
            base = names.base_of(weight)
            (key,) = edit.replaced.names
            if base.as_stored and (key.endswith(".base_layer.weight") or _is_embedding(weight, names)):
                copies.setdefault(key, BaseCopy(adapter, key, weight, edit.replaced, base))
    if any(is_trained_whole(adapter, key) for key in copies):
        return [copy for copy in copies.values() if copy.key.endswith(".base_layer.weight")]
    return list(copies.values())


def _is_embedding(weight: str, names: Names) -> bool:
    return names.may_resize(weight) and not weight.endswith("bias")
