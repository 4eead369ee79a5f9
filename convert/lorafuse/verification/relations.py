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
    "other base": "the update on another base: the one before it was quantized, or a relative",
    "other base, untouched": "another base, without the update",
    "unrelated": "neither base nor base + update",
    "not finite": "NaN or infinity, where base + update is finite",
    "extra": "neither the base nor the adapter has it",
    "missing": "not in the directory, or of another shape",
}
GOOD = ("equal", "rounded twice")
