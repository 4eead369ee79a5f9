"""`--format light`: `base`, with the value projections that change in full precision."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorafuse
from lorafuse.errors import UsageError

TARGETS = ["q_proj", "v_proj", "down_proj"]


def files_of(folder):
    """{name: bytes} of all that a reader sees."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lorafuse_receipt.json"}


def dense_modules(receipt):
    changed = {name: entry for name, entry in receipt["tensors"].items() if entry["action"] == "merged"}
    return {name.removesuffix(".weight") for name, entry in changed.items() if "stored" not in entry}


def values(n_layers=2):
    return {f"model.layers.{i}.self_attn.v_proj" for i in range(n_layers)}


@pytest.fixture
def convert(tmp_path):
    """convert(name, ckpt, lora, …) → (the result's directory, its receipt, its warnings)"""

    def make(name, *inputs, **options):
        events = []
        receipt = lorafuse.convert(*inputs, tmp_path / name, on_event=events.append, **options)
        warnings = [event["message"] for event in events if event["event"] == "warning"]
        return tmp_path / name, receipt, warnings

    return make


@pytest.mark.parametrize(
    ("kind", "options"),
    [("nf4_dq", {}), ("int8", {}), ("bf16", {"base_quant": "nf4"}), ("bf16", {"base_quant": "int8"})],
)
def test_is_base_with_the_value_projections_dense(kind, options, convert, base, adapter):
    inputs = base(kind), adapter(kind, target_modules=TARGETS)
    light, receipt, warnings = convert("light", *inputs, format="light", **options)
    kept, _, _ = convert("kept", *inputs, format="base", keep_dense=["*.v_proj"], **options)
    assert files_of(light) == files_of(kept)
    assert dense_modules(receipt) == values() and not warnings
    assert receipt["settings"]["format"] == "light" and "keep_dense" not in receipt["settings"]
    skipped = json.loads((light / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert values() <= set(skipped)
    lorafuse.verify(light, ckpt=inputs[0], adapters=[inputs[1]])


def test_a_pattern_adds_to_it(convert, base, adapter):
    inputs = base("nf4_dq"), adapter("nf4_dq", target_modules=TARGETS)
    _, receipt, warnings = convert("out", *inputs, format="light", keep_dense=["*.1.*.q_proj", "*.x"])
    assert dense_modules(receipt) == values() | {"model.layers.1.self_attn.q_proj"}
    assert warnings == ["keep_dense='*.x': matches no quantized module that changes."]


def test_without_such_a_change_it_is_base_and_says_so(convert, base, adapter):
    inputs = base("nf4_dq"), adapter("nf4_dq", target_modules=["q_proj", "down_proj"])
    light, receipt, warnings = convert("light", *inputs, format="light")
    as_base, _, _ = convert("base", *inputs, format="base")
    assert files_of(light) == files_of(as_base) and not dense_modules(receipt)
    assert warnings == [
        "format='light': no quantized value projection changes, so that none becomes dense; the result is "
        "that of format='base'."
    ]


def test_queries_and_keys_stay_dense_where_they_are_one_module_with_values(convert, base, adapter):
    """Loaded as a user does: GPT-2's c_attn as `dense` has it, the rest quantized."""
    lora = adapter("gpt2_nf4", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    light, receipt, _ = convert("light", base("gpt2_nf4"), lora, format="light")
    dense, _, _ = convert("dense", base("gpt2_nf4"), lora)
    joined = {f"transformer.h.{i}.attn.c_attn" for i in range(2)}
    assert dense_modules(receipt) == joined
    full = {name: t for path in dense.glob("*.safetensors") for name, t in load_file(path).items()}
    model, loading = AutoModelForCausalLM.from_pretrained(light, output_loading_info=True)
    assert not any(loading.values()), loading
    for name, module in model.named_modules():
        if name.endswith((".c_attn", ".c_proj", ".c_fc")):
            is_dense = module.weight.dtype != torch.uint8
            assert is_dense == (name in joined), name
            assert not is_dense or torch.equal(module.weight, full[f"{name}.weight"]), name


def test_a_dry_run_says_how_large_it_is(base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=TARGETS)
    plan = lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out", dry_run=True)
    sizes = plan["formats"]
    assert list(sizes)[:4] == ["dense", "base", "light", "mixed"]
    v_proj = 32 * 64  # weights; 4 bits, a scale in 8 bits for 64, become 16
    assert 0 < sizes["light"] - sizes["base"] < 2 * v_proj * 1.5
    assert sizes["light"] < sizes["mixed"] < sizes["dense"]


def test_of_a_batch(base, adapter, tmp_path, convert):
    lora = adapter("nf4_dq", target_modules=TARGETS)
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"adapter": str(lora), "name": "a", "format": "light"}))
    lorafuse.batch(base("nf4_dq"), jobs, tmp_path / "all")
    single, _, _ = convert("single", base("nf4_dq"), lora, format="light")
    assert files_of(tmp_path / "all" / "a") == files_of(single)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bf16", {}, "no weight of it is quantized, so that format='light' would keep nothing: leave"),
        ("nf4", {"dtype": "float16"}, "format='light' keeps the base's own dtypes: leave dtype out."),
        (
            "bf16",
            {"dtype": "float16", "base_quant": "nf4"},
            "format='light' keeps the dtypes that training saw: leave dtype out.",
        ),
    ],
)
def test_wrong_wishes(kind, options, message, base, adapter, tmp_path):
    with pytest.raises(UsageError) as e:
        lorafuse.convert(
            base(kind), adapter(kind, target_modules=TARGETS), tmp_path / "out", format="light", **options
        )
    assert message in str(e.value) and not (tmp_path / "out").exists()
