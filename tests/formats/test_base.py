"""`--format base`: what changes stays on the base's own grid, without bias; all else is the base's bytes."""

import json

import numpy as np
import own_grid
import pytest
import quantized
import torch
from build import write_adapter
from safetensors.torch import load_file

import lorafuse
from lorafuse.errors import ResultError, UsageError

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "": ["q_proj", "v_proj", "down_proj"]}
KINDS = [
    "nf4",
    "nf4_dq",
    "nf4_fp16",
    "fp4_dq",
    "nf4_bs256",
    "nf4_bf16storage",
    "fp4_fp32storage",
    "nf4_odd",
    "int8",
]
GPT2 = ["gpt2_nf4", "gpt2_int8"]


def stored(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool((a.reshape(-1).view(torch.uint8) == b.reshape(-1).view(torch.uint8)).all())
    )


@pytest.fixture
def merged(base, adapter, tmp_path):
    """merged(kind, …) → the base, the adapter, what the sums are in fp32, and the receipt of tmp_path/out."""

    def make(kind, **options):
        targets = TARGETS["gpt2" if kind.startswith("gpt2") else ""]
        lora = adapter(kind, target_modules=targets, fan_in_fan_out=kind.startswith("gpt2"))
        lorafuse.convert(base(kind), lora, tmp_path / "sums", dtype="float32", adapter_scale=0.1)
        receipt = lorafuse.convert(
            base(kind), lora, tmp_path / "out", format="base", adapter_scale=0.1, **options
        )
        return stored(base(kind)), lora, stored(tmp_path / "sums"), receipt

    return make


@pytest.mark.parametrize("kind", KINDS + GPT2)
def test_codes_are_those_of_the_definition(kind, merged, base, tmp_path):
    was, _, sums, receipt = merged(kind)
    found = stored(tmp_path / "out")
    assert found.keys() == was.keys()
    changed = [name for name, entry in receipt["tensors"].items() if entry["action"] == "merged"]
    assert changed
    for name in was.keys() - set(changed):
        assert same(found[name], was[name]), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (
        config["quantization_config"]
        == json.loads((base(kind) / "config.json").read_text())["quantization_config"]
    )
    for name in changed[:1]:
        codes, values = own_grid.grid_of(was, name)
        x, u = sums[name].double(), own_grid.uniform(name, sums[name].numel())
        if kind in GPT2:  # stored (out, in): indexes are those of (in, out)
            x, u = x.T.contiguous(), np.ascontiguousarray(u.reshape(x.shape).T).reshape(-1)
        expected, n_clipped = own_grid.rounded(codes, values, x.reshape(-1), u)
        made, _ = own_grid.grid_of(found, name)
        assert torch.equal(values.gather(1, made[:, None]), values.gather(1, expected[:, None])), name
        entry = receipt["tensors"][name]
        assert entry["clipped"] == pytest.approx(n_clipped / len(codes))
        w, s = (values.gather(1, of[:, None]).view(-1) for of in (codes, made))
        delta = x.reshape(-1) - w
        assert entry["kept"] == pytest.approx(float((s - w) @ delta / (delta @ delta)), rel=1e-3)
        assert entry["changed"] == pytest.approx(float((s != w).double().mean()))


@pytest.mark.parametrize("kind", ["nf4_dq", "int8", "gpt2_nf4"])
def test_bytes_depend_on_no_tile_thread_or_shard(kind, merged, base, tmp_path, monkeypatch):
    _, lora, _, _ = merged(kind)
    expected = stored(tmp_path / "out")
    for number, (tile_numel, n_threads, shard) in enumerate([(640, "1", "5GB"), (1 << 12, "4", "30KB")]):
        monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", tile_numel)
        monkeypatch.setattr("lorafuse.arithmetic.on_grid.CHUNK_NUMEL", 128)
        monkeypatch.setattr("lorafuse.arithmetic.on_grid.SETTLED_NUMEL", 40)
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=int(n_threads): set(range(n)))
        out = tmp_path / f"again-{number}"
        lorafuse.convert(base(kind), lora, out, format="base", adapter_scale=0.1, max_shard_size=shard)
        found = stored(out)
        assert found.keys() == expected.keys()
        assert all(same(found[name], expected[name]) for name in found)


def test_to_the_nearest_value(merged, base, tmp_path):
    """What moves is what lies beyond the middle of two values, and half of it is lost."""
    was, _, sums, receipt = merged("nf4", rounding="nearest")
    name = next(name for name, entry in receipt["tensors"].items() if entry["action"] == "merged")
    _, values = own_grid.grid_of(was, name)
    x = sums[name].double().reshape(-1)
    made, _ = own_grid.grid_of(stored(tmp_path / "out"), name)
    distance = (values - x[:, None]).abs()
    assert torch.equal(distance.gather(1, made[:, None])[:, 0], distance.amin(1))
    assert receipt["settings"]["rounding"] == "nearest"


def one_weight(root, n_out, n_in, a, b):
    """A checkpoint of one NF4 weight `w.weight`, and a LoRA whose factors are `a` and `b` everywhere."""
    torch.manual_seed(0)
    weight = (torch.randn(n_out, n_in) * 0.02).bfloat16()
    tensors, _ = quantized.four_bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    root.mkdir()
    ckpt = quantized.write(root / "ckpt", tensors, quantization_config=quantization)
    factors = {"lora_A": torch.full((1, n_in), a), "lora_B": torch.full((n_out, 1), b)}
    keys = {f"base_model.model.w.{name}.weight": factor for name, factor in factors.items()}
    return ckpt, write_adapter(root / "lora", keys, r=1, lora_alpha=1)


def test_no_bias(tmp_path):
    """Of a million weights with one update, the mean of what is stored is that of the sums, to what chance
    allows."""
    receipt = lorafuse.convert(
        *one_weight(tmp_path / "in", 512, 2048, 1.0, 2e-4), tmp_path / "out", format="base"
    )
    entry = receipt["tensors"]["w.weight"]
    # kept = mean(S - W) / step; what is clipped at the top of its block is lost.
    error = entry["noise"] / (512 * 2048) ** 0.5
    assert abs(entry["kept"] - (1 - entry["clipped"])) < 5 * error + 0.002
    assert 0 < entry["clipped"] < 0.02 and entry["noise"] > 3


def test_without_an_update_nothing_moves(tmp_path):
    ckpt, lora = one_weight(tmp_path / "in", 64, 128, 1.0, 0.0)
    receipt = lorafuse.convert(ckpt, lora, tmp_path / "out", format="base")
    assert receipt["tensors"]["w.weight"]["changed"] == 0
    found, was = stored(tmp_path / "out"), stored(ckpt)
    assert all(same(found[name], was[name]) for name in was)


def test_sums_that_are_not_finite_end_the_run(tmp_path):
    ckpt, lora = one_weight(tmp_path / "in", 64, 128, 1e20, 1e20)
    with pytest.raises(ResultError, match=r"w\.weight: 8192 of 8192 values are not finite"):
        lorafuse.convert(ckpt, lora, tmp_path / "out", format="base")


def test_a_batch_and_a_verification_make_the_same(base, adapter, tmp_path):
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    for name, targets in (("one", ["q_proj"]), ("two", ["q_proj", "down_proj"]), ("dora", ["v_proj"])):
        adapter("nf4_dq", name=f"jobs/{name}", target_modules=targets, use_dora=name == "dora")
    states = lorafuse.batch(
        base("nf4_dq"), jobs, tmp_path / "all", format="base", keep_dense=["*.1.*.q_proj"]
    )
    assert {state.state for state in states} == {"done"}
    for name in ("one", "two", "dora"):
        lorafuse.convert(
            base("nf4_dq"), jobs / name, tmp_path / name, format="base", keep_dense=["*.1.*.q_proj"]
        )
        found, expected = stored(tmp_path / "all" / name), stored(tmp_path / name)
        assert found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
        checked = lorafuse.verify(tmp_path / name, ckpt=base("nf4_dq"), adapters=[jobs / name])
        assert checked["weights"] == len(
            json.loads((tmp_path / name / "lorafuse_receipt.json").read_text())["tensors"]
        )


def test_a_changed_code_is_found_by_verify(base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=["q_proj"])
    lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out", format="base")
    with pytest.raises(ResultError):
        lorafuse.verify(tmp_path / "out", ckpt=base("nf4"), adapters=[lora])


def refusal(ckpt, lora, out, **options):
    with pytest.raises(UsageError) as e:
        lorafuse.convert(ckpt, lora, out, **options)
    assert not out.exists()
    return str(e.value)


def test_wrong_wishes(base, adapter, tmp_path):
    lora, out, nf4 = adapter("nf4", target_modules=["q_proj"]), tmp_path / "out", base("nf4")
    assert refusal(nf4, lora, out, format="base", dtype="float16") == (
        "format='base' keeps the base's own dtypes: leave dtype out."
    )
    assert refusal(base("bf16"), lora, out, format="mixed") == (
        f"{base('bf16')}: no weight of it is quantized, so that format='mixed' would keep "
        "nothing: leave format out."
    )
    assert refusal(nf4, lora, out, format="mixed", keep_dense=["*"]) == (
        "format='mixed' leaves all that changes dense: leave keep_dense and rounding out."
    )
    assert refusal(nf4, lora, out, keep_dense=["*"]) == (
        "keep_dense is for a format of quantized weights, and dense has none."
    )
    assert refusal(nf4, lora, out, rounding="nearest") == (
        "rounding is for a format of quantized weights, and dense has none."
    )
    assert refusal(nf4, lora, out, format="gguf").startswith(
        "format is gguf; expected one of dense, base, light, mixed"
    )


def test_a_base_in_full_precision_as_it_is_stored_is_dense(base, adapter, tmp_path):
    lora = adapter("bf16", target_modules=["q_proj"])
    for form in ("dense", "base"):
        lorafuse.convert(base("bf16"), lora, tmp_path / form, format=form)
    found, expected = stored(tmp_path / "base"), stored(tmp_path / "dense")
    assert all(same(found[name], expected[name]) for name in expected)


def test_a_pattern_that_matches_nothing_is_said(base, adapter, tmp_path):
    events = []
    lora = adapter("nf4", target_modules=["q_proj"])
    lorafuse.convert(
        base("nf4"),
        lora,
        tmp_path / "out",
        format="base",
        keep_dense=["*.v_proj", "*.q_proj"],
        on_event=events.append,
    )
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        "keep_dense='*.v_proj': matches no quantized module that changes."
    ]


def test_a_dry_run_says_the_size_in_each_format(base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=["q_proj"])
    sizes = lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out", dry_run=True)["formats"]
    for form in ("dense", "base", "mixed"):
        lorafuse.convert(base("nf4_dq"), lora, tmp_path / form, format=form)
        assert sizes[form] == sum(t.nbytes for t in stored(tmp_path / form).values()), form
    assert sizes["base"] < sizes["mixed"] < sizes["dense"]
    assert sizes["base"] == sum(t.nbytes for t in stored(base("nf4_dq")).values())


def test_a_dry_run_with_patterns_says_the_size_of_mixed_too(base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=["q_proj", "v_proj"])
    settings = {"dry_run": True, "format": "base", "keep_dense": ["*.v_proj"]}
    sizes = lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out", **settings)["formats"]
    assert sizes["base"] < sizes["mixed"] < sizes["dense"]
