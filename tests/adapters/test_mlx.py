"""MLX-LM's adapters against float64 formulas and the forward pass of its layers, written out here."""

import build
import pytest
import torch
from mlx_adapters import RANK, factors, truth
from oracle import NAMES, Truth, complaints, decode
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.errors import AdapterError

# As mlx_lm.lora writes it: all its options.
CONFIG = {
    "adapter_path": "adapters",
    "batch_size": 4,
    "fine_tune_type": "lora",
    "learning_rate": 1e-05,
    "lora_parameters": {"rank": RANK, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    "model": "some/base",
    "num_layers": 16,
    "train": True,
}


def write(path, tensors, drop=(), **fields):
    path.mkdir(parents=True)
    build.write_json(
        path / "adapter_config.json", {k: v for k, v in (CONFIG | fields).items() if k not in drop}
    )
    save_file(tensors, path / "adapters.safetensors", {"format": "mlx"})
    return path


LINEARS = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in (0, 1)}
LINEARS |= {"model.layers.1.self_attn.k_proj": (64, 32), "model.layers.1.mlp.down_proj": (96, 64)}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4_dq", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linears(kind, dtype, base, tmp_path):
    """Square and other ones, whatever the base is stored in; the scale is used as it is."""
    tensors = factors(LINEARS, dtype=NAMES[dtype])
    lora = write(tmp_path / "lora", tensors)
    events = []
    receipt = lorafuse.convert(base(kind), lora, tmp_path / "out", on_event=events.append)
    assert complaints(tmp_path / "out", truth(base(kind), tensors, 2.5)) == []
    assert not [e for e in events if e["event"] == "warning"]
    assert receipt["adapter_tensors"] == {"used": sorted(tensors), "ignored": {}}
    read = [i["path"] for i in receipt["inputs"] if i["role"] == "adapter"]
    assert read == [f"{lora}/adapter_config.json", f"{lora}/adapters.safetensors"]


def test_the_merged_model_answers_as_mlx_computes(base, tmp_path):
    """LoRALinear's forward pass, y + scale · (x @ lora_a) @ lora_b, hooked into the model."""
    from transformers import AutoModelForCausalLM

    tensors = factors(LINEARS)
    lorafuse.convert(base("fp32"), write(tmp_path / "lora", tensors), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base("fp32"), dtype=torch.float32).eval()
    for name in LINEARS:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        model.get_submodule(name).register_forward_hook(lambda _, x, y, a=a, b=b: y + 2.5 * (x[0] @ a) @ b)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert (merged(ids).logits - model(ids).logits).abs().max() < 1e-4


def test_the_adapter_scale_multiplies_that_of_the_config(base, tmp_path):
    tensors = factors(LINEARS)
    lorafuse.convert(base("fp32"), write(tmp_path / "lora", tensors), tmp_path / "out", adapter_scale=0.5)
    assert complaints(tmp_path / "out", truth(base("fp32"), tensors, 1.25)) == []


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4_dq", "fp32_tied", "gpt2", "gpt2_nf4"])
@pytest.mark.parametrize(("scale", "fields"), [(1.0, {"fine_tune_type": "dora"}), (0.5, {"use_dora": True})])
def test_dora(kind, scale, fields, base, tmp_path):
    """W' = (m / ‖V‖) · V with the norm of each output's or token's weights, V the weight with its update;
    else W + x · (W' − W)."""
    gpt2 = kind.startswith("gpt2")
    modules = (
        {"transformer.h.1.attn.c_proj": (64, 64), "transformer.h.0.mlp.c_fc": (64, 256)} if gpt2 else LINEARS
    )
    modules = modules | ({} if gpt2 else {"model.embed_tokens": (96, 64)})
    tensors, as_is = factors(modules), [*modules] if gpt2 else ["model.embed_tokens"]
    before, wanted = decode(base(kind)), truth(base(kind), tensors, 2.5, as_is=as_is)
    for module in modules:
        w, dim = wanted[f"{module}.weight"], 0 if gpt2 else 1
        norm = torch.linalg.vector_norm(w.value, dim=dim, keepdim=True)
        m = norm.float() * (1 + torch.rand(norm.shape, generator=torch.Generator().manual_seed(8)))
        tensors[f"{module}.m"] = m.flatten()
        value = m.double() / norm * w.value
        w.value = value * scale + (1 - scale) * before[f"{module}.weight"][0]
        w.slack = 2.0**-19 * (value.abs() + 1)
    lora = write(tmp_path / "lora", tensors, **fields)
    lorafuse.convert(base(kind), lora, tmp_path / "out", adapter_scale=scale)
    assert complaints(tmp_path / "out", wanted) == []


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_nf4"])
def test_conv1d_is_a_linear_in_mlx(kind, base, tmp_path):
    """attn.c_proj is square: only the architecture says which way round it is."""
    modules = {"h.0.attn.c_attn": (64, 192), "h.1.attn.c_proj": (64, 64), "h.1.mlp.c_fc": (64, 256)}
    tensors = factors({f"model.{name}": shape for name, shape in modules.items()})
    lorafuse.convert(base(kind), write(tmp_path / "lora", tensors), tmp_path / "out")
    named = {key.replace("model.", "transformer.", 1): t for key, t in tensors.items()}
    as_is = [f"transformer.{name}" for name in modules]
    assert complaints(tmp_path / "out", truth(base(kind), named, 2.5, as_is=as_is)) == []


@pytest.mark.parametrize("kind", ["fp32", "fp32_tied", "nf4_tied"])
def test_embeddings_keep_their_tie(kind, base, tmp_path):
    """In MLX a tied head is the embedding itself, with its update."""
    tensors = factors({"model.embed_tokens": (96, 64), "model.layers.0.self_attn.v_proj": (64, 32)})
    lorafuse.convert(base(kind), write(tmp_path / "lora", tensors), tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base(kind), tensors, 2.5, as_is=["model.embed_tokens"])) == []
    assert build.json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is (
        kind != "fp32"
    )


def test_a_square_embedding_is_not_a_linear(tmp_path):
    stored = build.checkpoint_tensors(torch.float32)
    stored |= {name: torch.randn(16, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ckpt = build.write_checkpoint(tmp_path / "ckpt", stored)
    tensors = factors({"model.embed_tokens": (16, 16), "lm_head": (16, 16)})
    lorafuse.convert(ckpt, write(tmp_path / "lora", tensors), tmp_path / "out")
    assert complaints(tmp_path / "out", truth(ckpt, tensors, 2.5, as_is=["model.embed_tokens"])) == []


def test_a_head_of_its_own_comes_loose(base, tmp_path):
    """An update of the head alone is not one of the embedding, even if the checkpoint ties them."""
    tensors = factors({"lm_head": (64, 96)})
    lorafuse.convert(base("fp32_tied"), write(tmp_path / "lora", tensors), tmp_path / "out")
    found, before = (load_file(path / "model.safetensors") for path in (tmp_path / "out", base("fp32_tied")))
    embed = before["model.embed_tokens.weight"]
    assert torch.equal(found["model.embed_tokens.weight"], embed)
    wanted = (
        embed.double() + 2.5 * (tensors["lm_head.lora_a"].double() @ tensors["lm_head.lora_b"].double()).T
    )
    assert (found["lm_head.weight"] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4_dq"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_layers_trained_whole_replace_those_of_the_base(kind, scale, base, tmp_path):
    """To the bit at scale 1; in between W + scale · (W' − W)."""
    generator = torch.Generator().manual_seed(7)
    before = {name: Truth(*pair) for name, pair in decode(base(kind)).items()}
    names = [name for name in before if name.startswith("model.layers.1.")]
    assert any("norm" in name for name in names) and any("bias" in name for name in names)
    new = {
        name: before[name].value + torch.randn(before[name].value.shape, generator=generator) * 0.1
        for name in names
    }
    new = {name: t.to(before[name].dtype) for name, t in new.items()}
    lora = write(tmp_path / "lora", new, fine_tune_type="full")
    lorafuse.convert(base(kind), lora, tmp_path / "out", adapter_scale=scale)
    for name, t in new.items():
        value = before[name].value * (1 - scale) + scale * t.double()
        before[name] = Truth(value, before[name].dtype, None if scale == 1 else 2.0**-21 * (value.abs() + 1))
    assert complaints(tmp_path / "out", before) == []


def test_a_whole_conv1d_is_turned(base, tmp_path):
    before = decode(base("gpt2"))
    name = "transformer.h.1.attn.c_proj.weight"
    new = torch.randn(64, 64)
    lora = write(tmp_path / "lora", {"model.h.1.attn.c_proj.weight": new}, fine_tune_type="full")
    lorafuse.convert(base("gpt2"), lora, tmp_path / "out")
    wanted = {n: Truth(*pair) for n, pair in before.items()} | {
        name: Truth(new.T.double().contiguous(), torch.float32)
    }
    assert complaints(tmp_path / "out", wanted) == []


def test_early_configs(base, tmp_path):
    """Without a type, and with an alpha that makes no difference."""
    tensors = factors(LINEARS)
    parameters = {"rank": RANK, "alpha": RANK, "scale": 10.0, "dropout": 0.0}
    lora = write(
        tmp_path / "lora",
        tensors,
        drop=("fine_tune_type", "num_layers"),
        lora_layers=16,
        lora_parameters=parameters,
    )
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base("fp32"), tensors, 10.0)) == []


def test_later_versions_kept_an_alpha_that_they_did_not_use(base, tmp_path):
    tensors = factors(LINEARS)
    lora = write(
        tmp_path / "lora", tensors, lora_parameters={"rank": 8, "alpha": 16, "scale": 10.0, "dropout": 0.0}
    )
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base("fp32"), tensors, 10.0)) == []


Q = "model.layers.0.self_attn.q_proj"
NO_SCALE = (
    "CONFIG: has no lora_parameters.scale, the factor of the update; set it to that of the training run."
)
ALPHA = (
    "CONFIG: lora_parameters.alpha is 16 beside a scale; early MLX-LM multiplied the scale by alpha / rank, "
    "later versions do not. Set scale to the whole factor and remove alpha."
)
NORM = "model.norm.weight"
SHIFTED = (
    f"FILE: {NORM} has a mean of 2, {NORM} one of 0.5; MLX-LM keeps the norms of some models as weight + 1, "
    "and such adapters are not supported."
)


@pytest.mark.parametrize(
    ("tensors", "fields", "says"),
    [
        ({}, {"lora_parameters": {"rank": 8}}, NO_SCALE),
        ({}, {"lora_parameters": None}, NO_SCALE),
        (
            {},
            {"lora_parameters": {"scale": "20"}},
            'CONFIG: lora_parameters.scale is the text "20", expected a number.',
        ),
        (
            {},
            {"lora_parameters": {"scale": float("nan")}},
            "CONFIG: lora_parameters.scale is nan, expected a number.",
        ),
        (
            {},
            {
                "lora_parameters": {"rank": 8, "alpha": 16, "scale": 10.0},
                "fine_tune_type": None,
                "num_layers": None,
            },
            ALPHA,
        ),
        ({}, {"fine_tune_type": "dora"}, f"FILE: {Q} has lora_a but no m."),
        (
            {f"{Q}.m": torch.ones(20)},
            {"use_dora": True},
            f"FILE: {Q}.m [20] does not fit {Q}.weight [16, 16]; is the adapter for another base?",
        ),
        ({}, {"fine_tune_type": "ia3"}, "CONFIG: fine_tune_type is ia3, expected one of lora, dora, full."),
        ({f"{Q}.m": torch.ones(16)}, {}, f"FILE: {Q}.m is of a kind that is not supported."),
        (
            {f"{Q}.lora_a_scales": torch.ones(16, 2)},
            {},
            f"FILE: {Q}.lora_a_scales is of a kind that is not supported.",
        ),
        (
            {"model.layers.0.mlp.up_proj.lora_a": torch.ones(16, 4)},
            {},
            "FILE: model.layers.0.mlp.up_proj has lora_a but no lora_b.",
        ),
        (
            {f"{Q}.lora_a": torch.ones(2, 4, 16), f"{Q}.lora_b": torch.ones(2, 16, 4)},
            {},
            f"FILE: {Q}.lora_a is F32 [2, 4, 16] and {Q}.lora_b is F32 [2, 16, 4]; they are not the two "
            "factors of one update of stacked experts.",
        ),
        (
            {f"{Q}.lora_a": torch.ones(4, 16)},
            {},
            f"FILE: {Q}.lora_a is F32 [4, 16] and {Q}.lora_b is F32 [4, 16]; they are not the two factors of "
            "one update.",
        ),
        (
            {f"{Q}.lora_a": torch.ones(20, 4)},
            {},
            f"FILE: {Q}.lora_b [4, 16] does not fit {Q}.weight [16, 16]; is the adapter for another base?",
        ),
        (
            {f"{Q}.lora_a": torch.ones(16, 4, dtype=torch.int32)},
            {},
            f"FILE: {Q}.lora_a has the dtype I32; expected one of F32, F16, BF16.",
        ),
        ({NORM: torch.full((16,), 2.0)}, {}, SHIFTED),
        (
            {NORM: torch.full((8,), 0.5)},
            {},
            f"FILE: {NORM} [8] does not fit {NORM} [16]; is the adapter for another base?",
        ),
        (
            {"model.conv.weight": torch.ones(4, 3, 2)},
            {},
            "FILE: model.conv.weight is F32 [4, 3, 2], which MLX keeps in a layout of its own; that is not "
            "supported.",
        ),
    ],
)
def test_what_is_not_certain_is_refused(tensors, fields, says, tmp_path):
    stored = build.checkpoint_tensors(torch.float32) | {
        NORM: torch.full((16,), 0.5),
        "model.conv.weight": torch.ones(4, 2, 3),
    }
    ckpt = build.write_checkpoint(tmp_path / "ckpt", stored)
    drop = [field for field, value in fields.items() if value is None]
    lora = write(tmp_path / "lora", factors({Q: (16, 16)}) | tensors, drop=drop, **fields)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, lora, tmp_path / "work/out")
    assert build.refusal(caught) == says.replace("CONFIG", f"{lora}/adapter_config.json").replace(
        "FILE", f"{lora}/adapters.safetensors"
    )
    assert not (tmp_path / "work").exists()


def test_the_tensors_must_be_mlxs_too(tmp_path):
    """An MLX config beside PEFT's tensors, or beside the arrays of early versions."""
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora")
    build.write_json(lora / "adapter_config.json", CONFIG)
    start = f"{lora}/adapter_config.json: is an MLX-LM config, but "
    for says in (
        "adapters.safetensors is not beside it.",
        "the adapter is in adapters.npz, which is not supported; save its arrays as adapters.safetensors.",
    ):
        with pytest.raises(AdapterError) as caught:
            lorafuse.convert(ckpt, lora, tmp_path / "out")
        assert str(caught.value) == start + says
        (lora / "adapters.npz").touch()


def test_the_checkpoints_of_training_beside_it_are_not_read(base, tmp_path):
    tensors = factors(LINEARS)
    lora = write(tmp_path / "lora", tensors)
    (lora / "0000100_adapters.safetensors").write_text("not read")
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert complaints(tmp_path / "out", truth(base("fp32"), tensors, 2.5)) == []


def test_a_model_that_mlx_rescales_is_refused(tmp_path):
    """Falcon-H1's multipliers are folded into the weights there, so that the update is not that of the stored
    weight."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt", config=build.CONFIG | {"model_type": "falcon_h1"})
    lora = write(tmp_path / "lora", factors({Q: (16, 16)}))
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert str(caught.value) == (
        f"{lora}/adapter_config.json: MLX-LM rescales the weights of falcon_h1 when it loads them, so its "
        "adapters for it are not supported."
    )
