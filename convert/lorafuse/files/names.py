"""Names of files and tensors: the files of a checkpoint, which names stay inside a directory, the natural
order."""

import re

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
RECEIPT = "lorafuse_receipt.json"  # of a checkpoint that lorafuse wrote
REPORT = "lorafuse_report.html"  # about that
_NUMBER = re.compile(r"[0-9]{1,18}")
_LEADING_ZERO = re.compile(r"(?<![0-9])0[0-9]")


def stays_inside(name: str) -> bool:
    """Whether a name from a file may be a path inside its directory, on any system."""
    plain = name.isprintable() and not set(name) & set("\\:")
    return (
        plain
        and not name.startswith("/")
        and all(part != ".." and len(part.encode()) < 256 for part in name.split("/"))
    )


def natural_key(name: str) -> str:
    """Sorts layers.2 before layers.10: the order of a model's execution, and independent of how the input is
    sharded. Before a number stands how many digits it has, behind what is less than any letter."""
    key = _NUMBER.sub(_by_size, name)
    return f"{key}\0\0{name}" if _LEADING_ZERO.search(name) else key  # layers.1 and layers.01 are two names


def _by_size(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    return f"\0{chr(len(digits) + 1)}{digits}"


def scheme_of(name: str) -> str:
    """`s3` of s3://bucket/key; empty for a path."""
    match = re.match(r"([a-z][a-z0-9+.-]*)://", name)
    return match[1] if match else ""
