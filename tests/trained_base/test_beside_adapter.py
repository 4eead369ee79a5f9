"""What files beside an adapter say of the base in training, and what a merge makes of it."""

import json
import shutil
from pathlib import Path

import pytest
from build import files_of, write_adapter, write_checkpoint
from click.testing import CliRunner

import lorafuse
from lorafuse import cli
from lorafuse.errors import UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
CARD = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- _load_in_8bit: False
- _load_in_4bit: {four}
- load_in_8bit: False
- load_in_4bit: {four}
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: True
- bnb_4bit_compute_dtype: bfloat16
"""
AXOLOTL = "base_model: org/base\nadapter: qlora\nload_in_4bit: true\n"
LLAMA_FACTORY = "model_name_or_path: org/base\nfinetuning_type: lora\nquantization_bit: 8\n"


@pytest.fixture
def inputs(tmp_path):
    return write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")


def said(ckpt, adapter, out, **settings):
    """("warning" or "note", message) of what is said during a merge."""
    heard = []
    lorafuse.convert(ckpt, adapter, out, on_event=heard.append, **settings)
    (plan,) = (event for event in heard if event["event"] == "plan")
    warnings = [("warning", event["message"]) for event in heard if event["event"] == "warning"]
    return warnings + [("note", message) for message in plan["notes"]]


def quantized_so(file, ckpt, how):
    return (
        "warning",
        f"{file}: says that training quantized the base ({how}), but {ckpt} is in full precision: the update "
        "was trained on rounded weights, so on these the result is not the model that was trained. Take "
        f"base_quant_from='{file}', or base_quant='auto', which takes what the files beside the adapter say.",
    )


NF4 = "nf4 in blocks of 64, double quantization"


@pytest.mark.parametrize(
    ("name", "text", "how"),
    [
        ("README.md", CARD.format(four=True), NF4),
        ("qlora.yml", AXOLOTL, NF4),
        ("training_args.yaml", LLAMA_FACTORY, "int8"),
        (
            "quantization_config.json",
            json.dumps({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
            NF4.replace("double", "single"),
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_file_that_says_how_the_base_was_quantized(inputs, tmp_path, name, text, how, dry_run):
    ckpt, lora = inputs
    (lora / name).write_text(text)
    assert said(ckpt, lora, tmp_path / "out", dry_run=dry_run) == [quantized_so(lora / name, ckpt, how)]


def test_where_nothing_tells_it_is_asked(inputs, tmp_path):
    ckpt, lora = inputs
    (lora / "README.md").write_text("# an adapter\n")
    (lora / "broken.yaml").write_text("a: [\n")
    note = (
        f"Nothing beside {lora} tells how training loaded its base. If it was in 4 bits (load_in_4bit), this "
        "result is not the model that was trained: set base_quant to nf4."
    )
    assert said(ckpt, lora, tmp_path / "out") == [("note", note)]
    shown = CliRunner().invoke(cli.convert, [str(ckpt), str(lora), str(tmp_path / "out2")])
    assert f"Note: {note}\n".replace("base_quant", "the option base-quant") in shown.stderr


@pytest.mark.parametrize("settings", [{"base_quant": "nf4"}, {"base_quant": "auto"}])
def test_nothing_is_asked_where_it_is_chosen_or_told(inputs, tmp_path, settings):
    ckpt, lora = inputs
    (lora / "README.md").write_text(CARD.format(four=True))
    assert said(ckpt, lora, tmp_path / "out", **settings) == []


def test_a_base_in_training_that_was_not_quantized(inputs, tmp_path):
    ckpt, lora = inputs
    (lora / "README.md").write_text(CARD.format(four=False))
    assert said(ckpt, lora, tmp_path / "out") == []
    assert said(ckpt, lora, tmp_path / "auto", base_quant="auto") == []
    assert files_of(tmp_path / "auto")["model.safetensors"] == files_of(tmp_path / "out")["model.safetensors"]


@pytest.mark.parametrize("base", ["org/base-bnb-4bit", "[org/other, org/base-bnb-4bit]"])
def test_the_base_that_a_card_names(inputs, tmp_path, base):
    ckpt, lora = inputs
    (lora / "README.md").write_text(f"---\nbase_model: {base}\n---\n# an adapter\n")
    ((event, message),) = said(ckpt, lora, tmp_path / "out")
    assert event == "warning"
    assert "was trained on org/base-bnb-4bit, whose weights are quantized (nf4)" in message


def test_auto_makes_what_the_file_makes(inputs, tmp_path):
    ckpt, lora = inputs
    (lora / "qlora.yml").write_text(AXOLOTL)
    lorafuse.convert(ckpt, lora, tmp_path / "auto", base_quant="auto", quant_blocksize=128)
    lorafuse.convert(ckpt, lora, tmp_path / "from", base_quant_from=lora / "qlora.yml", quant_blocksize=128)
    auto, by_file = (
        json.loads((tmp_path / d / "lorafuse_receipt.json").read_text()) for d in ("auto", "from")
    )
    assert auto["base_semantics"] == "simulated: nf4 in blocks of 128, double quantization"
    assert auto["plan_id"] == by_file["plan_id"]
    assert auto["outputs"] == by_file["outputs"]


def test_auto_of_a_batch(inputs, tmp_path):
    ckpt, _ = inputs
    jobs = tmp_path / "jobs"
    for name in ("a", "b"):
        write_adapter(jobs / name)
    (jobs / "b" / "qlora.yml").write_text(AXOLOTL)
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", base_quant="auto")
    assert [state.state for state in states] == ["done", "done"]
    receipts = [json.loads((tmp_path / "out" / n / "lorafuse_receipt.json").read_text()) for n in ("a", "b")]
    assert {receipt["base_semantics"] for receipt in receipts} == {f"simulated: {NF4}"}


def test_files_that_differ_are_refused_by_auto_and_named_each_otherwise(inputs, tmp_path):
    ckpt, lora = inputs
    (lora / "README.md").write_text(CARD.format(four=True))
    (lora / "training_args.yaml").write_text(LLAMA_FACTORY)
    with pytest.raises(UsageError) as caught:
        lorafuse.convert(ckpt, lora, tmp_path / "out", base_quant="auto")
    assert str(caught.value) == (
        f"base_quant is auto, and the files beside the adapters differ: {lora}/README.md: {NF4}, "
        f"{lora}/training_args.yaml: int8. Say how training quantized the base."
    )
    assert len(said(ckpt, lora, tmp_path / "out")) == 2


def test_details_that_the_files_say_are_refused_beside_auto(inputs, tmp_path):
    with pytest.raises(UsageError) as caught:
        lorafuse.convert(*inputs, tmp_path / "out", base_quant="auto", double_quant=False)
    assert str(caught.value) == (
        "base_quant='auto' and double_quant=False both say how the base was quantized; give one of the two."
    )


def test_auto_of_a_base_that_is_quantized_takes_it_as_it_is(tmp_path):
    lora = tmp_path / "lora"
    shutil.copytree(FIXTURES / "llama-adapter", lora)
    (lora / "training_args.yaml").write_text(LLAMA_FACTORY)
    said(FIXTURES / "llama-nf4", lora, tmp_path / "out", base_quant="auto")
    receipt = json.loads((tmp_path / "out" / "lorafuse_receipt.json").read_text())
    assert receipt["base_semantics"] == "stored in NF4, double-quantized, block size 64"
