"""How training quantized the base, from the files that lie beside an adapter: `--base-quant auto`, and what a
merge into a base in full precision says where nothing was chosen."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lorafuse.codecs import claims, dense
from lorafuse.errors import LorafuseError, UsageError, listed, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import parse_yaml, read_text
from lorafuse.settings import AUTO, BaseQuant, Settings
from lorafuse.trained_base.config_fields import set_fields
from lorafuse.trained_base.model_names import quantized_by_name
from lorafuse.trained_base.trainer_configs import read_of_folder

CARD = "README.md"
# Of axolotl, LLaMA-Factory and TRL; and a BitsAndBytesConfig that was saved by itself.
SAYING = (CARD, "*.yaml", "*.yml", "*quantization_config*.json", "*bnb_config*.json")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.M | re.S)
NOT_TOLD = (
    "Nothing beside {adapter} tells how training loaded its base. If it was in 4 bits (load_in_4bit), this "
    "result is not the model that was trained: set the option base-quant to nf4."
)


@dataclass(frozen=True)
class Said:
    """What a file beside an adapter says of the base in training: how it was quantized; None: it was not."""

    file: str
    quant: BaseQuant | None

    def __str__(self) -> str:
        return f"{self.file}: {self.quant or 'not quantized'}"


def said_beside(*folders: Folder) -> list[Said]:
    """What the files in the folders say, the first of those that agree. Files that say nothing, or nothing
    that can be repeated here, are left out."""
    said: dict[BaseQuant | None, Said] = {}
    for folder in folders:
        for name in dict.fromkeys(name for pattern in SAYING for name in folder.names(pattern)):
            if found := _said(folder, name):
                said.setdefault(found.quant, found)
    return list(said.values())


def _said(folder: Folder, name: str) -> Said | None:
    """What a file says; None where that is nothing, or nothing that can be repeated here."""
    try:
        return Said(folder / name, read_of_folder(folder, name))
    except UsageError as e:
        return Said(folder / name, None) if e.unquantized else None
    except (LorafuseError, OSError, ValueError):
        return None


def base_of_card(folder: Folder) -> str | None:
    """The base that the front matter of a README.md names, where its name says that it is quantized."""
    try:
        front = _FRONT_MATTER.match(read_text(folder, CARD))
        fields = set_fields(parse_yaml(front[1], CARD)) if front else {}
    except (LorafuseError, OSError, ValueError):
        return None
    named = fields.get("base_model")
    names = named if isinstance(named, list) else [named]
    return next((name for name in names if isinstance(name, str) and quantized_by_name(name)), None)


def settled(settings: Settings, ckpt: Checkpoint, folders: Iterable[Folder]) -> Settings:
    """`settings` with what the files in the folders of the adapters say in place of `auto`; a base that is
    stored quantized is what training saw. Raises UsageError where the files contradict each other."""
    asked = settings.base_quant
    if asked is None or asked.kind != AUTO:
        return settings
    in_full_precision = all(codec is dense for codec, _, _ in claims(ckpt.tensors, ckpt.config))
    told = {said.quant: said for said in said_beside(*folders)} if in_full_precision else {}
    if len(told) > 1:
        raise UsageError(
            f"--base-quant is auto, and the files beside the adapters differ: "
            f"{listed(map(str, told.values()))}. Say how training quantized the base."
        )
    quant = next(iter(told), None)
    if quant is not None:
        quant = replace(quant, blocksize=asked.blocksize, experts=asked.experts)
    return replace(settings, base_quant=quant)


def not_told(adapter: str) -> str:
    """What to ask where nothing beside the adapter tells."""
    return NOT_TOLD.format(adapter=shown(adapter))
