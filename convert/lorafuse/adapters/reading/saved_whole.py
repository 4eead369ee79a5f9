"""Parameters that an adapter holds whole: trained, or copies of the base?"""

import re

from lorafuse.adapters.reading.directory import AdapterDir, is_mlx
from lorafuse.adapters.reading.keys import plain_name
from lorafuse.adapters.reading.lora_config import changes_base

# The leaves under which PEFT keeps a module that it trains whole, the adapter's name among them or not.
_TRAINED = re.compile(r"\.modules_to_save(\.[^.]+)?\.(weight|bias)$")


def is_trained_whole(adapter: AdapterDir, key: str) -> bool:
    """Whether modules_to_save has the module of a parameter that is saved whole. What is saved below an
    update
    (`base_layer`) was not trained."""
    name = plain_name(key)
    if ".base_layer." in name:
        return False
    saved = adapter.config.get("modules_to_save")
    modules = tuple(module for module in saved if isinstance(module, str)) if isinstance(saved, list) else ()
    return bool(_TRAINED.search(name)) or name.rpartition(".")[0].endswith(modules)


def is_base_copy(adapter: AdapterDir, key: str) -> bool:
    """Whether a parameter that is saved whole is the base's own, as PEFT saves embeddings of a resized
    vocabulary. Those of PiSSA and the like lack what training took out of them."""
    return not (is_mlx(adapter.config) or changes_base(adapter) or is_trained_whole(adapter, key))
