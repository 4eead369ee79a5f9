"""`--format nf4|fp4|int8`: what bitsandbytes on the CPU makes of the merged weights, and without bias on
these grids; with `--base-quant`, the grid that training saw."""

import json

import own_grid
import pytest
import torch
from build import CONFIG, adapter_tensors, write_adapter, write_checkpoint
from quantized_anew import assert_stored, by_bitsandbytes, linear_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lorafuse

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]


def targets_of(kind):
    of_gpt2 = {"target_modules": CONV1D, "fan_in_fan_out": True}
    return of_gpt2 if kind.startswith("gpt2") else {"target_modules": TARGETS}


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def expected_of(dense, kind, **settings):
    """Every stored tensor of the result, given that of `--format dense`."""
    linears = linear_weights(dense)
    made = {name: t for name, t in dense.items() if name not in linears}
    for name in linears:
        weight = dense[name].T.contiguous() if name.startswith("transformer.h.") else dense[name]
        made |= by_bitsandbytes(name, weight, kind, **settings)
    return made


@pytest.mark.parametrize(
    ("dense", "kind", "options"),
    [
        ("bf16", "nf4", {}),
        ("fp16", "nf4", {"double_quant": False}),
        ("fp32", "nf4", {"quant_blocksize": 256}),
        ("bf16_odd", "nf4", {"quant_blocksize": 4096}),
        ("bf16_odd", "fp4", {"quant_blocksize": 32}),
        ("bf16", "fp4", {}),
        ("fp32", "fp4", {"double_quant": False, "quant_blocksize": 128}),
        ("bf16", "int8", {}),
        ("fp32", "int8", {}),
        ("bf16_odd", "int8", {}),
        ("gpt2_bf16", "nf4", {}),
        ("gpt2", "fp4", {"quant_blocksize": 4096}),
        ("gpt2_bf16", "nf4", {"double_quant": False}),
        ("gpt2", "int8", {}),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_as_bitsandbytes_makes_it_of_the_dense_result(
    dense, kind, options, use_dora, base, adapter, tmp_path
):
    lora = adapter(dense, use_dora=use_dora, **targets_of(dense))
    lorafuse.convert(base(dense), lora, tmp_path / "dense")
    lorafuse.convert(base(dense), lora, tmp_path / "out", format=kind, **options)
    settings = {name.removeprefix("quant_"): value for name, value in options.items()}
    assert_stored(stored(tmp_path / "out"), expected_of(stored(tmp_path / "dense"), kind, **settings))


def test_layers_that_repeat_others(base, adapter, tmp_path):
    lora = adapter("bf16", target_modules=TARGETS, layer_replication=[[0, 2], [1, 2]])
    lorafuse.convert(base("bf16"), lora, tmp_path / "dense")
    receipt = lorafuse.convert(base("bf16"), lora, tmp_path / "out", format="nf4")
    assert_stored(stored(tmp_path / "out"), expected_of(stored(tmp_path / "dense"), "nf4"))
    assert "model.layers.2.mlp.up_proj.weight" in receipt["tensors"]
    assert config_of(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"] is None


def by_transformers(folder, target, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(target)
    return model


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("dense", "kind", "settings"),
    [
        (
            "bf16",
            "nf4",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        ),
        (
            "fp16",
            "fp4",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        ),
        ("bf16_tied", "nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("bf16", "int8", {"load_in_8bit": True}),
        ("gpt2_bf16", "nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("gpt2", "int8", {"load_in_8bit": True}),
    ],
)
def test_as_transformers_saves_the_dense_result_and_loads_it(dense, kind, settings, base, adapter, tmp_path):
    """Bytes and config; the same logits, and it generates."""
    lora = adapter(dense, **targets_of(dense))
    lorafuse.convert(base(dense), lora, tmp_path / "dense")
    double_quant = settings.get("bnb_4bit_use_double_quant", kind == "int8")
    lorafuse.convert(base(dense), lora, tmp_path / "out", format=kind, double_quant=double_quant)
    if kind != "int8":
        settings = settings | {"bnb_4bit_compute_dtype": config_of(tmp_path / "dense")["dtype"]}
    theirs = by_transformers(tmp_path / "dense", tmp_path / "theirs", **settings)
    assert_stored(stored(tmp_path / "out"), stored(tmp_path / "theirs"))
    fields, expected = (config_of(tmp_path / name) for name in ("out", "theirs"))
    assert fields["quantization_config"] == expected["quantization_config"]
    assert fields["dtype"] == expected["dtype"]
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert ours.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 15)
    classes = [{n: type(m) for n, m in model.named_modules()} for model in (ours, theirs)]
    assert classes[0] == classes[1]


@pytest.mark.parametrize(("form", "rounding"), [("base", None), ("same kind", "nearest")])
@pytest.mark.parametrize(
    ("dense", "kind", "options"),
    [
        ("bf16", "nf4_dq", {"base_quant": "nf4"}),
        ("fp16", "nf4_fp16", {"base_quant": "nf4"}),
        ("bf16", "nf4_bs256", {"base_quant": "nf4", "quant_blocksize": 256}),
        ("bf16", "fp4_dq", {"base_quant": "fp4"}),
        ("bf16", "nf4", {"base_quant": "nf4", "double_quant": False}),
        ("bf16", "int8", {"base_quant": "int8"}),
        ("gpt2_bf16", "gpt2_nf4", {"base_quant": "nf4", "double_quant": False}),
        ("gpt2_bf16", "gpt2_int8", {"base_quant": "int8"}),
    ],
)
def test_the_grid_that_training_saw(dense, kind, options, form, rounding, base, adapter, tmp_path):
    """Every byte as from a base that is stored so; weights that nothing changes too."""
    lora = adapter(dense, **targets_of(dense))
    form, given = (
        "base" if form == "base" else options["base_quant"],
        {"rounding": rounding, "adapter_scale": 0.2},
    )
    expected = lorafuse.convert(base(kind), lora, tmp_path / "stored", format="base", **given)
    receipt = lorafuse.convert(base(dense), lora, tmp_path / "out", format=form, **given, **options)
    assert_stored(stored(tmp_path / "out"), stored(tmp_path / "stored"))
    for name, entry in expected["tensors"].items():
        measured = {"kept", "noise", "changed", "clipped", "rounding"} & entry.keys()
        assert {f: receipt["tensors"][name][f] for f in measured} == pytest.approx(
            {f: entry[f] for f in measured}
        ), name
    quantization = config_of(tmp_path / "out")["quantization_config"]
    of_base = config_of(base(kind))["quantization_config"]
    assert {name: quantization[name] for name in of_base if name != "bnb_4bit_compute_dtype"} == {
        name: value for name, value in of_base.items() if name != "bnb_4bit_compute_dtype"
    }


def test_another_kind_than_training_saw_is_made_anew(base, adapter, tmp_path):
    lora = adapter("bf16", target_modules=TARGETS)
    lorafuse.convert(base("bf16"), lora, tmp_path / "dense", base_quant="nf4")
    lorafuse.convert(base("bf16"), lora, tmp_path / "out", base_quant="nf4", format="int8")
    assert_stored(stored(tmp_path / "out"), expected_of(stored(tmp_path / "dense"), "int8"))


@pytest.mark.parametrize(
    ("dense", "kind", "options"),
    [
        ("bf16", "nf4", {}),
        ("fp32", "nf4", {"double_quant": False, "quant_blocksize": 32}),
        ("bf16_odd", "fp4", {"quant_blocksize": 128}),
        ("fp16", "int8", {}),
    ],
)
def test_without_bias_on_a_new_grid(dense, kind, options, base, adapter, tmp_path):
    """From the nearest codes, the sums are rounded between neighbours; what nothing changes has these."""
    lora = adapter(dense, target_modules=["q_proj", "down_proj"])
    made = {}
    for name, given in {"nearest": {}, "unbiased": {"rounding": "unbiased"}}.items():
        receipt = lorafuse.convert(base(dense), lora, tmp_path / name, format=kind, **options, **given)
        made[name] = stored(tmp_path / name)
    lorafuse.convert(base(dense), lora, tmp_path / "sums", dtype="float32")
    sums, was = stored(tmp_path / "sums"), made["nearest"]
    changed = [name for name, entry in receipt["tensors"].items() if entry["action"] == "merged"]
    assert_stored(*({n: t for n, t in tensors.items() if n not in changed} for tensors in made.values()))
    for name in changed[:2]:
        assert receipt["tensors"][name]["rounding"] == "unbiased"
        codes, values = own_grid.grid_of(was, name)
        x = sums[name].double().view(-1)
        expected, n_clipped = own_grid.rounded(codes, values, x, own_grid.uniform(name, len(x)))
        found, _ = own_grid.grid_of(made["unbiased"], name)
        assert torch.equal(values.gather(1, found[:, None]), values.gather(1, expected[:, None])), name
        assert receipt["tensors"][name]["clipped"] == pytest.approx(n_clipped / len(codes))


@pytest.mark.parametrize("rounding", ["nearest", "unbiased"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bytes_depend_on_no_tile_and_measures_are_of_what_a_reader_decodes(
    kind, rounding, tmp_path, monkeypatch
):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = {name: torch.randn(200, 999).bfloat16(), "lm_head.weight": torch.randn(8, 999).bfloat16()}
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors)
    lora = write_adapter(tmp_path / "lora", adapter_tensors(tensors))
    made = []
    for tile in (1 << 19, 1 << 16, 1 << 12):
        monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", tile)
        receipt = lorafuse.convert(ckpt, lora, tmp_path / str(tile), format=kind, rounding=rounding)
        made.append(stored(tmp_path / str(tile)))
        assert_stored(made[-1], made[0])
    lorafuse.convert(ckpt, lora, tmp_path / "sums", dtype="float32")
    w, x, (codes, values) = tensors[name], stored(tmp_path / "sums")[name], own_grid.grid_of(made[0], name)
    w, x, s = w.double().view(-1), x.double().view(-1), values.gather(1, codes[:, None]).view(-1)
    entry, delta = receipt["tensors"][name], x - w
    assert entry["kept"] == pytest.approx(float((s - w) @ delta / (delta @ delta)), rel=1e-3)
    assert entry["noise"] == pytest.approx(float((s - x).norm() / delta.norm()), rel=1e-3)
    assert entry["changed"] == pytest.approx(float((s != w).double().mean()))
    x = x if rounding == "unbiased" else x.bfloat16().double()
    beyond = (x > values.amax(1)) | (x < values.amin(1))
    assert entry["clipped"] == pytest.approx(float(beyond.double().mean()))
    assert entry["rounding"] == rounding


@pytest.mark.parametrize("shape", [(50, 70), (64, 48)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("nf4", {}), ("fp4", {"quant_blocksize": 128, "double_quant": False}), ("int8", {})],
)
def test_transposed_weights_in_any_tiles(kind, options, shape, tmp_path, monkeypatch):
    """The nearest as bitsandbytes makes it, a last block that is short too, and from there without bias."""
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).bfloat16(), "lm_head.weight": torch.randn(32, 50).bfloat16()}
    ckpt = write_checkpoint(tmp_path / "ckpt", tensors, config=CONFIG | {"model_type": "gpt2"})
    key = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {"lora_A": torch.randn(4, shape[0]) * 0.1, "lora_B": torch.randn(shape[1], 4) * 0.1}
    lora = write_adapter(tmp_path / "lora", {f"{key}.{n}.weight": t for n, t in factors.items()})
    lorafuse.convert(ckpt, lora, tmp_path / "dense")
    lorafuse.convert(ckpt, lora, tmp_path / "sums", dtype="float32")
    expected = expected_of(
        stored(tmp_path / "dense"), kind, **{n.removeprefix("quant_"): v for n, v in options.items()}
    )
    x = stored(tmp_path / "sums")[name].double().T.reshape(-1)
    u = own_grid.uniform(name, len(x)).reshape(shape).T.reshape(-1)
    codes, values = own_grid.grid_of(expected, name)
    unbiased, _ = own_grid.rounded(codes, values, x, u)
    for tile in (1 << 19, 1 << 9):
        monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", tile)
        out = tmp_path / str(tile)
        lorafuse.convert(ckpt, lora, out, format=kind, **options)
        assert_stored(stored(out), expected)
        lorafuse.convert(ckpt, lora, out, format=kind, rounding="unbiased", overwrite=True, **options)
        found, _ = own_grid.grid_of(stored(out), name)
        assert torch.equal(values.gather(1, found[:, None]), values.gather(1, unbiased[:, None]))
        lorafuse.verify(out, ckpt=ckpt, adapters=[lora])
