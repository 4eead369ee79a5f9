"""How a stored weight can relate to a base W and W + Δ, from the best to the worst."""

EXPLAINED = {
    "equal": "base + update, rounded once",
    "rounded twice": "base + update, to within a second rounding to 16 bits",
    "untouched": "the base without its update",
    "requantized": "quantized again after the update was added",
    "unrelated": "neither base nor base + update",
    "missing": "not in the directory, or of another shape",
}
GOOD = ("equal", "rounded twice")
