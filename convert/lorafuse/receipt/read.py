"""A receipt in sum: how much of the update was kept in all, where least, and what helps. Needs no torch.

With Δ_i the update of weight i, and kept_i and noise_i as in measure.py, the figures of all weights are those
of one long vector: kept = Σ kept_i ‖Δ_i‖² / Σ ‖Δ_i‖² and noise² = Σ noise_i² ‖Δ_i‖² / Σ ‖Δ_i‖².
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

from lorafuse.errors import ResultError, shown
from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.names import RECEIPT
from lorafuse.files.safetensors_file import FormatError
from lorafuse.files.tensors import DTYPES, SAFETENSORS_NAMES
from lorafuse.receipt.fields import SCHEMA, Receipt

# Where a smaller share of the update is kept, another dtype is worth a word.
ENOUGH_KEPT = 0.97
# Where the rounding of a quantized weight adds more than so many times the update, too.
MUCH_NOISE = 1.0
# How the weight was written → what keeps more.
REMEDIES = {
    "nearest on the base's grid": "without --rounding nearest the update is kept on average",
    "quantized": "--keep-dense PATTERN leaves modules in full precision, --format dense all of them",
    "bfloat16": "--dtype float16 keeps 3 more bits (an overflow ends the run), --dtype float32 keeps "
    "everything",
    "float16": "--dtype float32 keeps everything",
}
MOST_DIMENSIONS = 16
_FIGURES = ("delta_norm", "delta_rel", "kept", "noise", "changed", "clipped")
_FIELDS: dict[str, type] = {"tool": dict, "settings": dict, "inputs": list, "outputs": list, "tensors": dict}
_FIELDS |= {"adapter_tensors": dict, "base_semantics": str}

Entries = Mapping[str, Mapping[str, Any]]  # what a receipt says of each weight


def read_receipt(folder: Folder) -> Receipt | None:
    """The receipt of a merged directory, with everything that is read of it anywhere of the right type; None
    when it has none. Raises ResultError for one that is damaged."""
    path = folder / RECEIPT
    # A pattern finds a link that leads nowhere too, which is a damaged receipt.
    if not folder.exists(RECEIPT) and RECEIPT not in folder.names(f"{RECEIPT}*"):
        return None
    try:
        receipt = read_json_dict(folder, RECEIPT)
    except (FormatError, ValueError) as e:
        raise ResultError(str(e)) from None
    if receipt.get("schema") != SCHEMA:
        raise ResultError(
            f"{shown(path)}: is no receipt of schema {SCHEMA}; a newer lorafuse may have written it."
        )
    broken = next(_broken(receipt), None)
    if broken is not None:
        raise ResultError(f"{shown(path)}: is damaged: {shown(broken)} is missing or of another kind.")
    return cast(Receipt, receipt)


def merged_inputs(receipt: Receipt, role: Literal["checkpoint", "adapter"]) -> list[dict[str, Any]]:
    """The inputs of a role as the user named them, `path`, each with its `weight` or None: each of them has a
    config, whose path is the input's and the file's."""
    config = "/config.json" if role == "checkpoint" else "/adapter_config.json"
    configs = [
        entry for entry in receipt["inputs"] if entry["role"] == role and entry["path"].endswith(config)
    ]
    return [{"path": entry["path"].removesuffix(config), "weight": entry.get("weight")} for entry in configs]


class StoredEntry(NamedTuple):
    """A stored tensor of a merged directory, and the weight that it belongs to, as the receipt says."""

    name: str
    weight: str
    dtype: Any
    shape: Any


def stored_tensors(tensors: Entries) -> Iterator[StoredEntry]:
    """The stored tensors that a receipt's weights became: as a rule one, of the weight's own name."""
    for weight, entry in tensors.items():
        for name, spec in entry.get("stored", {weight: entry}).items():
            yield StoredEntry(name, weight, spec["dtype"], spec["shape"])


def _broken(receipt: dict[str, Any]) -> Iterator[str]:
    """The fields that are not as they should be; a later one is looked at only when those before it are
    right."""
    yield from (name for name, kind in _FIELDS.items() if not isinstance(receipt.get(name), kind))
    yield from ["dropped"] * (not isinstance(receipt.get("dropped", {}), dict))
    for name, fields in (("inputs", {"role": str, "path": str}), ("outputs", {"file": str, "size": int})):
        yield from (name for entry in receipt[name] if not _has(entry, fields))
    adapter_tensors = {"used": list, "ignored": dict}
    yield from ["adapter_tensors"] * (not _has(receipt["adapter_tensors"], adapter_tensors))
    for name, entry in receipt["tensors"].items():
        stored = entry.get("stored", {}) if isinstance(entry, dict) else None
        right = (
            _has(entry, {"action": str})
            and isinstance(stored, dict)
            and all(_is_spec(spec) for spec in (entry, *stored.values()))
        )
        yield from [name] * (not right or not all(_is_figure(entry.get(figure)) for figure in _FIGURES))


def _is_spec(value: object) -> bool:
    """A dtype and a shape."""
    return (
        isinstance(value, dict)
        and _has(value, {"dtype": str, "shape": list})
        and len(value["shape"]) <= MOST_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**63 for n in value["shape"])
    )


def _has(value: object, fields: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in fields.items())


def _is_figure(value: object) -> bool:
    # The bound is that of their squares, and neither NaN nor Infinity, which Python's JSON knows, is within
    # it.
    return value is None or (isinstance(value, int | float) and -1e75 < value < 1e75)


def worst_first(tensors: Entries) -> list[str]:
    """The merged weights: those that keep the smallest share of their update first, of these those with more
    noise; those without a figure (no update at all, or a base that is not finite) last."""
    merged = [name for name, entry in tensors.items() if entry["action"] == "merged"]
    return sorted(merged, key=lambda name: _badness(tensors[name]))


def _badness(entry: Mapping[str, Any]) -> tuple[float, float]:
    kept, noise = entry.get("kept"), entry.get("noise")
    return math.inf if kept is None else kept, -(noise or 0.0)


def kept_in_sum(tensors: Entries, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How much of the update is in the stored weights: `kept` and `noise` over all of them, `least` in the
    weight `least_in`, the number `n_below` of those that keep less than enough, and the `remedy`; `n_noisy`:
    quantized weights with more than MUCH_NOISE. None where there is no figure or no remedy. `settings`: those
    of the receipt."""
    names = [name for name in worst_first(tensors) if tensors[name].get("kept") is not None]
    squares = [(tensors[name].get("delta_norm") or 0.0) ** 2 for name in names]
    total = sum(squares)
    kept = sum(square * tensors[name]["kept"] for square, name in zip(squares, names, strict=True))
    noise = sum(
        square * (tensors[name].get("noise") or 0.0) ** 2 for square, name in zip(squares, names, strict=True)
    )
    below = [name for name in names if tensors[name]["kept"] < _enough(tensors[name])]
    noisy = [
        name
        for name in names
        if "clipped" in tensors[name] and (tensors[name].get("noise") or 0.0) > MUCH_NOISE
    ]
    poor = [tensors[name] for name in (*below, *noisy)]
    written = {"quantized" if "clipped" in entry else entry["dtype"] for entry in poor}
    if "quantized" in written and settings.get("rounding") == "nearest" and _on_base_grid(settings):
        written.add("nearest on the base's grid")
    return {
        "kept": kept / total if total else None,
        "noise": math.sqrt(noise / total) if total else None,
        "least": tensors[names[0]]["kept"] if names else None,
        "least_in": names[0] if names else None,
        "n_below": len(below),
        "n_noisy": len(noisy),
        "remedy": next((remedy for how, remedy in REMEDIES.items() if how in written), None),
    }


def delta_rel_in_sum(tensors: Entries) -> float | None:
    """‖Δ‖ / ‖W‖ over all merged weights that have an update, as of one long vector. ‖W‖ of each follows from
    its `delta_norm` and `delta_rel`. None where no weight has both."""
    deltas = [(entry.get("delta_norm") or 0.0, entry.get("delta_rel") or 0.0) for entry in tensors.values()]
    known = [(norm, norm / relative) for norm, relative in deltas if norm and relative]
    of_base = math.hypot(*(base for _, base in known))
    return math.hypot(*(norm for norm, _ in known)) / of_base if of_base else None


def _on_base_grid(settings: Mapping[str, Any]) -> bool:
    """Whether a result has the base's own scales, or those that training saw."""
    quant = settings.get("base_quant") or {}
    return settings.get("format") in ("base", "light", quant.get("kind"))


def _enough(entry: Mapping[str, Any]) -> float:
    """Of a weight that was rounded without bias, less three times what chance makes of `kept`."""
    if entry.get("rounding") != "unbiased":
        return ENOUGH_KEPT
    return ENOUGH_KEPT - 3 * (entry.get("noise") or 0.0) / math.sqrt(max(math.prod(entry["shape"]), 1))


def sizes_in_sum(tensors: Entries) -> dict[str, Any]:
    """`nbytes` of all stored tensors, `dense_nbytes` of the weights in their own dtypes, and
    `bits_per_weight`: 8 · nbytes over the number of elements. Dtypes that are not known count 0."""
    nbytes = sum(_nbytes(stored.dtype, stored.shape) for stored in stored_tensors(tensors))
    numel = sum(math.prod(entry["shape"]) for entry in tensors.values())
    return {
        "nbytes": nbytes,
        "dense_nbytes": sum(_nbytes(entry["dtype"], entry["shape"]) for entry in tensors.values()),
        "bits_per_weight": 8 * nbytes / numel if numel else None,
    }


def _nbytes(dtype: str, shape: list[int]) -> int:
    known = SAFETENSORS_NAMES.get(dtype)
    return DTYPES[known][0] * math.prod(shape) if known else 0
