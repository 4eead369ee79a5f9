"""LoRA's variants: the merged model answers as the unmerged PEFT model does, on dense bases and on decoded
quantized ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import decode, read_adapter, read_tensors
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from unmerged import train

import lorafuse
from lorafuse.cli.show import plan_text
from lorafuse.codecs import Arena
from lorafuse.errors import AdapterError
from lorafuse.patches.factor import BlockDiagonal, Factor
from lorafuse.patches.patch import Base

CPU = torch.device("cpu")
IDS = torch.arange(1, 20)[None]


def answers(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def unmerged(ckpt, dense, lora):
    """The answers of the model that PEFT makes of the adapter and the decoded checkpoint, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    state = {name: value.float() for name, (value, _) in decode(ckpt).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return answers(PeftModel.from_pretrained(model, lora))


def merged(out_dir):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    return answers(model)


def check(kind, dense, base, lora, out_dir, tolerance=1e-4):
    receipt = lorafuse.convert(base(kind), lora, out_dir, dtype="float32")
    plain = lorafuse.convert(base(kind), lora, out_dir.with_name("half"), dtype="float32", adapter_scale=0.5)
    expected, found = unmerged(base(kind), base(dense), lora), merged(out_dir)
    assert (found - expected).abs().max() < tolerance
    assert (
        merged(out_dir.with_name("half")) - expected
    ).abs().max() > 100 * tolerance  # the update is no trifle
    assert plain["adapter_tensors"] == receipt["adapter_tensors"]
    return receipt


LINEAR = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
DORA = {
    "bf16": ("bf16", {"target_modules": [*LINEAR, "lm_head"]}),
    "fp32": ("fp32", {"target_modules": LINEAR, "use_rslora": True}),
    "embedding": ("fp32", {"target_modules": ["embed_tokens", "q_proj"]}),
    "nf4_dq": ("bf16", {"target_modules": LINEAR}),
    "int8": ("bf16", {"target_modules": LINEAR}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"]}),
    "gpt2_nf4": ("gpt2_bf16", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
}


@pytest.mark.parametrize("case", DORA)
def test_dora(case, base, adapter, tmp_path):
    dense, kwargs = DORA[case]
    kind = "fp32" if case == "embedding" else case
    lora = adapter(kind, use_dora=True, **kwargs)
    tensors = {
        k: t * (1 + 0.2 * torch.rand_like(t)) if "magnitude" in k else t
        for k, t in read_adapter(lora).items()
    }
    save_file(tensors, lora / "adapter_model.safetensors")
    receipt = check(kind, dense, base, lora, tmp_path / "out")
    assert [e["dora"] for e in receipt["tensors"].values() if e["action"] == "merged" and "rank" in e]


def test_half_of_dora_is_half_way(base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"], use_dora=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    for scale in (1.0, 0.5):
        lorafuse.convert(base("fp32"), lora, tmp_path / str(scale), adapter_scale=scale)
    whole, half, none = (
        read_tensors(path)[name] for path in (tmp_path / "1.0", tmp_path / "0.5", base("fp32"))
    )
    assert torch.allclose(half, (whole + none) / 2, atol=1e-6) and not torch.allclose(whole, none, atol=1e-2)


def test_dora_of_many_tiles_and_re_read_factors(monkeypatch, base, adapter, tmp_path):
    """The norm of a column is that of the whole weight, however it is cut."""
    lora = adapter("gpt2", target_modules=["c_fc", "wte"], use_dora=True)
    lorafuse.convert(base("gpt2"), lora, tmp_path / "whole")
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 640)
    tiles = Base.tiles
    monkeypatch.setattr(Base, "tiles", lambda self: tiles(self, 512))
    lorafuse.convert(base("gpt2"), lora, tmp_path / "cut")
    whole, cut = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "cut")
    assert all(torch.allclose(whole[name], cut[name], rtol=1e-5, atol=1e-7) for name in whole)


@pytest.mark.parametrize("leaf", ["lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"])
def test_older_names_of_the_magnitude(leaf, base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"], use_dora=True)
    tensors = {k.replace("lora_magnitude_vector", leaf): t for k, t in read_adapter(lora).items()}
    lorafuse.convert(base("fp32"), lora, tmp_path / "a")
    save_file(tensors, lora / "adapter_model.safetensors")
    lorafuse.convert(base("fp32"), lora, tmp_path / "b")
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(6, 8, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(2, 5, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.proj = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(self.attention(x, x, x)[0])


def save_model(model, path):
    path.mkdir()
    save_file(dict(model.state_dict()), path / "model.safetensors")
    (path / "config.json").write_text(
        '{"model_type": "none", "architectures": ["Model"], "dtype": "float32"}'
    )
    return path


def test_dora_of_convolutions(tmp_path):
    torch.manual_seed(0)
    model = Convolutions()
    ckpt = save_model(model, tmp_path / "ckpt")
    peft = train(model, tmp_path / "adapter", r=3, use_dora=True, target_modules=["one", "two", "three"])
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    expected, found = peft.merge_and_unload().state_dict(), read_tensors(tmp_path / "out")
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name


def test_torch_multihead_attention(tmp_path):
    """Both projections; PEFT adds the update of out_proj twice, in the forward pass too."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 16)
    ckpt = save_model(model, tmp_path / "ckpt")
    peft = train(model, tmp_path / "adapter", r=3, lora_alpha=5, target_modules=["attention", "proj"])
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    fresh = Attention()
    fresh.load_state_dict(read_tensors(tmp_path / "out"))
    with torch.no_grad():
        assert (fresh(x) - peft(x)).abs().max() < 1e-5


RESIDUALS = {
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "olora": {"init_lora_weights": "OLoRA", "target_modules": ["q_proj", "down_proj"]},
    "kasa": {"kasa_config": KasaConfig(), "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("case", RESIDUALS)
def test_bases_that_training_changed(case, kind, base, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base(kind))  # its own dtype: the residual is rounded to it
    lora = adapter(kind, model=model, **RESIDUALS[case])
    lorafuse.convert(base(kind), lora, tmp_path / "out", dtype="float32")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base(kind)), lora)
    expected, found = answers(again.float()), merged(tmp_path / "out")
    assert (expected - found).abs().max() < (2e-3 if kind == "bf16" else 1e-4)
    lorafuse.convert(base(kind), lora, tmp_path / "plain", dtype="float32", adapter_scale=0.0)
    assert (expected - merged(tmp_path / "plain")).abs().max() > 0.02


@pytest.mark.parametrize("case", RESIDUALS)
def test_a_base_that_training_changed_and_saved(case, base, adapter, tmp_path):
    """PEFT saves the weight below an adapted head: what was taken out of it must not be taken out again."""
    lora = adapter("fp32", **RESIDUALS[case] | {"target_modules": ["q_proj", "lm_head"]})
    assert "base_model.model.lm_head.base_layer.weight" in read_adapter(lora)
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert (answers(adapter.model) - merged(tmp_path / "out")).abs().max() < 1e-4


def test_the_plan_says_which_weights_are_held_whole(base, adapter, tmp_path):
    lora = adapter("fp32", init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"])
    plan = lorafuse.convert(base("fp32"), lora, tmp_path / "out", dry_run=True)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert plan["held_whole"] == names
    last = plan_text(plan).splitlines()[-2]
    assert last == f"held whole in memory, one after the other, for a decomposition: {names[0]}, {names[1]}"


def test_the_residual_is_rounded_to_the_dtype_of_the_base(base, adapter, tmp_path):
    """As it was for the whole training: without that a bfloat16 base differs in most elements."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("bf16"))
    lora = adapter("bf16", model=model, init_lora_weights="pissa", target_modules=["down_proj"])
    lorafuse.convert(base("bf16"), lora, tmp_path / "out", dtype="float32")
    layer = adapter.model.base_model.model.model.layers[1].mlp.down_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    off = (read_tensors(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"] - expected).abs() > 1e-6
    assert off.float().mean() < 0.01  # where the residual is between two bfloat16 numbers


def test_pissa_of_a_conv1d(base, adapter, tmp_path):
    lora = adapter("gpt2", init_lora_weights="pissa", target_modules=["c_attn", "c_proj"])
    lorafuse.convert(base("gpt2"), lora, tmp_path / "out")
    assert (answers(adapter.model) - merged(tmp_path / "out")).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["pissa", "olora", "kasa"])
def test_a_quantized_base_is_not_what_training_changed(case, base, adapter, tmp_path):
    lora = adapter("bf16", **RESIDUALS[case] | {"target_modules": ["q_proj"]})
    message = (
        rf"q_proj\.lora_A\.weight: {case} took a part of model\.layers\.0\.self_attn\.q_proj\.weight out of "
        "it .*16- or 32-bit"
    )
    with pytest.raises(AdapterError, match=message):
        lorafuse.convert(base("nf4"), lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_block_diagonal_factors(kind, base, adapter, tmp_path):
    blocks = BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2
    )
    lora = adapter(kind, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], use_bdlora=blocks)
    check(kind, "fp32" if kind == "fp32" else "bf16", base, lora, tmp_path / "out")


@pytest.mark.parametrize("config", ["monteclora", "velora"])
def test_what_serves_training_only_is_ignored(config, base, adapter, tmp_path):
    extra = {
        "monteclora": {"monteclora_config": MontecloraConfig()},
        "velora": {"velora_config": VeloraConfig()},
    }[config]
    lora = adapter("fp32", target_modules=["q_proj"], **extra)
    extra_keys = {key for key in read_adapter(lora) if config in key}
    receipt = lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    assert set(receipt["adapter_tensors"]["ignored"]) == extra_keys
    assert (unmerged(base("fp32"), base("fp32"), lora) - merged(tmp_path / "out")).abs().max() < 1e-4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_of_a_block_diagonal_matrix(data):
    n_blocks, height, width = (data.draw(st.integers(1, 4)) for _ in range(3))
    stored = torch.arange(1.0, 1 + n_blocks * height * width).view(-1, width)
    factor = BlockDiagonal(Factor(Held(stored), "x"), n_blocks)
    expected = torch.block_diag(*stored.chunk(n_blocks))
    arena = Arena(CPU)
    assert torch.equal(factor.whole(arena), expected) and factor.shape == expected.shape
    row, col = (sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in expected.shape)
    if row[0] < row[1]:
        assert torch.equal(factor.rows(*row, arena), expected[row[0] : row[1]])
    if col[0] < col[1]:
        assert torch.equal(factor.cols(*col, arena), expected[:, col[0] : col[1]])


class Held:
    """A store of one fp32 tensor, x."""

    def __init__(self, tensor):
        from lorafuse.files.tensors import TensorInfo, TensorSpec

        self._bytes = tensor.contiguous().numpy().tobytes()
        self.tensors = {"x": TensorInfo(TensorSpec("F32", tuple(tensor.shape)), 0, 0)}

    def read_into(self, name, start, buffer):
        memoryview(buffer)[:] = self._bytes[start : start + len(buffer)]


REFUSED = {
    "no magnitude": (
        {"use_dora": True},
        lambda key: not key.endswith("layers.1.self_attn.q_proj.lora_magnitude_vector"),
        r"model\.layers\.1\.self_attn\.q_proj has no lora_magnitude_vector, though use_dora is set in "
        r"adapter_config\.json\.$",
    ),
    "only a magnitude": (
        {"use_dora": True},
        lambda key: "layers.1" not in key or "magnitude" in key,
        r"model\.layers\.1\.self_attn\.q_proj has lora_magnitude_vector but no lora_A\.weight\.$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, base, adapter, tmp_path):
    kwargs, keep, message = REFUSED[case]
    lora = adapter("fp32", target_modules=["q_proj"], **kwargs)
    save_file(
        {k: t for k, t in load_file(lora / "adapter_model.safetensors").items() if keep(k)},
        lora / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match=message):
        lorafuse.convert(base("fp32"), lora, tmp_path / "out")


def test_a_magnitude_of_another_length_is_refused(base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"], use_dora=True)
    tensors = {k: t[:-1] if "magnitude" in k else t for k, t in read_adapter(lora).items()}
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=r"is F32 \[63\], expected a number for each of 64 outputs of model\.layers\.0"
    ):
        lorafuse.convert(base("fp32"), lora, tmp_path / "out")


def test_a_magnitude_of_an_attention_is_refused(tmp_path):
    """PEFT has no DoRA there, so what it means is not known."""
    model = Attention()
    ckpt = save_model(model, tmp_path / "ckpt")
    train(model, tmp_path / "adapter", r=3, target_modules=["attention"])
    extra = "base_model.model.attention.lora_magnitude_vector"
    save_file(
        read_adapter(tmp_path / "adapter") | {extra: torch.ones(48)},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match=rf"{extra} is of a kind that is not supported\.$"):
        lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    ("leaf", "settings"),
    [
        ("lora_magnitude_vector", {"use_dora": True}),
        ("trainable_tokens_delta", {"trainable_token_indices": [3, 5]}),
    ],
)
def test_a_tensor_that_is_there_twice_is_refused(leaf, settings, base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"], **settings)
    tensors = read_adapter(lora)
    key = next(key for key in tensors if key.endswith(leaf))
    save_file(tensors | {f"{key}.default": tensors[key] + 1}, lora / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=rf"{key}(\.default)? and {key}(\.default)? are the same tensor; which is meant\?$"
    ):
        lorafuse.convert(base("fp32"), lora, tmp_path / "out")
