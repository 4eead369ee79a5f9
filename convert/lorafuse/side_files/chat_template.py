"""The chat template: files of its own, or a field of tokenizer_config.json."""

import json
from contextlib import suppress
from typing import Any

from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import MAX_JSON_NBYTES, read_json_dict, read_limited
from lorafuse.files.safetensors_file import FormatError
from lorafuse.side_files.sets import TEMPLATES, named

TOKENIZER_CONFIG = "tokenizer_config.json"
JINJA = "chat_template.jinja"


def template_files(folder: Folder) -> list[str]:
    """The files that hold templates, and nothing else."""
    return named(folder, TEMPLATES)


def has_template(folder: Folder) -> bool:
    """Whether the folder has a chat template, or may have one: a config that cannot be read is not said to
    lack it."""
    if template_files(folder):
        return True
    config = _config(folder)
    return config is None or bool(config.get("chat_template"))


def inline_template(folder: Folder) -> dict[str, bytes]:
    """The files that say what the field of tokenizer_config.json says, where no file of its own does: a
    template, or several with names."""
    found = (_config(folder) or {}).get("chat_template")
    if isinstance(found, str):
        return {JINJA: found.encode("utf-8", "replace")}
    named = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    texts = {entry.get("name"): entry.get("template") for entry in named}
    return {
        JINJA if name == "default" else f"additional_chat_templates/{name}.jinja": text.encode(
            "utf-8", "replace"
        )
        for name, text in texts.items()
        if isinstance(name, str) and isinstance(text, str) and name.replace("-", "_").isidentifier()
    }


def same_template(first: Folder, second: Folder) -> bool:
    """Whether both folders have the same templates, wherever these stand."""
    return _texts(first) == _texts(second)


def _texts(folder: Folder) -> dict[str, bytes]:
    files = template_files(folder)
    if not files:
        return inline_template(folder)
    texts = {}
    for name in files:
        with suppress(ValueError, FormatError, OSError):
            texts[name] = read_limited(folder, name, MAX_JSON_NBYTES)
    if "chat_template.json" in texts:  # older than the .jinja file, whose text it holds
        with suppress(ValueError, AttributeError, RecursionError):
            text = json.loads(texts.pop("chat_template.json")).get("chat_template")
            texts.setdefault(JINJA, str(text).encode("utf-8", "replace"))
    return texts


def _config(folder: Folder) -> dict[str, Any] | None:
    """Empty where there is none, None for what is no JSON object."""
    try:
        return read_json_dict(folder, TOKENIZER_CONFIG)
    except FileNotFoundError:
        return {}
    except (ValueError, FormatError):
        return None
