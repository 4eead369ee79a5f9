"""What `--format fp8`, `w8a16` and `w4a16` quantize, what they leave dense and list, and what they refuse."""

import json

import build
import pytest
import symmetric_oracle as oracle
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import lorafuse
from lorafuse import cli
from lorafuse.errors import CheckpointError, ResultError, UsageError

HIDDEN = 64


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def quantized(folder):
    """Modules that have scales."""
    return {name.removesuffix(".weight_scale") for name in stored(folder) if name.endswith(".weight_scale")}


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def random(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


@pytest.fixture
def made(tmp_path):
    """made(further tensors, hidden=…) → a checkpoint and an adapter for its q_proj and down_proj."""

    def make(further=(), hidden=HIDDEN, **config):
        tensors = build.checkpoint_tensors(hidden=hidden)
        sizes = {"hidden_size": hidden, "intermediate_size": hidden * 3 // 2, "vocab_size": 2 * hidden}
        ckpt = build.write_checkpoint(
            tmp_path / "ckpt", tensors | dict(further), config=build.CONFIG | sizes | config
        )
        return ckpt, build.write_adapter(tmp_path / "adapter", build.adapter_tensors(tensors))

    return make


LINEARS = {
    f"model.layers.{i}.{module}_proj"
    for i in range(2)
    for module in (*(f"self_attn.{p}" for p in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
}
MIXTURE = {
    "model.layers.0.mlp.gate.weight": (4, HIDDEN),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, HIDDEN),
    "model.layers.0.mlp.experts.0.gate_proj.weight": (32, HIDDEN),
    "model.layers.0.mlp.experts.0.down_proj.weight": (HIDDEN, 32),
    "model.layers.0.mlp.experts.1.gate_proj.weight": (32, HIDDEN),
    "model.layers.1.mlp.experts.gate_up_proj": (4, 32, HIDDEN),
    "model.layers.1.mlp.experts.gate_up_proj_bias": (4, 32),
    "visual.blocks.0.attn.qkv.weight": (96, HIDDEN),
    "visual.patch_embed.proj.weight": (32, 3, 2, 2),
    "model.projector.weight": (HIDDEN, HIDDEN),
}


def test_what_stays_in_full_precision_is_listed(made, tmp_path):
    """Experts one by one are quantized; a stack of them is not, by whatever name vLLM looks for it."""
    ckpt, lora = made({name: random(*shape) for name, shape in MIXTURE.items()})
    lorafuse.convert(ckpt, lora, tmp_path / "out", format="w8a16")
    experts = {f"model.layers.0.mlp.experts.{e}" for e in ("0.gate_proj", "0.down_proj", "1.gate_proj")}
    assert quantized(tmp_path / "out") == LINEARS | experts
    config = quantization(tmp_path / "out")
    assert config["ignore"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_expert_gate",
        "model.projector",
        r"re:.*layers\.1\.mlp\.experts\..*",
        "visual.blocks.0.attn.qkv",
    ]
    assert stored(tmp_path / "out").keys() >= {"model.layers.1.mlp.experts.gate_up_proj"}


WEIGHTS = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None},
    "w8a16": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
    "w4a16": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
}
BY_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "group_size": None}


@pytest.mark.parametrize("word", WEIGHTS)
def test_config_is_what_compressed_tensors_writes(word, made, tmp_path):
    ckpt, lora = made()
    lorafuse.convert(ckpt, lora, tmp_path / "out", format=word)
    layout = "float-quantized" if word == "fp8" else "pack-quantized"
    group = {
        "format": layout,
        "input_activations": BY_TOKEN | {"dynamic": True, "symmetric": True} if word == "fp8" else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": WEIGHTS[word] | {"dynamic": False, "symmetric": True},
    }
    assert quantization(tmp_path / "out") == {
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "model.embed_tokens"],
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    }


@pytest.mark.parametrize(
    ("pattern", "dense", "entries"),
    [
        ("*.0.*.v_proj", {f"model.layers.0.self_attn.{p}_proj" for p in "qkv"}, None),
        ("*.1.*.up_proj", {f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up")}, None),
        ("model.layers.0.mlp.down_proj", {"model.layers.0.mlp.down_proj"}, None),
        (
            "*.experts.1.*",
            {f"model.layers.0.mlp.experts.{e}" for e in ("0.gate_proj", "0.down_proj", "1.gate_proj")},
            {r"re:.*layers\.0\.mlp\.experts\..*"},
        ),
    ],
)
def test_what_vllm_joins_stays_dense_together(pattern, dense, entries, made, tmp_path):
    """Whether the adapter changes it or not."""
    ckpt, lora = made({name: random(*shape) for name, shape in MIXTURE.items()})
    lorafuse.convert(ckpt, lora, tmp_path / "all", format="fp8")
    lorafuse.convert(ckpt, lora, tmp_path / "out", format="fp8", keep_dense=[pattern])
    lorafuse.convert(ckpt, lora, tmp_path / "dense")
    assert quantized(tmp_path / "out") == quantized(tmp_path / "all") - dense
    listed, before = (set(quantization(tmp_path / d)["ignore"]) for d in ("out", "all"))
    assert listed - before == (entries or dense)
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "dense")
    for module in dense:
        assert torch.equal(found[f"{module}.weight"], expected[f"{module}.weight"])


@pytest.mark.parametrize(("hidden", "group"), [(256, 128), (128, 32)])
def test_groups_of_int4_are_the_largest_that_fit_all_rows(hidden, group, made, tmp_path):
    """192 columns of down_proj are no multiple of 128."""
    ckpt, lora = made(hidden=hidden)
    lorafuse.convert(ckpt, lora, tmp_path / "out", format="w4a16")
    assert quantization(tmp_path / "out")["config_groups"]["group_0"]["weights"]["group_size"] == group
    scales = stored(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight_scale"]
    assert scales.shape == (hidden, hidden // group)


def refused(*args, **options):
    with pytest.raises(UsageError) as caught:
        lorafuse.convert(*args, **options)
    return str(caught.value)


def test_rows_that_groups_do_not_divide(made, tmp_path):
    """fp8 takes them, and so does what the message says."""
    name = "model.layers.0.mlp.extra"
    ckpt, lora = made({f"{name}.weight": random(8, 40)})
    for word in ("w8a16", "w4a16"):
        said = refused(ckpt, lora, tmp_path / "out", format=word)
        assert said == (
            f"format='{word}': {name}.weight has rows of 40 elements, which groups of 32 do not divide: "
            f"leave it in full precision, keep_dense='{name}', or choose format='fp8', which has no groups."
        )
        lorafuse.convert(ckpt, lora, tmp_path / word, format=word, keep_dense=[name])
        assert quantized(tmp_path / word) == LINEARS
    lorafuse.convert(ckpt, lora, tmp_path / "fp8", format="fp8")
    assert quantized(tmp_path / "fp8") == LINEARS | {name}


def test_wishes_that_make_no_sense(made, base, adapter, tmp_path):
    ckpt, lora = made()
    assert refused(ckpt, lora, tmp_path / "out", format="w8a16", rounding="unbiased") == (
        "format='w8a16' makes scales of its own, and rounds to the nearest: rounding='unbiased' is for "
        "formats on the base's grid."
    )
    assert refused(ckpt, lora, tmp_path / "out", format="fp8", keep_dense=["model.*"]) == (
        f"{ckpt}: no weight of it would be quantized with format='fp8': leave format out."
    )
    gpt2 = adapter("gpt2", name="gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    assert refused(base("gpt2"), gpt2, tmp_path / "out", format="fp8") == (
        "format='fp8': transformer.h.0.attn.c_attn.weight belongs to a Conv1D, which compressed-tensors "
        "cannot store: choose another format."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
@pytest.mark.parametrize("word", oracle.LEVELS)
@pytest.mark.parametrize("allow_nonfinite", [False, True])
def test_infinity_has_no_scale(name, word, allow_nonfinite, made, tmp_path):
    """Its group would be lost, whether the adapter changes it or not, so that no option lets it pass."""
    weight = random(HIDDEN, HIDDEN)
    weight[3, 5] = torch.inf
    tensor = f"model.layers.0.self_attn.{name}.weight"
    ckpt, lora = made({tensor: weight})
    with pytest.raises(ResultError if allow_nonfinite else CheckpointError, match=tensor):
        lorafuse.convert(ckpt, lora, tmp_path / "out", format=word, allow_nonfinite=allow_nonfinite)


def test_overflow_of_a_half_is_seen(made, tmp_path):
    """The sum is rounded to the dtype of the result first."""
    tensor = "model.layers.1.self_attn.k_proj.weight"
    ckpt, lora = made({tensor: random(HIDDEN, HIDDEN) * 1e5})
    with pytest.raises(ResultError, match=tensor):
        lorafuse.convert(ckpt, lora, tmp_path / "out", format="w8a16", dtype="float16")


def test_a_simulated_base_is_quantized_from_its_decoded_values(made, tmp_path):
    ckpt, lora = made()
    lorafuse.convert(ckpt, lora, tmp_path / "dense", base_quant="nf4")
    lorafuse.convert(tmp_path / "dense", lora, tmp_path / "again", adapter_scale=0.0, format="w4a16")
    lorafuse.convert(ckpt, lora, tmp_path / "out", base_quant="nf4", format="w4a16")
    found, expected = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_replaced_and_repeated_layers(base, adapter, tmp_path):
    """A head that the adapter replaces is dense; copies of a layer are quantized each by itself."""
    lora = adapter("bf16", target_modules=["q_proj"], modules_to_save=["lm_head"])
    lorafuse.convert(base("bf16"), lora, tmp_path / "out", format="fp8")
    assert quantized(tmp_path / "out") == LINEARS
    build.rewrite(lora, layer_replication=[[0, 2], [1, 2]])
    lorafuse.convert(base("bf16"), lora, tmp_path / "long", format="fp8", keep_dense=["*.2.*.v_proj"])
    third = {module.replace(".1.", ".2.") for module in LINEARS if ".1." in module}
    dense = {f"model.layers.2.self_attn.{p}_proj" for p in "qkv"}
    assert quantized(tmp_path / "long") == LINEARS | third - dense
    assert set(quantization(tmp_path / "long")["ignore"]) >= dense


def test_a_batch_makes_the_same(made, tmp_path):
    ckpt, lora = made()
    other = build.write_adapter(tmp_path / "other", build.adapter_tensors(stored(ckpt), scale=0.3))
    jobs = tmp_path / "jobs"
    lines = (
        json.dumps({"adapter": str(path), "name": name}) for name, path in (("one", lora), ("two", other))
    )
    jobs.write_text("\n".join(lines))
    lorafuse.batch(ckpt, jobs, tmp_path / "out", format="w8a16", max_shard_size="100KB")
    for name, path in (("one", lora), ("two", other)):
        lorafuse.convert(ckpt, path, tmp_path / name, format="w8a16", max_shard_size="100KB")
        found, expected = stored(tmp_path / "out" / name), stored(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert quantization(tmp_path / "out" / name) == quantization(tmp_path / name)
        assert lorafuse.verify(tmp_path / "out" / name, ckpt=ckpt, adapters=[path])["weights"]


def test_a_pattern_that_matches_nothing_is_warned_of(made, tmp_path):
    ckpt, lora = made()
    said = []
    options = {"format": "fp8", "keep_dense": ["*.v_proj", "v_proj"]}
    lorafuse.convert(ckpt, lora, tmp_path / "out", on_event=said.append, **options)
    warnings = [event["message"] for event in said if event["event"] == "warning"]
    assert warnings == ["keep_dense='v_proj': matches no module."]


def test_the_command_line_has_them(made, tmp_path):
    ckpt, lora = made()
    args = [str(ckpt), str(lora), str(tmp_path / "out"), "--format", "w4a16", "--keep-dense", "*.o_proj"]
    result = CliRunner().invoke(cli.convert, args)
    assert result.exit_code == 0, result.output
    assert quantized(tmp_path / "out") == {module for module in LINEARS if "o_proj" not in module}
