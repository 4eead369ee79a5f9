"""What the name of a checkpoint says of its quantization."""

import re

# What the last part of a repository's name says of how its weights are quantized. Names of other methods come
# first: they also say 4bit (…-GPTQ-4bit).
_OTHERS = (
    "gptq|awq|gguf|exl2|exl3|hqq|aqlm|eetq|mlx|fp8|nvfp4|mxfp4|autoround|quanto|torchao|w4a16|w8a8|w8a16"
)
_BY_NAME = {
    "fp4": re.compile(r"(?<![a-z0-9])(bnb[-_.]?)?fp4(?![a-z0-9])"),
    "nf4": re.compile(r"(?<![a-z0-9])((bnb[-_.]?)?(4[-_]?bits?|nf4)|bnb[-_.]?int4)(?![a-z0-9])"),
    "int8": re.compile(r"(?<![a-z0-9])((bnb[-_.]?)?8[-_]?bits?|bnb[-_.]?int8)(?![a-z0-9])"),
}


def quantized_by_name(name: object) -> str | None:
    """How the weights of a repository or directory are quantized, going by its name: "nf4", "fp4", "int8",
    another method in capitals ("GPTQ"), or None when the name does not say."""
    owner, _, last = str(name).partition("@")[0].rstrip("/\\").lower().replace("\\", "/").rpartition("/")
    other = re.search(rf"(?<![a-z0-9])({_OTHERS})(?![a-z0-9])", last)
    if other or owner.endswith("mlx-community"):
        return other[1].upper() if other else "MLX"
    return next((kind for kind, pattern in _BY_NAME.items() if pattern.search(last)), None)


# What the words of a scheme have where a name has these.
_WORDS = {
    "W4A16": ("4-bit integers",),
    "W8A16": ("8-bit integers",),
    "W8A8": ("int8", "fp8"),
    "AUTOROUND": ("auto-round", "gptq", "awq", "integers"),
    "FP8": ("fp8", "mxfp8"),
}


def is_named(kind: str, bits: int, words: str) -> bool:
    """Whether `kind`, of `quantized_by_name`, may be that of weights whose codes have so many bits and whose
    scheme is `words`."""
    if kind in _BY_NAME:  # a name that says only how many bits there are may be that of any method
        return bits == (8 if kind == "int8" else 4)
    return any(word in words.lower() for word in _WORDS.get(kind, (kind.lower(),)))
