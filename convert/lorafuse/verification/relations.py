"""How a stored weight can relate to a base W and W + Δ, from the best to the worst."""

EXPLAINED = {
    "equal": "base + update, rounded once",
    "rounded twice": "base + update, to within a second rounding to 16 bits",
    "unclear": "base + update or base alone: the update is too small to tell from rounding",
    "damaged": "base + update, except in a few elements",
    "partly merged": "base + update in some places, the base without its update in others",
    "merged twice": "base + twice the update",
    "wrong scale": "base + a multiple of the update",
    "untouched": "the base without its update",
    "requantized": "quantized again after the update was added",
    "other base": "the update on another base: 16-bit for quantized or the reverse, or a relative",
    "other base, untouched": "another base, without the update",
    "other base, unclear": "another base; the update is too small to tell whether it is there",
    "unrelated": "neither base nor base + update",
    "not finite": "NaN or infinity, where base + update is finite",
    "extra": "neither the base nor the adapter has it",
    "missing": "not in the directory, or of another shape",
}
GOOD = ("equal", "rounded twice")
OTHER_BASE = ("other base", "other base, untouched", "other base, unclear")


def what_is_wrong(relations: dict[str, int]) -> str | None:
    """What to say of a directory with so many weights of each relation; None where all are good."""
    lost = {kind: n for kind, n in relations.items() if kind not in GOOD}
    n_lost, n_other = sum(lost.values()), sum(lost.get(kind, 0) for kind in OTHER_BASE)
    if not n_lost:
        return None
    text = f"{n_lost} of {sum(relations.values())} weights are not base + update"
    if 2 * n_other <= n_lost:
        return f"{text}."
    return (
        f"{text}: this was merged into another base (16-bit?). An update fits the weights that it was "
        "trained on: see `--base-quant`."
    )
