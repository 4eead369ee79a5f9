"""docs/adapters.md says what is done with every PEFT type; it is made from the tables of the package.

`python tests/adapters/test_support_table.py` writes it. Every module says what it merges in SUPPORTED and
what it holds in MEMORY. A module without the constants REFUSED_FIELDS and REFUSED_INITS refuses no field
by its mere presence, and knows no such initialization.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorafuse
from lorafuse.adapters import ADAPTERS, REFUSED_TYPES, module_of
from lorafuse.errors import AdapterError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
TYPES = {kind: module_of(kind) for kind in sorted(ADAPTERS)}
DEFAULTS = {"REFUSED_FIELDS": {}, "REFUSED_INITS": {}}
INTRO = """# PEFT types

Made from the adapter modules by `python tests/adapters/test_support_table.py`, and checked by the tests:
every type of PEFT has a row.

An adapter is merged as PEFT's unmerged model computes, in fp32 and with one rounding, or it is refused before
anything is written (exit code 4), with the reason below.

MLX stands for the adapters of MLX-LM, whose configs have a `fine_tune_type` instead of a `peft_type`.

## Merged

*Memory*: what is held of one weight at a time beside its tiles and the module's own adapter tensors; *tiles*
stands for nothing more.

"""


def fact(module, name):
    return vars(module)[name] if name in vars(module) else DEFAULTS[name]


def page():
    lines = ["| `peft_type` | what is merged | memory |", "|---|---|---|"]
    for kind, module in TYPES.items():
        lines.append(f"| {kind} | {fact(module, 'SUPPORTED')} | {fact(module, 'MEMORY')} |")
    lines += [
        "",
        "Config fields that are refused when they are set:",
        "",
        "| `peft_type` | field | why |",
        "|---|---|---|",
    ]
    for kind, module in TYPES.items():
        lines += [f"| {kind} | `{field}` | {why} |" for field, why in fact(module, "REFUSED_FIELDS").items()]
        lines += [
            f"| {kind} | `init_lora_weights` = `{init}` | {why} |"
            for init, why in fact(module, "REFUSED_INITS").items()
        ]
    lines += ["", "## Refused", "", "| `peft_type` | why it cannot be merged |", "|---|---|"]
    lines += [f"| {kind} | {why} |" for kind, why in sorted(REFUSED_TYPES.items())]
    return INTRO + "\n".join(lines) + "\n"


def test_the_page_is_that_of_the_tables():
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/test_support_table.py writes it anew"


def test_every_type_of_peft_has_one_row():
    from peft.utils import PeftType

    assert not set(ADAPTERS) & set(REFUSED_TYPES)
    unknown = {kind.value for kind in PeftType} - set(ADAPTERS) - set(REFUSED_TYPES)
    assert not unknown


def test_the_tables_are_sorted_and_each_module_is_in_them():
    assert list(ADAPTERS) == sorted(ADAPTERS)
    assert list(REFUSED_TYPES) == sorted(REFUSED_TYPES)
    folder = Path(importlib.util.find_spec("lorafuse.adapters.types").origin).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {module.__name__.rpartition(".")[2] for module in TYPES.values()}


def test_a_refused_type_is_refused_by_name_before_anything_is_written(tmp_path):
    for path in ("ckpt", "adapter"):
        (tmp_path / path).mkdir()
    save_file({"w.weight": torch.zeros(2, 2)}, tmp_path / "ckpt/model.safetensors")
    (tmp_path / "ckpt/config.json").write_text("{}")
    save_file({"base_model.model.w.x": torch.zeros(2)}, tmp_path / "adapter/adapter_model.safetensors")
    for kind, why in REFUSED_TYPES.items():
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(AdapterError) as caught:
            lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "work/out")
        assert (
            str(caught.value)
            == f"{tmp_path}/adapter/adapter_config.json: peft_type {kind} cannot be merged: {why}."
        )
    assert not (tmp_path / "work").exists()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
