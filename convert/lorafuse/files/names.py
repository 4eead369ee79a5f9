"""Names of files and tensors: the files of a checkpoint, which names stay inside a directory, the natural
order."""

import re

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
RECEIPT = "lorafuse_receipt.json"  # of a checkpoint that lorafuse wrote
_NUMBER = re.compile(r"[0-9]{1,18}")


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
    sharded. A number is written with all digits that it can have, behind what is less than any letter."""
    return _NUMBER.sub(lambda number: "\0" + number[0].zfill(18), name)


def scheme_of(name: str) -> str:
    """`s3` of s3://bucket/key; empty for a path."""
    match = re.match(r"([a-z][a-z0-9+.-]*)://", name)
    return match[1] if match else ""
