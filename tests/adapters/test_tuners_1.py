"""PEFT types other than LoRA: against the unmerged PEFT model, and against W' in float64 made from the file's
tensors."""

import json

import peft
import peft.tuners.boft.layer as boft_layer
import pytest
import torch
from build import refusal
from oracle import config, decode, read_adapter, read_tensors
from safetensors.torch import load_file, save_file
from torch import nn

import lorafuse
from lorafuse.errors import AdapterError
from lorafuse.planning import plan as steps

PREFIX = "base_model.model."
TARGETS = ["q_proj", "k_proj", "down_proj"]  # square, wide and tall


# ---- W' and b' in float64 from the float64 tensors of one module; c is adapter_config.json


def loha(W, b, a, c):
    rank = a["hada_w1_b"].shape[0]
    return W + (a["hada_w1_a"] @ a["hada_w1_b"]) * (a["hada_w2_a"] @ a["hada_w2_b"]) * alpha_of(
        a, c
    ) / rank, b


def lokr(W, b, a, c):
    one, two = (a[n] if n in a else a[f"{n}_a"] @ a[f"{n}_b"] for n in ("lokr_w1", "lokr_w2"))
    return W + torch.kron(one, two) * alpha_of(a, c) / c["r"], b


def ia3(W, b, a, c):
    by = a["ia3_l"]
    return W * by, b * by.flatten() if by.shape[1] == 1 else b


def hra(W, b, a, c):
    u, eye = a["hra_u"], torch.eye(W.shape[1], dtype=torch.float64)
    if c["apply_GS"]:
        q = torch.linalg.qr(u).Q
        return W @ (eye - 2 * q @ q.T), b
    for column in u.T:
        W = W @ (eye - 2 * torch.outer(column, column) / column.dot(column))
    return W, b


def shira(W, b, a, c):
    return W + torch.sparse_coo_tensor(
        a["shira_indices"], a["shira_weight"], W.shape, dtype=W.dtype
    ).to_dense(), b


def miss(W, b, a, c):
    block = a["miss_block"]
    if c["init_weights"] == "mini":
        block = block.tile(1, W.shape[0] // block.shape[1])
    return W + block.tile(-(-W.shape[1] // len(block)), 1)[: W.shape[1]].T, b


def bat(W, b, a, c):
    blocks, shards = a["miss_block"], W.shape[1] // a["miss_block"].shape[1]
    rows = [
        part @ torch.block_diag(*[m] * shards) + m.tile(1, shards)
        for part, m in zip(W.split(len(blocks[0])), blocks, strict=True)
    ]
    return W + torch.cat(rows), b


def c3a(W, b, a, c):
    kernel, delta = a["c3a_kernel"], torch.zeros_like(W)
    n_out, n_in, size = kernel.shape
    for i in range(n_out):
        for j in range(n_in):
            block = torch.stack([kernel[i, j].roll(p) for p in range(size)])
            delta[i * size : (i + 1) * size, j * size : (j + 1) * size] = block / W.shape[1]
    return W + delta, b


def cayley(skew):
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (eye - skew) @ torch.linalg.inv(eye + skew)


def oft(W, b, a, c, doubled=False):
    q = a["oft_R.weight"]
    size = next(n for n in range(2, 999) if n * (n - 1) // 2 == q.shape[1])
    skew = torch.zeros(len(q), size, size, dtype=q.dtype)
    for n in range(len(q)):
        skew[n, *torch.triu_indices(size, size, 1)] = q[n]
    skew = skew - skew.mT
    if c["coft"]:
        limit = c["eps"] / len(q) ** 0.5
        skew = torch.stack([m * min(1, limit / m.norm()) for m in skew])
    if c["use_cayley_neumann"]:
        last = c["num_cayley_neumann_terms"] - 1
        power = [torch.linalg.matrix_power(skew, k) for k in range(last + 1)]
        r = power[0] + 2 * sum(power[1:last]) + (2 if doubled else 1) * power[last]
    else:
        r = cayley(skew)
    return W @ torch.block_diag(
        *r, *(r[:1].repeat(W.shape[1] // size - 1, 1, 1) if c["block_share"] else [])
    ).T, b


def boft(W, b, a, c):
    """F_i is the rotation in the order in which neighbouring halves of blocks are 2ⁱ halves apart."""
    stored, n = a["boft_R"], W.shape[1]
    for i, blocks in enumerate(stored):
        order, half = torch.arange(n), stored.shape[-1] // 2
        if i:
            group = half * 2 ** (i + 1)
            halves = [order[g : g + group].split(half) for g in range(0, n, group)]
            order = torch.cat([torch.cat([*parts[::2], *parts[1::2]]) for parts in halves])
        p = torch.eye(n, dtype=W.dtype)[order]
        W = W @ (p @ torch.block_diag(*cayley((blocks - blocks.mT) / 2)) @ p.T).T
    return W * a["boft_s"], b


def alpha_of(a, c):
    """The patterns of these tests are ends of names."""
    return next((v for k, v in c["alpha_pattern"].items() if a["module"].endswith(k)), c["alpha"])


# name → (config class, its settings, formula)
TYPES = {
    "boft": (peft.BOFTConfig, {"boft_block_size": 8}, boft),
    "boft_butterfly": (
        peft.BOFTConfig,
        {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "boft_dropout": 0.2},
        boft,
    ),
    "boft_number": (
        peft.BOFTConfig,
        {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 2},
        boft,
    ),
    "hra": (peft.HRAConfig, {"r": 4}, hra),
    "hra_odd": (peft.HRAConfig, {"r": 5, "init_weights": False}, hra),
    "hra_orthonormal": (peft.HRAConfig, {"r": 6, "apply_GS": True}, hra),
    "oft": (peft.OFTConfig, {"oft_block_size": 8}, oft),
    "oft_terms": (
        peft.OFTConfig,
        {"oft_block_size": 16, "num_cayley_neumann_terms": 7, "module_dropout": 0.5},
        oft,
    ),
    "oft_exact": (peft.OFTConfig, {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False}, oft),
    "oft_shared": (peft.OFTConfig, {"oft_block_size": 32, "block_share": True}, oft),
    "oft_constrained": (peft.OFTConfig, {"oft_block_size": 8, "coft": True, "eps": 0.7}, oft),
    "shira": (peft.ShiraConfig, {"r": 4, "random_seed": 3}, shira),
    "miss": (peft.MissConfig, {"r": 8, "miss_dropout": 0.5}, miss),
    "miss_cut": (peft.MissConfig, {"r": 7}, miss),
    "miss_mini": (peft.MissConfig, {"r": 10, "mini_r": 8, "init_weights": "mini"}, miss),
    "miss_bat": (peft.MissConfig, {"r": 16, "init_weights": "bat"}, bat),
    "c3a": (peft.C3AConfig, {"block_size": 8}, c3a),
    "c3a_pattern": (peft.C3AConfig, {"block_size": 16, "block_size_pattern": {"q_proj": 64}}, c3a),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}, ia3),
    "ia3_regex": (peft.IA3Config, {"feedforward_modules": r".*(q|down)_proj"}, ia3),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 8}, loha),
    "loha_patterns": (
        peft.LoHaConfig,
        {
            "r": 4,
            "alpha": 8,
            "rank_pattern": {"0.self_attn.q_proj": 3},
            "alpha_pattern": {"q_proj": 5.5},
            "module_dropout": 0.5,
        },
        loha,
    ),
    "lokr": (peft.LoKrConfig, {"r": 4, "alpha": 8}, lokr),
    "lokr_both": (peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_both": True}, lokr),
    "lokr_whole": (peft.LoKrConfig, {"r": 64, "alpha": 100, "alpha_pattern": {"down_proj": 7}}, lokr),
    "lokr_factor": (peft.LoKrConfig, {"r": 3, "alpha": 8, "decompose_factor": 4, "rank_dropout": 0.5}, lokr),
}


class BlockDiagonal:
    """Stands for PEFT's CUDA extension, without which BOFT has one butterfly factor."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*part) for part in blocks])]


@pytest.fixture
def tuned(base, tmp_path, monkeypatch):
    """tuned(config) → (adapter directory, the unmerged PEFT model in eval mode), no parameter at its initial
    value."""

    def make(settings, *, ckpt=None, model=None, name="adapter", spread=0.1):
        from transformers import AutoModelForCausalLM

        monkeypatch.setattr(boft_layer, "_FBD_CUDA", BlockDiagonal)
        model = model or AutoModelForCausalLM.from_pretrained(ckpt or base("fp32"), dtype=torch.float32)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, settings)
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * spread)
        wrapped.save_pretrained(tmp_path / name)
        return tmp_path / name, wrapped.eval()

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 20)[None]).logits


def load(path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    return model


def expected(ckpt, adapter, formula, scale=1.0):
    """{weight: (float64 value, whether the adapter changes it)}."""
    wanted = {name: [value, False] for name, (value, _) in decode(ckpt).items()}
    modules, settings = {}, config(adapter, "adapter_config.json")
    for key, tensor in read_adapter(adapter).items():
        module, leaf = key.removeprefix(PREFIX).split("_proj.")
        module += "_proj"
        modules.setdefault(module, {"module": module})[leaf] = (
            tensor.double() if tensor.is_floating_point() else tensor
        )
    for module, tensors in modules.items():
        weight, bias = wanted[f"{module}.weight"], wanted.get(f"{module}.bias", [None, False])
        for entry, new in zip((weight, bias), formula(weight[0], bias[0], tensors, settings), strict=True):
            if new is not entry[0]:
                entry[0], entry[1] = entry[0] + scale * (new - entry[0]), True
    return wanted


def assert_weights(out_dir, wanted, base_tensors):
    """Changed weights within fp32's error, all others bit for bit."""
    found = read_tensors(out_dir)
    assert found.keys() == wanted.keys()
    assert any(changed for _, changed in wanted.values())
    for name, (value, changed) in wanted.items():
        w = base_tensors[name][0]
        assert found[name].shape == value.shape
        if changed:
            slack = 3e-6 * (value.abs() + w.abs()) + 1e-6 * w.abs().max()
            assert ((found[name].double() - value).abs() <= slack).all(), name
            assert (value - w).abs().max() > 1e-3, f"{name}: the adapter changes nothing"
        else:
            assert torch.equal(found[name].double(), value), name


@pytest.mark.parametrize("name", TYPES)
def test_the_merged_model_answers_as_the_unmerged_one(name, base, tuned, tmp_path):
    kind, settings, formula = TYPES[name]
    adapter, model = tuned(kind(target_modules=TARGETS, **settings))
    receipt = lorafuse.convert(base("fp32"), adapter, tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 1e-4
    assert_weights(tmp_path / "out", expected(base("fp32"), adapter, formula), decode(base("fp32")))
    assert receipt["adapter_tensors"] == {"used": sorted(read_adapter(adapter)), "ignored": {}}


@pytest.mark.parametrize("name", TYPES)
def test_the_base_is_what_nf4_training_saw(name, base, tuned, tmp_path, monkeypatch):
    """The reference is PEFT on the dequantized base; --adapter-scale multiplies W' − W, here with tiles of a
    few rows."""
    kind, settings, formula = TYPES[name]
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file(
        {n: v.float() for n, (v, _) in decode(base("nf4_dq")).items()},
        dense / "model.safetensors",
        {"format": "pt"},
    )
    (dense / "config.json").write_text(
        json.dumps({k: v for k, v in config(base("bf16")).items() if k != "dtype"})
    )
    adapter, model = tuned(kind(target_modules=TARGETS, **settings), ckpt=dense)
    lorafuse.convert(base("nf4_dq"), adapter, tmp_path / "out", dtype="float32")
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 1e-4
    monkeypatch.setattr(steps, "TILE_NUMEL", 480)
    lorafuse.convert(base("nf4_dq"), adapter, tmp_path / "half", dtype="float32", adapter_scale=0.5)
    assert_weights(tmp_path / "half", expected(base("nf4_dq"), adapter, formula, 0.5), decode(base("nf4_dq")))


@pytest.mark.parametrize("name", ["boft", "c3a", "hra", "ia3", "loha", "lokr", "miss", "oft", "shira"])
def test_the_adapter_name_in_a_key_is_accepted(name, base, tuned, tmp_path):
    kind, settings, _ = TYPES[name]
    adapter, _ = tuned(kind(target_modules=TARGETS, **settings))
    lorafuse.convert(base("fp32"), adapter, tmp_path / "plain")
    named = {
        f"{k.removesuffix('.weight')}.mine{'.weight' * k.endswith('.weight')}": t
        for k, t in read_adapter(adapter).items()
    }
    save_file(named, adapter / "adapter_model.safetensors")
    lorafuse.convert(base("fp32"), adapter, tmp_path / "named")
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (
        tmp_path / "named/model.safetensors"
    ).read_bytes()


def test_an_hf_conv1d_is_refused_where_peft_has_no_such_layer(base, tuned, tmp_path):
    adapter, _ = tuned(peft.HRAConfig(target_modules=TARGETS, r=4))
    key = "base_model.model.transformer.h.0.attn.c_proj.hra_u"
    save_file({key: zeros(64, 4)}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(base("gpt2"), adapter, tmp_path / "work" / "out")
    assert str(caught.value) == (
        f"{adapter}/adapter_model.safetensors: {key} updates transformer.h.0.attn.c_proj.weight, an HF "
        "Conv1D, which HRA does not adapt."
    )
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("inputs", [[], ["mlp.c_proj", "c_fc"], ["c_attn", "attn.c_proj"]])
def test_ia3_of_an_hf_conv1d_scales_its_other_side(inputs, base, tuned, tmp_path):
    """c_attn, c_fc and the MLP's c_proj are decided by shape, the attention's square c_proj by the
    architecture."""
    settings = peft.IA3Config(
        target_modules=["c_attn", "c_proj", "c_fc", *inputs], feedforward_modules=inputs
    )
    adapter, model = tuned(settings, ckpt=base("gpt2"))
    lorafuse.convert(base("gpt2"), adapter, tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "kind", [peft.BOFTConfig, peft.C3AConfig, peft.HRAConfig, peft.MissConfig, peft.OFTConfig]
)
def test_trained_biases_replace_those_of_the_base(kind, base, tuned, tmp_path):
    only = kind.__name__.removesuffix("Config").lower().replace("miss", "MiSS") + "_only"
    settings = kind(
        target_modules=TARGETS, bias=only, **({"block_size": 8} if kind is peft.C3AConfig else {})
    )
    adapter, model = tuned(settings)
    receipt = lorafuse.convert(base("fp32"), adapter, tmp_path / "out")
    assert receipt["tensors"]["model.layers.0.self_attn.q_proj.bias"]["action"] == "replaced"
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 1e-4


def test_biases_that_peft_did_not_save_are_missed(base, tuned, tmp_path):
    adapter, _ = tuned(peft.HRAConfig(target_modules=TARGETS, r=4))
    rewrite(adapter, bias="hra_only")
    events = []
    lorafuse.convert(base("fp32"), adapter, tmp_path / "out", on_event=events.append)
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        f"{adapter}/adapter_model.safetensors: bias is 'hra_only', but no trained bias is in the file; peft "
        "before 0.21 did not save them."
    ]


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_short_series_of_oft_are_those_of_peft(terms, base, tuned, tmp_path):
    """PEFT computes four terms when three are asked for, and does not halve the last of two."""
    adapter, model = tuned(
        peft.OFTConfig(target_modules=TARGETS, oft_block_size=8, num_cayley_neumann_terms=terms)
    )
    lorafuse.convert(base("fp32"), adapter, tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 1e-4


def test_oft_of_old_releases_is_merged_as_it_was_trained(base, tuned, tmp_path):
    """Before 0.18 the last term of the series counted twice, and the config named no version."""
    adapter, _ = tuned(peft.OFTConfig(target_modules=TARGETS, oft_block_size=8))
    rewrite(adapter, peft_version=None)
    events = []
    lorafuse.convert(base("fp32"), adapter, tmp_path / "out", on_event=events.append)
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        f"{adapter}/adapter_config.json: was written by peft before 0.18, whose Cayley-Neumann series had "
        "another last term; it is merged as it was trained, which later releases of peft do not do."
    ]
    wanted = expected(base("fp32"), adapter, lambda W, b, a, c: oft(W, b, a, c, doubled=True))
    assert_weights(tmp_path / "out", wanted, decode(base("fp32")))


def test_oft_of_a_larger_kernel_is_refused(tuned, tmp_path):
    """In PEFT the unmerged layer and its merged weight answer differently."""
    plain, ckpt = Layers(), tmp_path / "ckpt"
    write_layers(plain, ckpt)
    adapter, _ = tuned(peft.OFTConfig(target_modules=["square"], oft_block_size=4), model=plain)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, tmp_path / "work" / "out")
    assert str(caught.value) == (
        f"{adapter}/adapter_model.safetensors: base_model.model.square.oft_R.weight turns patches of "
        "square.weight [8, 8, 3, 3]; they overlap, so no merged weight equals it."
    )
    assert not (tmp_path / "work").exists()


def test_shira_indices_of_windows_and_repeated_ones(base, tuned, tmp_path):
    """float32 indices are exact; values of the same element add up, in whatever order the file has them."""
    adapter, _ = tuned(peft.ShiraConfig(target_modules=TARGETS, r=4))
    tensors = read_adapter(adapter)
    for key in [key for key in tensors if key.endswith("shira_indices")]:
        tensors[key][:, 5] = tensors[key][:, 300]
        tensors[key] = tensors[key].float()
    save_file(tensors, adapter / "adapter_model.safetensors")
    lorafuse.convert(base("fp32"), adapter, tmp_path / "out")
    assert_weights(tmp_path / "out", expected(base("fp32"), adapter, shira), decode(base("fp32")))


def test_shira_indices_outside_the_weight_are_refused(base, tuned, tmp_path):
    adapter, _ = tuned(peft.ShiraConfig(target_modules=TARGETS, r=4))
    tensors = read_adapter(adapter)
    tensors[f"{Q}.shira_indices"][1, 7] = 64
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(base("fp32"), adapter, tmp_path / "work" / "out")
    assert refusal(caught) == (
        f"{adapter}/adapter_model.safetensors: {Q}.shira_indices has the position 64, outside of the 64 "
        f"columns of {W}; is the adapter for another base?"
    )
    assert not (tmp_path / "work").exists()


def test_ia3_on_outputs_needs_no_bias(base, tuned, tmp_path):
    adapter, model = tuned(
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]), ckpt=base("bf16_odd")
    )
    lorafuse.convert(base("bf16_odd"), adapter, tmp_path / "out", dtype="float32")
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() < 1e-4


# ---- convolutions and embeddings


class Layers(nn.Module):
    """Layers of each kind beside Linear, one after the other."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 24)
        self.line, self.grouped = nn.Conv1d(24, 16, 3), nn.Conv1d(16, 12, 3, groups=2)
        self.plane, self.point = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 1)
        self.cube = nn.Conv3d(1, 2, (2, 2, 1))
        self.wide, self.square, self.paired = (
            nn.Conv2d(8, 8, (3, 2)),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 4, 2, groups=2),
        )

    def forward(self, ids):
        x = self.grouped(self.line(self.words(ids).transpose(1, 2)))
        x = self.plane(x[:, None])
        return self.cube(self.paired(self.square(self.wide(self.point(x))))[:, None])


PLANES = ["plane", "point", "wide", "square", "paired"]
CONVOLUTIONS = ["line", "grouped", *PLANES]
LAYERS = {
    "boft": (peft.BOFTConfig, {"boft_block_size": 3}, ["plane", "point"]),
    "boft_butterfly": (peft.BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, ["square"]),
    "oft": (peft.OFTConfig, {"oft_block_size": 3}, ["point", "words"]),
    "oft_shared": (
        peft.OFTConfig,
        {"oft_block_size": 6, "block_share": True, "use_cayley_neumann": False},
        ["point", "words"],
    ),
    "hra": (peft.HRAConfig, {"r": 2}, ["plane", "point", "square"]),
    "hra_orthonormal": (peft.HRAConfig, {"r": 3, "apply_GS": True}, ["plane", "point", "square"]),
    "ia3_outputs": (peft.IA3Config, {"feedforward_modules": ["plane"]}, [*PLANES, "cube"]),
    "ia3_inputs": (peft.IA3Config, {"feedforward_modules": [*PLANES, "cube"]}, [*PLANES, "cube"]),
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 6}, CONVOLUTIONS),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 6}, CONVOLUTIONS),
    "lokr_factor": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 2, "decompose_factor": 2},
        ["line", "grouped", "wide", "square", "paired"],
    ),
    "lokr_whole": (peft.LoKrConfig, {"r": 99, "alpha": 60}, CONVOLUTIONS),
}
LAYERS |= {
    f"{name}_effective": (kind, s | {"use_effective_conv2d": True}, t)
    for name, (kind, s, t) in LAYERS.items()
    if name[:2] == "lo"
}
# PEFT's own forward pass fails on Conv1d with a core of rank 1.
LAYERS["lokr_factor_effective"] = (
    *LAYERS["lokr_factor_effective"][:2],
    ["plane", "wide", "square", "paired"],
)


def write_layers(model, ckpt):
    ckpt.mkdir()
    save_file(model.state_dict(), ckpt / "model.safetensors")
    (ckpt / "config.json").write_text(
        '{"model_type": "none", "architectures": ["Layers"], "dtype": "float32"}'
    )


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_and_embeddings(name, tuned, tmp_path):
    kind, settings, targets = LAYERS[name]
    torch.manual_seed(0)
    plain, ckpt, ids = Layers(), tmp_path / "ckpt", torch.arange(11)[None].repeat(2, 1)
    write_layers(plain, ckpt)
    with torch.no_grad():
        before = plain(ids)
        adapter, model = tuned(kind(target_modules=targets, **settings), model=plain, spread=0.3)
        lorafuse.convert(ckpt, adapter, tmp_path / "out")
        merged = Layers()
        merged.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
        after = model(ids)
        assert (after - before).abs().max() > 1e-2
        assert (merged(ids) - after).abs().max() < 1e-5 * after.abs().max()


# ---- refusals


def rewrite(path, **fields):
    settings = json.loads((path / "adapter_config.json").read_text()) | fields
    (path / "adapter_config.json").write_text(json.dumps(settings))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
W = "model.layers.0.self_attn.q_proj.weight"


def zeros(*shape):
    return torch.zeros(shape)


# name → (type in TYPES, config fields, tensors by leaf or None for those that PEFT wrote, message with {file} and {config})
REFUSED = {
    "oft of another size": (
        "oft",
        {},
        {"oft_R.weight": zeros(9, 28)},
        f"{{file}}: {Q}.oft_R.weight [9, 28] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "oft of no triangle": (
        "oft",
        {},
        {"oft_R.weight": zeros(8, 27)},
        f"{{file}}: {Q}.oft_R.weight is F32 [8, 27]; OFT has no such shape.",
    ),
    "oft not shared": (
        "oft_shared",
        {"block_share": False},
        {"oft_R.weight": zeros(1, 496)},
        f"{{file}}: {Q}.oft_R.weight [1, 496] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "oft of 0.15": (
        "oft",
        {},
        {"oft_r": zeros(8, 8, 8)},
        f"{{file}}: {Q}.oft_r is of peft before 0.16, whose OFT is not supported.",
    ),
    "oft terms": (
        "oft",
        {"num_cayley_neumann_terms": 0},
        None,
        "{config}: num_cayley_neumann_terms is 0, expected an integer of at least 1.",
    ),
    "oft eps": (
        "oft_constrained",
        {"eps": "1"},
        None,
        "{config}: eps is 1, expected a number of at least 0.",
    ),
    "boft of another size": (
        "boft",
        {},
        {"boft_R": zeros(1, 8, 8, 8), "boft_s": zeros(72, 1)},
        f"{{file}}: {Q}.boft_R [1, 8, 8, 8] and {Q}.boft_s [72, 1] do not fit {W} [64, 64]; is the adapter "
        "for another base?",
    ),
    "boft of odd blocks": (
        "boft",
        {},
        {"boft_R": zeros(2, 4, 3, 3), "boft_s": zeros(64, 1)},
        f"{{file}}: {Q}.boft_R is F32 [2, 4, 3, 3] and {Q}.boft_s is F32 [64, 1]; they do not make one "
        "update.",
    ),
    "hra of another size": (
        "hra",
        {},
        {"hra_u": zeros(72, 4)},
        f"{{file}}: {Q}.hra_u [72, 4] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "hra of no rank": (
        "hra",
        {},
        {"hra_u": zeros(64)},
        f"{{file}}: {Q}.hra_u is F32 [64], expected [in, r].",
    ),
    "shira without indices": (
        "shira",
        {},
        {"shira_weight": zeros(5)},
        "{file}: model.layers.0.self_attn.q_proj has shira_weight but no shira_indices.",
    ),
    "shira of two lengths": (
        "shira",
        {},
        {"shira_weight": zeros(5), "shira_indices": zeros(2, 6).int()},
        f"{{file}}: {Q}.shira_weight is F32 [5] and {Q}.shira_indices is I32 [2, 6]; they do not make one "
        "update.",
    ),
    "miss of another size": (
        "miss",
        {},
        {"miss_block": zeros(8, 72)},
        f"{{file}}: {Q}.miss_block [8, 72] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "miss of another variant": (
        "miss_bat",
        {"init_weights": True},
        None,
        "{file}: base_model.model.model.layers.0.mlp.down_proj.miss_block is F32 [4, 16, 16], expected [r, "
        "out], since init_weights is True.",
    ),
    "miss of a new variant": (
        "miss",
        {"init_weights": "bit"},
        None,
        "{config}: init_weights is bit, expected true, false, 'bat' or 'mini', which say how miss_block is "
        "applied.",
    ),
    "c3a of another size": (
        "c3a",
        {},
        {"c3a_kernel": zeros(8, 9, 8)},
        f"{{file}}: {Q}.c3a_kernel [8, 9, 8] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "c3a of integers": (
        "c3a",
        {},
        {"c3a_kernel": zeros(8, 8, 8).int()},
        f"{{file}}: {Q}.c3a_kernel has the dtype I32; expected one of F32, F16, BF16.",
    ),
    "ia3 of another size": (
        "ia3",
        {},
        {"ia3_l": zeros(72, 1)},
        f"{{file}}: {Q}.ia3_l [72, 1] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "ia3 of several vectors": (
        "ia3",
        {},
        {"ia3_l": zeros(64, 2)},
        f"{{file}}: {Q}.ia3_l is F32 [64, 2], expected a vector as PEFT stores it.",
    ),
    "ia3 without feedforward_modules": (
        "ia3",
        {"feedforward_modules": None},
        {"ia3_l": zeros(1, 64, 1, 1)},
        "{config}: feedforward_modules is None, expected a list or a regular expression.",
    ),
    "ia3 with a bad regular expression": (
        "ia3",
        {"feedforward_modules": "("},
        {"ia3_l": zeros(1, 1)},
        "{config}: feedforward_modules is not a regular expression: missing ), unterminated subpattern at "
        "position 0.",
    ),
    "loha without a partner": (
        "loha",
        {},
        {"hada_w1_a": zeros(64, 4), "hada_w1_b": zeros(4, 64), "hada_w2_a": zeros(64, 4)},
        "{file}: model.layers.0.self_attn.q_proj has hada_w1_a but no hada_w2_b.",
    ),
    "loha of another size": (
        "loha",
        {},
        {
            "hada_w1_a": zeros(64, 4),
            "hada_w1_b": zeros(4, 72),
            "hada_w2_a": zeros(64, 4),
            "hada_w2_b": zeros(4, 72),
        },
        f"{{file}}: {Q}.hada_w1_a [64, 4] and {Q}.hada_w1_b [4, 72] do not fit {W} [64, 64]; is the adapter "
        "for another base?",
    ),
    "loha of two ranks": (
        "loha",
        {},
        {
            "hada_w1_a": zeros(64, 4),
            "hada_w1_b": zeros(3, 64),
            "hada_w2_a": zeros(64, 4),
            "hada_w2_b": zeros(4, 64),
        },
        f"{{file}}: {Q}.hada_w1_a is F32 [64, 4] and {Q}.hada_w1_b is F32 [3, 64]; they do not make one "
        "update.",
    ),
    "loha of a new kind": (
        "loha",
        {},
        {f"hada_w{i}_{x}": zeros(64, 64) for i in (1, 2) for x in "ab"} | {"hada_w3_a": zeros(1)},
        f"{{file}}: {Q}.hada_w3_a is of a kind that is not supported.",
    ),
    "loha alpha": (
        "loha",
        {"alpha": "8"},
        None,
        "{config}: the alpha of model.layers.0.mlp.down_proj is 8, expected a number.",
    ),
    "loha pattern": (
        "loha",
        {"rank_pattern": [1]},
        None,
        "{config}: rank_pattern is [1], expected an object.",
    ),
    "lokr without rank": (
        "lokr_whole",
        {"r": 0},
        None,
        "{config}: the rank of model.layers.0.mlp.down_proj is 0, expected an integer of at least 1.",
    ),
    "lokr without w2": (
        "lokr",
        {},
        {"lokr_w1": zeros(8, 8)},
        "{file}: model.layers.0.self_attn.q_proj has no lokr_w2 and no lokr_w2_a.",
    ),
    "lokr of another size": (
        "lokr",
        {},
        {"lokr_w1": zeros(8, 8), "lokr_w2": zeros(8, 9)},
        f"{{file}}: {Q}.lokr_w1 [8, 8] and {Q}.lokr_w2 [8, 9] do not fit {W} [64, 64]; is the adapter for "
        "another base?",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(case, base, tuned, tmp_path):
    name, fields, tensors, message = REFUSED[case]
    kind, settings, _ = TYPES[name]
    adapter, _ = tuned(kind(target_modules=TARGETS, **settings))
    rewrite(adapter, **fields)
    if tensors is not None:
        save_file({f"{Q}.{leaf}": t for leaf, t in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(base("fp32"), adapter, tmp_path / "work" / "out")
    wanted = message.format(
        file=adapter / "adapter_model.safetensors", config=adapter / "adapter_config.json"
    )
    assert refusal(caught) == wanted
    assert not (tmp_path / "work").exists()
