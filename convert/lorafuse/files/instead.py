"""What a folder holds that is not what was asked for, and what to do about it: a sentence for a refusal."""

from lorafuse.errors import listed
from lorafuse.files.folder import Folder
from lorafuse.files.names import INDEX, SINGLE

ORDER = "the order is CKPT ADAPTER OUT_DIR."
GGUF = (
    "load that with `gguf_file=` in transformers and save it with save_pretrained, which makes safetensors."
)
DEEPSPEED = (
    " It holds a DeepSpeed checkpoint: `python zero_to_fp32.py . OUT --safe_serialization` makes safetensors "
    "files of it."
)


def instead_of_checkpoint(folder: Folder) -> str:
    """What else a folder without config.json is, with a space before it; empty where it is nothing known."""
    if folder.exists("adapter_config.json"):
        return f" It holds an adapter; {ORDER}"
    return _deepspeed(folder) or instead_of_safetensors(folder)


def instead_of_safetensors(folder: Folder) -> str:
    """The same of a folder without safetensors files."""
    ggufs = folder.names("*.gguf")
    return f" It has {listed(ggufs)}: {GGUF}" if ggufs else ""


def instead_of_adapter(folder: Folder) -> str:
    """What else a folder without an adapter's config is."""
    if folder.exists("config.json") and any(map(folder.exists, (SINGLE, INDEX))):
        return (
            " It holds a whole model: a full fine-tune has nothing to merge; if the arguments are swapped, "
            f"{ORDER}"
        )
    return _deepspeed(folder)


def _deepspeed(folder: Folder) -> str:
    steps = any(name.startswith("global_step") for name in folder.sub_folders())
    return DEEPSPEED if folder.exists("zero_to_fp32.py") or steps else ""
