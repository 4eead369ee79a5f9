"""Every PEFT type: merged models against PEFT's unmerged ones, and weights against float64 formulas."""

import re

import pytest
from oracle import read_adapter
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_cases import CASES, TRIED
from safetensors.torch import save_file
from trained import answers, assert_same_answers, assert_weights, decoded, load, weights_in_float64

import lorafuse
from lorafuse.adapters import ADAPTERS

FORMULATED = [(name, base) for name, base in TRIED if CASES[name].formula]
# Cases with tensors that are not needed: copies of shared bases, ranks of 0, paths that are off, the other
# side of a tied pair.
IGNORING = {
    *("adalora, ranks reduced", "glora_constants", "glora_off", "glora_no_bias", "osf, ranks"),
    *(name for name, case in CASES.items() if case.peft_type == "RANDLORA"),
    "trainable_tokens, tied",
}


def test_every_adapter_type_has_a_case():
    assert {case.peft_type for case in CASES.values()} == ADAPTERS.keys() - {"MLX"}  # test_mlx.py: not PEFT's


@pytest.mark.parametrize(("name", "base_kind"), TRIED)
def test_the_merged_model_answers_as_the_unmerged_one(name, base_kind, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.adapters.reading.vera_vectors.READ_NUMEL", 640)
    made, events = trained(name, base_kind), []
    receipt = lorafuse.convert(
        made.ckpt, made.adapter, tmp_path / "out", dtype="float32", on_event=events.append
    )
    merged = answers(load(tmp_path / "out"))
    assert (merged - made.answers).abs().max() < 1e-4
    assert (merged - made.answers_of_base).abs().max() > 1e-3, "the adapter changes nothing"
    assert not [e for e in events if "would not load keys" in e.get("message", "")], "PEFT wrote them"
    used, ignored = receipt["adapter_tensors"]["used"], receipt["adapter_tensors"]["ignored"]
    assert sorted([*used, *ignored]) == sorted(read_adapter(made.adapter))
    assert bool(ignored) == (name in IGNORING)


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.5])
@pytest.mark.parametrize(("name", "base_kind"), FORMULATED)
def test_weights_are_those_of_the_formula(name, base_kind, scale, trained, tmp_path, monkeypatch):
    """W + scale · (W' − W), in tiles of a few rows."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 640)
    monkeypatch.setattr("lorafuse.patches.lowrank.RIGHT_CHUNK_NUMEL", 640)
    made = trained(name, base_kind)
    receipt = lorafuse.convert(
        made.ckpt, made.adapter, tmp_path / "out", dtype="float32", adapter_scale=scale
    )
    wanted = weights_in_float64(made.ckpt, made.adapter, made.case.formula, scale)
    before = {n: value for n, (value, _) in decoded(made.ckpt).items()}
    assert {n for n, entry in receipt["tensors"].items() if entry["action"] in ("merged", "replaced")} == {
        n for n, (_, changed) in wanted.items() if changed
    }
    assert_weights(tmp_path / "out", wanted, before, SLACK.get(made.case.peft_type, slack))


def slack(value, w):
    """Each of the few operations behind an element rounds by at most 2⁻²⁴ of the largest term in its sum."""
    largest = value.abs().max()
    return min(1e-6 * largest, 2e-7 * (1 + largest))


SLACK = {"OSF": lambda value, w: 2e-6 * (1 + value.abs().max())}  # an SVD in fp32


NAMED = [
    "beft",
    "boft",
    "c3a",
    "delora",
    "fourierft",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "loha",
    "lokr",
]
NAMED += ["miss", "oft", "pvera", "randlora", "road", "shira", "vblora", "vera", "waveft"]


@pytest.mark.parametrize("name", NAMED)
def test_the_adapter_name_in_a_key_is_accepted(name, trained, tmp_path):
    """Trainers that save the state dict themselves leave it in, after the parameter's name."""
    made = trained(name)
    lorafuse.convert(made.ckpt, made.adapter, tmp_path / "plain")
    leaf = {"loha": "hada"}.get(name, name)
    stored = read_adapter(made.adapter)
    named = {re.sub(rf"\b({leaf}_\w+)", r"\1.mine", key): tensor for key, tensor in stored.items()}
    assert named.keys().isdisjoint(stored)
    save_file(named, made.copy(tmp_path / "adapter") / "adapter_model.safetensors")
    lorafuse.convert(made.ckpt, tmp_path / "adapter", tmp_path / "named")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (
        tmp_path / "named/model.safetensors"
    ).read_bytes()


CONFIGS = {name: PEFT_TYPE_TO_CONFIG_MAPPING[CASES[name].peft_type] for name in NAMED}
HAVE_BIAS = [name for name, config in CONFIGS.items() if "bias" in config.__dataclass_fields__]


@pytest.mark.parametrize("name", HAVE_BIAS)
def test_a_trained_bias_is_replaced_before_it_is_updated(name, trained, tmp_path):
    """bias="all" saves the base's biases as trained; an update of the bias goes on top."""
    made = trained(name, bias="all")
    lorafuse.convert(made.ckpt, made.adapter, tmp_path / "out")
    assert_same_answers(tmp_path / "out", made.answers)


@pytest.mark.parametrize("name", ["boft", "c3a", "hra", "miss", "oft"])
def test_trained_biases_replace_those_of_the_base(name, trained, tmp_path):
    made = trained(name, bias={"miss": "MiSS"}.get(name, name) + "_only")
    receipt = lorafuse.convert(made.ckpt, made.adapter, tmp_path / "out")
    assert receipt["tensors"]["model.layers.0.self_attn.q_proj.bias"]["action"] == "replaced"
    assert_same_answers(tmp_path / "out", made.answers)
