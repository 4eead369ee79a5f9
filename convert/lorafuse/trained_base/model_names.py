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
    owner, last = _parts(name)
    other = re.search(rf"(?<![a-z0-9])({_OTHERS})(?![a-z0-9])", last)
    if other or owner.endswith("mlx-community"):
        return other[1].upper() if other else "MLX"
    return next((kind for kind, pattern in _BY_NAME.items() if pattern.search(last)), None)


def _parts(name: object) -> tuple[str, str]:
    """All but the last part, and the last, in small letters."""
    owner, _, last = str(name).partition("@")[0].rstrip("/\\").lower().replace("\\", "/").rpartition("/")
    return owner, last


_OF_BITSANDBYTES = re.compile(r"(?<![a-z0-9])(bnb|nf4)")
# What the words of a scheme have where a name has these.
_WORDS = {
    "W4A16": ("4-bit integers",),
    "W8A16": ("8-bit integers",),
    "W8A8": ("int8", "fp8"),
    "AUTOROUND": ("auto-round", "gptq", "awq", "integers"),
    "FP8": ("fp8", "mxfp8"),
}


def is_named(name: object, stored_as: str, bits: int, words: str) -> bool:
    """Whether a name that says how weights are quantized may be that of weights in the scheme `stored_as`,
    whose codes have so many bits, and which `words` describe."""
    kind = quantized_by_name(name) or ""
    if kind in _BY_NAME and _OF_BITSANDBYTES.search(_parts(name)[1]):
        return stored_as in (("int8",) if kind == "int8" else ("nf4", "fp4"))
    if kind in _BY_NAME:  # a name that says only how many bits there are may be that of any method
        return bits == (8 if kind == "int8" else 4)
    return any(word in words.lower() for word in _WORDS.get(kind, (kind.lower(),)))
