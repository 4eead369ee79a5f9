"""Names of side files: those that belong together, and come from one folder, and those that are never
copied."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from lorafuse.files.folder import Folder
from lorafuse.files.names import RECEIPT


class FileSet(NamedTuple):
    """Files that belong together: a mixture of two folders' would be a set that never existed. A folder has
    the set where it has a file that matches one of `marks`."""

    names: tuple[str, ...]
    marks: tuple[str, ...]


# transformers' VOCAB_FILES_NAMES, and the names of tokenizers that come as remote code. A test compares.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "*.tiktoken",
    "tiktoken.model",
    "prophetnet.tokenizer",
    "vocab-src.json",
    "vocab-tgt.json",
    "dict.txt",
    "byte_maps.json",
    "entity_vocab.json",
    "target_vocab.json",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TOKENIZER = FileSet(
    (
        *VOCABULARIES,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "bpe.codes",
        "normalizer.json",
        "emoji.json",
        "word_shape.json",
        "word_pronunciation.json",
        *TEMPLATES,
    ),
    VOCABULARIES,
)
_PROCESSOR_NAMES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
)
PROCESSOR = FileSet(_PROCESSOR_NAMES, _PROCESSOR_NAMES)
MODULES = "modules.json"
SENTENCE_TRANSFORMERS = FileSet(
    (MODULES, "config_sentence_transformers.json", "sentence_*_config.json"), (MODULES,)
)
SETS = (TOKENIZER, PROCESSOR, SENTENCE_TRANSFORMERS)

GENERATION = "generation_config.json"  # not for a model with another head
# Sub-folders that loaders look into without being told.
FOLDERS = ("additional_chat_templates", "custom_generate")
# Files that look like weights and are needed to load models of a type.
LIKE_WEIGHTS = {"qwen2_5_omni": ("spk_dict.pt",)}
# Written anew, or true of the checkpoint's own weights alone: a loader that finds them takes the result for
# quantized, or for an adapter.
NEVER = (
    "config.json",
    RECEIPT,
    "adapter_config.json",
    "adapters.json",
    "*quant*config*.json",
    "quant_model_description*.json",
    "*.part",  # of a download that was cut off
    "*.incomplete",
)


def belongs(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches a name as `Folder.names` sees it: a * matches no slash."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def named(folder: Folder, patterns: Iterable[str]) -> list[str]:
    """The files in a folder that match, in the order of the patterns. By the names in the folder: a link
    that leads nowhere is found only so."""
    inner = sorted({pattern.rpartition("/")[0] for pattern in patterns if "/" in pattern})
    names = [name for where in ("*", *(f"{part}/*" for part in inner)) for name in folder.names(where)]
    return [name for pattern in patterns for name in names if belongs(name, [pattern])]
