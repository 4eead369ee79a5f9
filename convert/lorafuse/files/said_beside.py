"""What old libraries wrote into a file of its own, beside a config.json that says nothing of quantization, as
the section that config.json has for it today."""

from collections.abc import Iterable, Mapping
from typing import Any

from lorafuse.errors import shown
from lorafuse.files.folder import Folder
from lorafuse.files.json_yaml import read_json_dict

# A file → the quant_method that it stands for, and the end of a name that such a checkpoint stores: without
# one, the file is a leftover.
FILES = {
    "quantize_config.json": ("gptq", ".qweight"),  # AutoGPTQ
    "quant_config.json": ("awq", ".qweight"),  # AutoAWQ
    "hf_quant_config.json": ("modelopt", ".weight_scale"),  # ModelOpt
}
CONFIG = "config.json"
_TODAY = {"w_bit": "bits", "q_group_size": "group_size"}  # AutoAWQ's names of fields
_OF_FILES = ("model_name_or_path", "model_file_base_name")  # AutoGPTQ's, of its own files


def with_said_beside(
    folder: Folder, config: dict[str, Any], stored: Iterable[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the config with the section that a file beside it stands for, and the files that this is read
    from; the same config where it has a section, or where no file says anything of what is stored. Raises
    FormatError, ValueError and OSError for a broken file."""
    for file, (method, end) in () if _announced(config) else FILES.items():
        if any(name.endswith(end) for name in stored) and folder.exists(file):
            section = _section(read_json_dict(folder, file), method, folder / file)
            return config | {"quantization_config": section}, (CONFIG, file)
    return config, (CONFIG,)


def _announced(part: Mapping[str, Any]) -> bool:
    fields = ("quantization_config", "compression_config", "quantization")
    sections = (value for value in part.values() if isinstance(value, dict))
    return any(isinstance(part.get(name), dict) for name in fields) or any(map(_announced, sections))


def _section(said: dict[str, Any], method: str, file: str) -> dict[str, Any]:
    if "w_bit" in said:
        method = "awq"
    inner = said.get("quantization")
    if method == "modelopt" and not isinstance(inner, dict):
        raise ValueError(f"{file}: quantization is {shown(inner)}; expected an object.")
    section = {_TODAY.get(name, name): value for name, value in said.items() if name not in _OF_FILES}
    if method == "awq" and isinstance(version := section.get("version"), str):
        section["version"] = version.lower()
    return {"quant_method": method, **section}
