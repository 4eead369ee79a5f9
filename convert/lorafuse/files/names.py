"""Names of files and tensors: the files of a checkpoint, which names stay inside a directory, the natural
order."""

import re
from typing import NamedTuple

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
TORCH_SINGLE = "pytorch_model.bin"  # of torch.save
TORCH_INDEX = f"{TORCH_SINGLE}.index.json"
RECEIPT = "lorafuse_receipt.json"  # of a checkpoint that lorafuse wrote
REPORT = "lorafuse_report.html"  # about that
_NUMBER = re.compile(r"[0-9]{1,18}")
_WHOLE_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")  # between dots
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


class Place(NamedTuple):
    """Where a weight is in the model; `layer` is None for a weight that is in no layer."""

    stack: str
    layer: int | None
    module: str

    @property
    def kind(self) -> str:
        """The weights of a module in all layers: `model.layers.*.mlp.up_proj`."""
        numbered = () if self.layer is None else (self.stack, "*")
        return ".".join(filter(None, (*numbered, self.module)))


def place_of(name: str) -> Place:
    """The parts of a weight's name: of model.layers.3.mlp.experts.7.up_proj.weight the stack `model.layers`,
    the layer 3, and the module `mlp.experts.*.up_proj`, in which a star stands for further numbers."""
    path = name.removesuffix(".weight")
    number = _WHOLE_NUMBER.search(path)
    if not number:
        return Place("", None, path)
    stack, module = path[: number.start()].removesuffix("."), path[number.end() :].removeprefix(".")
    return Place(stack, int(number[0]), _WHOLE_NUMBER.sub("*", module))


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/+)(?:[^/?#]*@)?([^?#]*)")


def without_secrets(name: str) -> str:
    """For messages: a URL, or what is nearly a URL, without its user, query and fragment; a path as it is."""
    url = _URL.match(name)
    return url[1] + url[2] if url else name


def scheme_of(name: str) -> str:
    """`s3` of s3://bucket/key; empty for a path."""
    match = re.match(r"([a-z][a-z0-9+.-]*)://", name)
    return match[1] if match else ""
