"""--base-quant-from: what files of transformers and of trainers say of the base's quantization.

The oracle of a BitsAndBytesConfig is transformers' own class; the configs of trainers are as their users
write them, and what they mean was read in the trainers' sources.
"""

import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from build import write_adapter, write_checkpoint
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import read_tensors

import lorafuse
from lorafuse import cli
from lorafuse.errors import UsageError
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.trainer_configs import READ, read_base_quant

SAY_IT = "say what training did with --base-quant"
ONLY_BNB = "only what bitsandbytes does to weights is simulated."
UNKNOWN = f"no fields of a BitsAndBytesConfig that are known; {READ}."
DEPENDS = f"what this does depends on the version of axolotl: {SAY_IT}."
NOTHING = f"says nothing of how the base was quantized; {READ}."
NF4 = BaseQuant(kind="nf4", double_quant=True)


def read(path, text):
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return read_base_quant(path)


def refusal(path, text):
    """The message without the path that it begins with."""
    with pytest.raises(UsageError) as caught:
        read(path, text)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@settings(deadline=None)  # the first example imports transformers
@given(
    four=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    skip=st.none() | st.lists(st.sampled_from(["lm_head", "q_proj", "layers.1.mlp"])),
    rest=st.fixed_dictionaries(
        {},
        optional={
            "llm_int8_threshold": st.floats(0, 8),
            "bnb_4bit_compute_dtype": st.sampled_from(["bfloat16", "float16"]),
            "bnb_4bit_quant_storage": st.sampled_from(["uint8", "bfloat16"]),
        },
    ),
    how=st.sampled_from(["to_dict", "to_diff_dict"]),
    inside=st.sampled_from([None, "quantization_config", "text_config"]),
)
def test_a_config_means_what_transformers_reads_in_it(
    tmp_path_factory, four, kind, double, skip, rest, how, inside
):
    """Whole, without its defaults, and as a part of config.json, in a sub-config too."""
    from transformers import BitsAndBytesConfig

    bits = {"load_in_4bit": True} if four else {"load_in_8bit": True}
    theirs = BitsAndBytesConfig(
        **bits, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, llm_int8_skip_modules=skip, **rest
    )
    config = getattr(theirs, how)()
    if inside:
        config = {"model_type": "llama", "quantization_config": config}
    if inside == "text_config":
        config = {"model_type": "llava", "text_config": config}
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(config, default=str))
    ours = read_base_quant(path)
    assert {"llm_int8": "int8"}.get(theirs.quantization_method(), theirs.quantization_method()) == ours.kind
    assert ours.skip == (None if skip is None else tuple(skip))
    assert not four or ours.double_quant == double


def test_the_config_of_a_quantized_checkpoint(base):
    assert read_base_quant(base("nf4") / "config.json") == BaseQuant(kind="nf4", double_quant=False)
    assert read_base_quant(base("nf4_dq") / "config.json") == NF4
    assert read_base_quant(base("int8") / "config.json").kind == "int8"


CONFIG_REFUSALS = {
    '{"load_in_4bit": true, "load_in_8bit": true}': "load_in_4bit and load_in_8bit are both set; which is "
    "meant?",
    '{"load_in_4bit": false, "quant_method": "bitsandbytes"}': "quantizes nothing: neither load_in_4bit nor "
    "load_in_8bit is set.",
    '{"load_in_4bit": false, "_load_in_4bit": true}': "load_in_4bit and _load_in_4bit contradict each other.",
    '{"load_in_4bit": "yes"}': "load_in_4bit is yes; expected true or false.",
    '{"load_in_4bit": 1}': "load_in_4bit is 1; expected true or false.",
    '{"load_in_4bit": true, "bnb_4bit_quant_type": "int4"}': "bnb_4bit_quant_type is int4; expected nf4 or "
    "fp4.",
    '{"load_in_4bit": true, "bnb_4bit_quant_type": null}': "bnb_4bit_quant_type is null; expected nf4 or "
    "fp4.",
    '{"load_in_4bit": true, "llm_int8_skip_modules": "x"}': "llm_int8_skip_modules is x; expected a list of "
    "names.",
    '{"load_in_4bit": true, "llm_int8_skip_modules": [1]}': "llm_int8_skip_modules is a list; expected a "
    "list of names.",
    '{"load_in_8bit": true, "load_in_4bit": {}}': "load_in_4bit is a group of fields; expected true or "
    "false.",
    '{"load_in_8bit": true, "llm_int8_has_fp16_weight": true}': (
        "llm_int8_has_fp16_weight is set, which keeps 16-bit weights: merge without --base-quant."
    ),
    '{"load_in_8bit": true, "llm_int8_enable_fp32_cpu_offload": true}': (
        "llm_int8_enable_fp32_cpu_offload is set: which modules were on the CPU, and so not quantized, is "
        f"not in the file; {SAY_IT} and --quant-skip."
    ),
    '{"quant_method": "gptq", "bits": 4}': f"quant_method is gptq; {ONLY_BNB}",
    '{"load_in_4bit": true, "max_seq_length": 1, "dtype": 2}': f"dtype, max_seq_length: {UNKNOWN}",
    '{"model_type": "llama"}': f"says nothing of how the base was quantized; {READ}.",
    '{"peft_type": "LORA", "base_model_name_or_path": "a/b"}': f"says nothing of how the base was "
    f"quantized; {READ}.",
    "[1, 2]": f"holds no fields; {READ}.",
    '{"load_in_4bit": true, "load_in_4bit": false}': "is not valid JSON: load_in_4bit is there twice.",
    "{": "is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1).",
    "[" * 100_000: "is nested too deeply.",
}


@pytest.mark.parametrize("text", CONFIG_REFUSALS, ids=range(len(CONFIG_REFUSALS)))
def test_a_config_that_is_refused(tmp_path, text):
    assert refusal(tmp_path / "config.json", text) == CONFIG_REFUSALS[text]


def test_the_refusal_of_a_part_names_it(tmp_path):
    text = '{"quantization_config": {"load_in_4bit": false}}'
    assert refusal(tmp_path / "config.json", text) == (
        "quantization_config: quantizes nothing: neither load_in_4bit nor load_in_8bit is set."
    )


TRAINERS = {
    "axolotl qlora": (
        "base_model: a/b\nadapter: qlora\nload_in_8bit: false\nload_in_4bit: true\ndatasets:\n  - path: x\n",
        NF4,
    ),
    "axolotl lora": ("adapter: lora\nload_in_8bit: true\nload_in_4bit:\n", BaseQuant(kind="int8")),
    "axolotl kwargs": (
        "adapter: qlora\nload_in_4bit: on\nbnb_config_kwargs: {bnb_4bit_use_double_quant: No, "
        "llm_int8_skip_modules: [a, b]}\n",
        BaseQuant(kind="nf4", double_quant=False, skip=("a", "b")),
    ),
    "axolotl repeats its defaults": ("adapter: qlora\nload_in_4bit: true\nbnb_4bit_quant_type: nf4\n", NF4),
    "axolotl backend": ("adapter: lora\npeft:\n  backend: bnb\n  weight_dtype: nf4\n", NF4),
    "axolotl backend int8": (
        "adapter: lora\npeft:\n  backend: bnb\n  weight_dtype: int8\n",
        BaseQuant(kind="int8"),
    ),
    "axolotl other quantization_config": (
        "adapter: qlora\nload_in_4bit: true\nquantization_config:\n  bits: 3\n",
        NF4,
    ),
    "llama-factory": (
        "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\nquantization_bit: 4\n",
        NF4,
    ),
    "llama-factory 8": (
        "finetuning_type: lora\nquantization_bit: 8\nquantization_method: bnb\n",
        BaseQuant(kind="int8"),
    ),
    "llama-factory all": (
        "stage: dpo\nquantization_bit: 4\nquantization_method: bitsandbytes\nquantization_type: "
        "fp4\ndouble_quantization: false\n",
        BaseQuant(kind="fp4", double_quant=False),
    ),
    "llamaboard": (
        "top.booster: auto\ntop.quantization_bit: '4'\ntop.quantization_method: bnb\ntrain.bf16: true\n",
        NF4,
    ),
    "llama-factory 1": ("model: a/b\npeft_config: {name: lora}\nquant_config: {name: bnb}\n", NF4),
    "llama-factory 1, 8": ("quant_config: {name: auto, quantization_bit: 8}\n", BaseQuant(kind="int8")),
    "llama-factory 1, all": (
        "quant_config:\n  name: bnb\n  quantization_bit: 4\n  compute_dtype: bfloat16\n"
        "  double_quantization: false\n  quantization_type: fp4\n",
        BaseQuant(kind="fp4", double_quant=False),
    ),
    "axolotl experts": (
        "adapter: qlora\nload_in_4bit: true\nquantize_moe_experts: true\n",
        BaseQuant(kind="nf4", stacked_experts=True),
    ),
    "trl": (
        "model_name_or_path: a/b\nuse_peft: true\nload_in_4bit: true\n",
        BaseQuant(kind="nf4", double_quant=False),
    ),
    "trl nested": (
        "model_name_or_path: a/b\nload_in_4bit: true\nuse_bnb_nested_quant: true\nbnb_4bit_quant_type: fp4\n",
        BaseQuant(kind="fp4", double_quant=True),
    ),
    "trl 8": ("model_name_or_path: a/b\nload_in_8bit: true\n", BaseQuant(kind="int8")),
    "a BitsAndBytesConfig in YAML": (
        "load_in_4bit: true\nbnb_4bit_quant_type: nf4\n",
        BaseQuant(kind="nf4", double_quant=False),
    ),
    "aliases": ("x: &on true\nadapter: qlora\nload_in_4bit: *on\n", NF4),
    "Windows": ("\ufeffadapter: qlora\r\nload_in_4bit: true\r\n", NF4),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_s_config(tmp_path, name):
    text, expected = TRAINERS[name]
    assert read(tmp_path / "config.yml", text) == expected


QUANTIZED = (
    "which by its name was quantized (%s) before training; merge into that checkpoint, or take its "
    "config.json."
)
QLORA = "adapter: qlora\nload_in_4bit: true\n"
TRAINER_REFUSALS = {
    "adapter: lora\nload_in_4bit: true\n": f"adapter is lora with load_in_4bit, expected qlora; {DEPENDS}",
    "adapter: qlora\nload_in_8bit: true\n": f"adapter is qlora with load_in_8bit, expected lora; {DEPENDS}",
    "adapter: lora\n": NOTHING,
    "adapter: lora\nload_in_4bit: false\n": (
        "quantizes nothing: neither load_in_4bit nor load_in_8bit is set."
    ),
    "adapter: lora\npeft: {r: 8}\n": NOTHING,
    "model_name_or_path: a/b\nuse_peft: true\n": NOTHING,
    "model_name_or_path: a/b\nload_in_4bit: false\n": (
        "quantizes nothing: neither load_in_4bit nor load_in_8bit is set."
    ),
    f"{QLORA}bnb_4bit_quant_type: fp4\n": (
        f"bnb_4bit_quant_type is not in bnb_config_kwargs, where alone axolotl reads it; {SAY_IT}."
    ),
    f"{QLORA}bnb_config_kwargs: {{blocks: 3}}\n": f"blocks: {UNKNOWN}",
    "adapter: lora\ngptq: true\n": f"gptq is true; {ONLY_BNB}",
    "adapter: lora\npeft: {backend: torchao, weight_dtype: int4}\n": f"peft.backend is torchao; {ONLY_BNB}",
    "adapter: lora\nmodel_quantization_config: Mxfp4Config\n": f"model_quantization_config is Mxfp4Config; "
    f"{ONLY_BNB}",
    f"base_model: a/b-bnb-4bit\n{QLORA}": f"base_model is a/b-bnb-4bit, {QUANTIZED % 'nf4'}",
    "base_model: a/B-GPTQ\nadapter: lora\n": f"base_model is a/B-GPTQ, {QUANTIZED % 'GPTQ'}",
    f"base_model: a/Falcon-H1-1B\n{QLORA}": (
        "base_model is a/Falcon-H1-1B, of which axolotl leaves modules in full precision, others in other "
        f"versions; {SAY_IT} and --quant-skip."
    ),
    "stage: sft\nfinetuning_type: lora\n": NOTHING,
    "stage: sft\nquantization_bit: null\n": "quantizes nothing: quantization_bit is not set.",
    "top.model_name: a\n": NOTHING,
    "quant_config: null\n": "quant_config: quantizes nothing: it is null.",
    "quant_config: bnb\n": f"quant_config: its name is bnb; {ONLY_BNB}",
    "quant_config: {name: torchao}\n": f"quant_config: its name is torchao; {ONLY_BNB}",
    "quant_config: {name: auto}\n": "quant_config: quantizes nothing: quantization_bit is not set.",
    "quant_config: {name: bnb, quantization_bit: 3}\n": (
        "quant_config: quantization_bit is 3; bitsandbytes has 4 and 8."
    ),
    "quant_config: {name: bnb, group_size: 3}\n": (
        f"quant_config: group_size: no fields of it that are known; {SAY_IT}."
    ),
    "model: a/b-bnb-4bit\nquant_config: {name: bnb}\n": f"model is a/b-bnb-4bit, {QUANTIZED % 'nf4'}",
    f"{QLORA}quantize_moe_experts: maybe\n": "quantize_moe_experts is maybe; expected true or false.",
    "top.quantization_bit: none\n": "quantizes nothing: quantization_bit is not set.",
    "quantization_bit: 3\n": "quantization_bit is 3; bitsandbytes has 4 and 8.",
    "quantization_bit: 4\nquantization_method: hqq\n": f"quantization_method is hqq; {ONLY_BNB}",
    "top.quantization_bit: 4\ntop.booster: unsloth\n": (
        "use_unsloth is set: unsloth may load a checkpoint that it quantized itself, with modules left out; "
        "take the config.json of that."
    ),
    "model_name_or_path: a/b-4bit\nload_in_4bit: true\n": "model_name_or_path is a/b-4bit, "
    f"{QUANTIZED % 'nf4'}",
    "model_name: a/b\nload_in_4bit: true\n": f"model_name: {UNKNOWN}",
    "": f"holds no fields; {READ}.",
    "just text": f"holds no fields; {READ}.",
    # What PyYAML would read in a way of its own, or never finish reading.
    f"{QLORA}load_in_4bit: false\n": "has load_in_4bit twice, the second time in line 3; which is meant?",
    "x: &x {adapter: lora}\n<<: *x\n": "merges fields with << in line 2, which is not read; write them out.",
    "? [a]\n: 1\n": "has a key that is no text, in line 1.",
    "adapter: lora: x\n": "is not valid YAML: line 1: mapping values are not allowed here.",
    "a: 1\n---\na: 2\n": "is not valid YAML: line 2: but found another document.",
    "a: *b\n": "is not valid YAML: line 1: found undefined alias 'b'.",
    "a: \0\n": "is not valid YAML: unacceptable character #x0000: special characters are not allowed.",
    "- " * 3000: "is nested too deeply.",
    "adapter: &a [*a]\nload_in_4bit: *a\n": "load_in_4bit is a list; expected true or false.",
    "load_in_4bit: !!python/object/apply:os.abort []\n": "load_in_4bit is a list; expected true or false.",
    "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 64))
    + "quantization_bit: *a63\n": ("quantization_bit is a list; bitsandbytes has 4 and 8."),
}


@pytest.mark.parametrize("text", TRAINER_REFUSALS, ids=range(len(TRAINER_REFUSALS)))
def test_a_trainer_s_config_that_is_refused(tmp_path, text):
    assert refusal(tmp_path / "config.yaml", text) == TRAINER_REFUSALS[text]


PEFT_CARD = """
    The following `bitsandbytes` quantization config was used during training:
    - quant_method: {method}
    - load_in_8bit: False
    - load_in_4bit: True
    - llm_int8_threshold: 6.0
    - llm_int8_skip_modules: {skip}
    - llm_int8_enable_fp32_cpu_offload: False
    - llm_int8_has_fp16_weight: False
    - bnb_4bit_quant_type: {kind}
    - bnb_4bit_use_double_quant: True
    - bnb_4bit_compute_dtype: bfloat16

"""
AXOLOTL_CARD = """
    <details><summary>See axolotl config</summary>

    axolotl version: `0.9.1`
    ```yaml
    adapter: {adapter}
    load_in_4bit: true
    ```
    </details><br>

    ```yaml
    adapter: none of axolotl's
    ```
"""


def card(text):
    return textwrap.dedent(text)


def test_a_model_card(tmp_path):
    path = tmp_path / "README.md"
    theirs = card(PEFT_CARD).format(
        method="QuantizationMethod.BITS_AND_BYTES", skip="['lm_head', 'x']", kind="fp4"
    )
    assert read(path, "# Model\n" + theirs) == BaseQuant(
        kind="fp4", double_quant=True, skip=("lm_head", "x"), skip_version="4"
    )
    theirs = card(PEFT_CARD).format(method="bitsandbytes", skip=None, kind="nf4")
    assert read(path, (2 * theirs + "### Framework versions\n- PEFT 0.5.0\n").replace("\n", "\r\n")) == NF4
    assert read(path, card(AXOLOTL_CARD).format(adapter="qlora")) == NF4
    # What was in effect, not what was asked for.
    assert read(path, card(AXOLOTL_CARD).format(adapter="lora") + theirs) == NF4


def test_a_model_card_that_is_refused(tmp_path):
    path = tmp_path / "README.md"
    assert refusal(path, "# Model\nload_in_4bit: true\n") == (
        f"neither PEFT nor axolotl wrote into it how the base was quantized; {READ}."
    )
    both = "".join(
        card(PEFT_CARD).format(method="bitsandbytes", skip=None, kind=kind) for kind in ("nf4", "fp4")
    )
    assert refusal(path, both) == f"says in 2 places how the base was quantized, and not the same; {SAY_IT}."
    assert refusal(path, card(AXOLOTL_CARD).format(adapter="lora")).startswith(
        "adapter is lora with load_in_4bit, expected qlora;"
    )
    heading = card(PEFT_CARD).partition("\n")[2].partition("\n")[0]
    assert refusal(path, f"{heading}\n- load_in_4bits: True\n") == f"load_in_4bits: {UNKNOWN}"


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x02")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.yaml").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "c.yaml").write_text("x" * 1_000_001)
    expected = {
        "training_args.bin": f"holds Python objects, which are not loaded; {READ}.",
        "a.yaml": "is not UTF-8 text.",
        "b.yaml": "is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`.",
        "c.yaml": "is larger than 1000000 bytes.",
        "none.yaml": "no such file.",
        ".": "is not a regular file.",
    }
    for name, text in expected.items():
        path = tmp_path / name
        with pytest.raises(UsageError, match=f"^{re.escape(str(path))}: {re.escape(text)}$"):
            read_base_quant(path)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"{QLORA}bnb_config_kwargs: {{llm_int8_skip_modules: [lm_head, q_proj]}}\n")
    return path


def test_the_receipt_says_what_was_read(config, tmp_path):
    """The block size and whether experts were quantized are in no such file, so they may be given beside
    it."""
    ckpt, lora = write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "lora")
    said = {
        "kind": "nf4",
        "double_quant": True,
        "blocksize": 64,
        "skip": ["lm_head", "q_proj"],
        "experts": False,
    }
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "out", base_quant_from=config)
    assert receipt["settings"]["base_quant"] == said
    receipt = lorafuse.convert(
        ckpt, lora, tmp_path / "b", base_quant_from=str(config), quant_blocksize=128, quant_experts=True
    )
    assert receipt["settings"]["base_quant"] == said | {"blocksize": 128, "experts": True}


@pytest.mark.parametrize("kind", ["nf4", "fp4_dq", "int8"])
def test_a_base_is_what_the_config_of_its_quantized_form_makes_of_it(kind, base, adapter, tmp_path):
    """Bit for bit the merge into the checkpoint that transformers quantized."""
    lora = adapter(kind, target_modules=["q_proj", "down_proj"])
    lorafuse.convert(base(kind), lora, tmp_path / "stored")
    lorafuse.convert(base("bf16"), lora, tmp_path / "simulated", base_quant_from=base(kind) / "config.json")
    stored, found = read_tensors(tmp_path / "stored"), read_tensors(tmp_path / "simulated")
    assert stored.keys() == found.keys() and all(torch.equal(stored[name], found[name]) for name in stored)


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("base_quant", {"base_quant": "nf4"}, ["--base-quant", "nf4"]),
        ("double_quant=False", {"double_quant": False}, ["--no-double-quant"]),
        ("quant_skip", {"quant_skip": ["x"]}, ["--quant-skip", "x"]),
    ],
)
def test_options_that_say_what_the_file_says_are_refused(config, tmp_path, name, settings, options):
    text = "{} and {} both say how the base was quantized; give one of the two."
    with pytest.raises(UsageError, match=f"^{text.format('base_quant_from', name)}$"):
        lorafuse.convert("ckpt", "lora", tmp_path / "out", base_quant_from=config, **settings)
    found = CliRunner().invoke(
        cli.convert, ["ckpt", "lora", str(tmp_path / "out"), "--base-quant-from", str(config), *options]
    )
    option = options[0].replace("--no-", "--")
    assert found.exit_code == 2
    assert found.stderr == f"Error: {text.format('--base-quant-from', option)}\n"


@pytest.mark.parametrize("options", [["--base-quant", "none"], ["--double-quant"]])
def test_an_option_is_refused_beside_the_file_though_it_is_the_default(config, tmp_path, options):
    """It may contradict the file."""
    found = CliRunner().invoke(
        cli.convert, ["ckpt", "lora", str(tmp_path / "out"), "--base-quant-from", str(config), *options]
    )
    said = f"--base-quant-from and {options[0]} both say how the base was quantized; give one of the two."
    assert found.exit_code == 2
    assert found.stderr == f"Error: {said}\n"


def test_a_file_is_refused_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from lorafuse.cli import main_convert\ntry: main_convert()\nfinally: assert 'torch' not "
        "in sys.modules"
    )
    args = ["ckpt", "lora", str(tmp_path / "out"), "--base-quant-from", str(tmp_path / "none.yaml")]
    found = subprocess.run([sys.executable, "-c", code, *args], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (
        2,
        "",
        f"Error: {tmp_path}/none.yaml: no such file.\n",
    )
