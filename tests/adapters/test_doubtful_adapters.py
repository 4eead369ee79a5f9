"""Adapters that do nothing, say what is not known, or lie in forms of their own: a warning, a refusal in
plain words, or the same result as ever."""

import dataclasses
import time

import build
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.adapters.reading.known_fields import KNOWN
from lorafuse.adapters.reading.module_patterns import ModulePatterns
from lorafuse.errors import AdapterError

PREFIX = "base_model.model."
WEIGHTS = [f"model.layers.{i}.{m}" for i in range(2) for m in ("mlp.down_proj", "self_attn.q_proj")]


@pytest.fixture
def inputs(tmp_path):
    """A checkpoint and an adapter that fits it."""
    return build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "adapter")


def warnings_of(ckpt, adapter, out):
    said = []
    lorafuse.convert(
        ckpt, adapter, out, on_event=lambda e: said.append(e["message"]) if e["event"] == "warning" else None
    )
    return said


def edit(adapter, change):
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_an_adapter_that_does_something_is_not_warned_of(inputs, tmp_path):
    assert warnings_of(*inputs, tmp_path / "out") == []


def test_an_update_of_zero_is_said(inputs, tmp_path):
    """lora_B all zero, in every module or in one; the weights are named."""
    ckpt, adapter = inputs
    why = "an adapter that was not trained, or not saved rightly, has lora_B all zero."
    one = f"{PREFIX}{WEIGHTS[1]}.lora_B.weight"
    edit(adapter, lambda tensors: tensors | {one: torch.zeros_like(tensors[one])})
    assert warnings_of(ckpt, adapter, tmp_path / "one") == [
        f"The update of 1 of 4 weights is zero: {WEIGHTS[1]}.weight; {why}"
    ]
    edit(adapter, lambda tensors: {k: t * 0 if "lora_B" in k else t for k, t in tensors.items()})
    listed = ", ".join(f"{name}.weight" for name in WEIGHTS)
    assert warnings_of(ckpt, adapter, tmp_path / "all") == [
        f"The update of every weight is zero, {listed}: the result is a copy of the base; {why}"
    ]
    made, base = (load_file(path / "model.safetensors") for path in (tmp_path / "all", ckpt))
    assert all(torch.equal(made[name], base[name]) for name in base)


def test_an_update_of_zero_is_said_of_its_job(inputs, tmp_path):
    """In a batch too, with the job's name."""
    ckpt, adapter = inputs
    edit(adapter, lambda tensors: {k: t * 0 if "lora_B" in k else t for k, t in tensors.items()})
    (tmp_path / "jobs").mkdir()
    adapter.rename(tmp_path / "jobs" / "dead")
    build.write_adapter(tmp_path / "jobs" / "alive")
    said = []
    lorafuse.batch(ckpt, tmp_path / "jobs", tmp_path / "out", on_event=said.append)
    (warning,) = [event for event in said if event["event"] == "warning"]
    assert warning["job"] == "dead" and "The update of every weight is zero" in warning["message"]


def test_an_adapter_without_any_update_is_said(inputs, tmp_path):
    """Nothing in it but what is ignored."""
    ckpt, adapter = inputs
    key = f"{PREFIX}lm_head.original_module.weight"
    edit(adapter, lambda tensors: {key: torch.zeros(32, 16)})
    assert "The adapter changes no weight: the result is a copy of the base." in warnings_of(
        ckpt, adapter, tmp_path / "out"
    )


def test_every_field_of_peft_is_known():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for config in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        assert {field.name for field in dataclasses.fields(config)} <= KNOWN


def test_unknown_fields_that_are_set_are_said(inputs, tmp_path):
    """Those that are null, false or empty change nothing."""
    ckpt, adapter = inputs
    build.rewrite(
        adapter, some_new_thing={"a": 1}, lora_flavour="sweet", use_nothing=False, other=None, more=[]
    )
    assert warnings_of(ckpt, adapter, tmp_path / "out") == [
        f"{adapter}/adapter_config.json: fields that are not known are ignored: some_new_thing, lora_flavour."
    ]


@pytest.mark.parametrize("field", ["use_superlora", "use_x"])
def test_unknown_variants_are_refused(field, inputs, tmp_path):
    ckpt, adapter = inputs
    build.rewrite(adapter, **{field: True})
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, tmp_path / "out")
    assert str(caught.value) == (
        f"{adapter}/adapter_config.json: {field} is set, which PEFT 0.21 does not know; such fields change "
        "what an adapter computes. If this one does not, remove it."
    )
    assert not (tmp_path / "out").exists()
    assert lorafuse.inspect(adapter)["problems"] == [str(caught.value)]


def test_an_adapter_inside_the_base_is_said(inputs, tmp_path):
    """Saved with PEFT's layers in it: the weights are found under `base_layer`, and its own adapters stay as
    they are."""
    ckpt, adapter = inputs
    lorafuse.convert(ckpt, adapter, tmp_path / "plain")
    plain, wrapped = load_file(tmp_path / "plain" / "model.safetensors"), {}
    file = ckpt / "model.safetensors"
    for name, tensor in load_file(file).items():
        module = name.removesuffix(".weight")
        if module in WEIGHTS:
            wrapped[f"{module}.base_layer.weight"] = tensor
            wrapped[f"{module}.lora_A.speech.weight"] = torch.ones(2, tensor.shape[1])
        else:
            wrapped[name] = tensor
    save_file(wrapped, file)
    inside = [f"{module}.lora_A.speech.weight" for module in WEIGHTS]
    assert warnings_of(ckpt, adapter, tmp_path / "out") == [
        f"{ckpt}: holds tensors of an adapter, {inside[0]}, {inside[1]} and 2 more. They are copied and not "
        "merged; programs that do not know them ignore them."
    ]
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == wrapped.keys()
    for name, tensor in made.items():
        expected = wrapped[name] if "lora" in name else plain[name.replace(".base_layer", "")]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    "form",
    [
        lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module._fsdp_wrapped_module.self_attn."),
        lambda key: f"model.{key}",
        lambda key: f"module.model.{key}",
    ],
)
def test_wrappers_and_an_actors_model(form, inputs, tmp_path):
    """Activation checkpointing, and a trainer whose model is the `model` of its actor."""
    ckpt, adapter = inputs
    lorafuse.convert(ckpt, adapter, tmp_path / "plain")
    edit(adapter, lambda tensors: {form(key): tensor for key, tensor in tensors.items()})
    (said,) = warnings_of(ckpt, adapter, tmp_path / "out")
    assert said.endswith("PEFT itself would not load keys of this form.")
    assert (
        build.files_of(tmp_path / "out")["model.safetensors"]
        == (build.files_of(tmp_path / "plain")["model.safetensors"])
    )


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"])
def test_keys_of_types_that_are_refused_are_not_said_to_be_unusual(kind, tmp_path):
    """`prompt_embeddings` is PEFT's own key."""
    path = tmp_path / "adapter"
    build.write_adapter(path, {"prompt_embeddings": torch.zeros(4, 8)}, peft_type=kind)
    facts = lorafuse.inspect(path)
    assert facts["warnings"] == []
    (problem,) = facts["problems"]
    assert f"peft_type {kind} cannot be merged" in problem


CONFIGS = {
    "rank as text": (
        {"r": "8"},
        'r (or rank_pattern) of model.layers.0.mlp.down_proj is the text "8", expected',
    ),
    "alpha as text": ({"lora_alpha": "8"}, 'is the text "8", expected a number.'),
    "a type in small letters": (
        {"peft_type": "lora"},
        "and 27 more; PEFT spells it LORA.",
    ),
    "a type of nobody": ({"peft_type": "x"}, "peft_type x is not supported; known are ADALORA, "),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_wrong_is_said_so_that_it_can_be_seen(case, inputs, tmp_path):
    ckpt, adapter = inputs
    fields, text = CONFIGS[case]
    build.rewrite(adapter, **fields)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, tmp_path / "out")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"lora_alpha": 1e300},
            "lora_alpha (or alpha_pattern) of model.layers.0.mlp.down_proj is 1e+300, which is",
        ),
        ({"alpha_pattern": {"q_proj": -1e39}}, "of model.layers.0.self_attn.q_proj is -1e+39, which is"),
        ({"lora_alpha": 10**400}, "lora_alpha (or alpha_pattern) of model.layers.0.mlp.down_proj is 1"),
    ],
)
def test_a_scale_beyond_float32_is_refused(fields, text, inputs, tmp_path):
    ckpt, adapter = inputs
    build.rewrite(adapter, **fields)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, tmp_path / "out")
    assert text in str(caught.value)


def test_an_update_of_a_single_number_is_refused(inputs, tmp_path):
    """No update fits a weight without dimensions."""
    ckpt, adapter = inputs
    file = ckpt / "model.safetensors"
    name = f"{WEIGHTS[0]}.weight"
    save_file(load_file(file) | {name: torch.tensor(1.0)}, file)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, tmp_path / "out")
    key = f"{PREFIX}{WEIGHTS[0]}.lora_A.weight"
    assert str(caught.value) == f"{adapter}/adapter_model.safetensors: {key} updates {name}, which is F32 []."


def test_patterns_of_every_module_take_no_time():
    """Names are looked up, whatever the number of entries; the first that matches counts."""
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{m}_proj"
        for i in range(40)
        for e in range(64)
        for m in ("up", "q")
    ]
    patterns = ModulePatterns({name: number for number, name in enumerate(names)})
    start = time.perf_counter()
    assert [patterns.value(name, None) for name in names] == list(range(len(names)))
    assert time.perf_counter() - start < 20  # tried one by one: hours


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab.", max_size=4) | st.sampled_from([r"a\.b", "a|b", "^b", ".*b", "[ab]"]), max_size=6),
    st.text("ab.", max_size=7),
)
def test_patterns_find_what_peft_finds(keys, module):
    from peft.utils.other import get_pattern_key

    values = {key: number for number, key in enumerate(keys)}
    expected = values.get(get_pattern_key(list(values), module), "default")
    assert ModulePatterns(values).value(module, "default") == expected


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_evil_patterns_end(field, inputs, tmp_path):
    """`re` would take years."""
    ckpt, adapter = inputs
    build.rewrite(adapter, **{field: {"(.*)*(.*)*(.*)*(.*)*z": 8, r"([a-z_.0-9]+)*X": 8}})
    start = time.perf_counter()
    assert warnings_of(ckpt, adapter, tmp_path / "out") == []
    assert time.perf_counter() - start < 20
