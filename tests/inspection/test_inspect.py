"""`lorafuse inspect`: what it says of checkpoints, adapters and merged directories, of broken ones too, and
how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import build
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import QUANTIZED
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse import cli
from lorafuse.errors import LorafuseError, ResultError

ROOT = Path(__file__).resolve().parents[2]
CAN_REUSE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inspect(*args):
    """(exit code, stdout, stderr) of the command in this process."""
    from click.testing import CliRunner

    handler = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(cli.lorafuse, ["inspect", *map(str, args)], catch_exceptions=False)
    signal.signal(signal.SIGTERM, handler)
    return result.exit_code, result.stdout, result.stderr


def text_of(*args):
    code, out, err = inspect(*args)
    assert (code, err) == (0, "")
    return out


@pytest.fixture
def merged(tmp_path, monkeypatch):
    """merged(scale, …) → a directory with the result of a merge of the hand-written checkpoint and an adapter
    of that size."""
    monkeypatch.chdir(tmp_path)
    build.write_checkpoint(tmp_path / "ckpt")

    def make(scale=0.1, name="merged", **options):
        build.write_adapter(
            tmp_path / f"{name}-adapter", build.adapter_tensors(build.checkpoint_tensors(), scale)
        )
        lorafuse.convert("ckpt", f"{name}-adapter", name, **options)
        return Path(name)

    return make


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


# ---- checkpoints


def test_checkpoint_text(monkeypatch):
    """The whole text for the NF4 checkpoint of the fixtures."""
    monkeypatch.chdir(ROOT)
    assert text_of("fixtures/llama-nf4") == (
        "checkpoint: fixtures/llama-nf4\n"
        "  model         llama (LlamaForCausalLM), vocabulary 96, embeddings not tied\n"
        "  size          98,624 parameters, 87.2 KB in 2 files\n"
        "  weights       14 NF4, double-quantized, block size 64, bfloat16: 86,016 parameters, 62.0 KB\n"
        "  weights       7 dense, bfloat16: 12,608 parameters, 25.2 KB\n"
        "  dense         1 lm_head, 1 model.embed_tokens, 2 input_layernorm, 2 post_attention_layernorm, "
        "1 model.norm\n"
        "  --dtype auto  writes bfloat16\n"
    )


SCHEMES = {
    "nf4": ("NF4, block size 64", "nf4", "bfloat16", "bfloat16"),
    "nf4_fp16": ("NF4, double-quantized, block size 64", "nf4", "float16", "float16"),
    "nf4_bs256": ("NF4, double-quantized, block size 256", "nf4", "bfloat16", "bfloat16"),
    "nf4_bf16storage": ("NF4, block size 64", "nf4", "bfloat16", "bfloat16"),
    "fp4_dq": ("FP4, double-quantized, block size 64", "fp4", "bfloat16", "bfloat16"),
    "int8": ("int8", "int8", "float32", "bfloat16"),
    "gpt2_int8": ("int8", "int8", "float32", "bfloat16"),
    "bf16_tied": ("full precision", None, "bfloat16", "bfloat16"),
    "fp32": ("full precision", None, "float32", "float32"),
}


@pytest.mark.parametrize("kind", SCHEMES)
def test_checkpoint_facts(base, kind):
    """How the weights are stored, and the numbers of the dense twin and of the files, which safetensors reads
    here."""
    facts = lorafuse.inspect(base(kind))
    scheme, quantized, dtype, auto = SCHEMES[kind]
    row = max(facts["storage"], key=lambda row: row["n_weights"] if row["quantized"] == quantized else 0)
    assert (row["scheme"], row["quantized"], row["dtype"]) == (scheme, quantized, dtype)
    assert facts["auto_dtypes"].keys() == {auto} if kind != "gpt2_int8" else auto in facts["auto_dtypes"]
    files = [load_file(path) for path in base(kind).glob("*.safetensors")]
    twin = [
        load_file(path)
        for path in base(QUANTIZED[kind][0] if kind in QUANTIZED else kind).glob("*.safetensors")
    ]
    assert facts["n_parameters"] == sum(t.numel() for file in twin for t in file.values())
    assert facts["nbytes"] == sum(t.nbytes for file in files for t in file.values())
    assert facts["n_weights"] == sum(row["n_weights"] for row in facts["storage"]) == sum(map(len, twin))
    assert (facts["kind"], facts["vocab_size"], facts["problems"]) == ("checkpoint", 96, [])
    assert len(facts["files"]) == len(files)
    assert facts["tied"] is (kind == "bf16_tied" or kind.startswith("gpt2"))
    assert facts["model_type"] == ("gpt2" if kind.startswith("gpt2") else "llama")


def test_checkpoint_that_cannot_be_merged_into(base, tmp_path):
    """A broken quant_state is a problem, and all else is shown."""
    path = tmp_path / "broken"
    shutil.copytree(base("nf4"), path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("__nf4")]:
            tensors[name] = torch.frombuffer(bytearray(b'{"x": "\x1b[31m"}'), dtype=torch.uint8).clone()
        save_file(tensors, file)
    whole, facts = lorafuse.inspect(base("nf4")), lorafuse.inspect(path)
    (problem,) = facts["problems"]
    assert problem.startswith(f"{path}: the quant_state of model.layers.0.")
    assert (facts["n_parameters"], facts["model_type"]) == (whole["n_parameters"], "llama")
    assert [row["quantized"] for row in facts["storage"]] == [row["quantized"] for row in whole["storage"]]
    assert facts["auto_dtypes"] is None
    out = text_of(path)
    assert out.endswith(f"  problem       {problem}\n")
    assert "\x1b" not in out


def test_checkpoint_of_another_quantization(tmp_path):
    """What is not supported is said, with the words of convert."""
    config = build.CONFIG | {"quantization_config": {"quant_method": "eetq"}, "architectures": 7}
    path = build.write_checkpoint(tmp_path / "eetq", config=config)
    out = text_of(path)
    assert out.splitlines()[1] == "  model         llama, vocabulary 32, embeddings not tied"
    assert f"  problem       {path}/config.json: architectures is 7; expected list.\n" in out
    edit_json(path / "config.json", architectures=None)
    assert (
        f"  problem       {path}/config.json: the checkpoint is quantized with eetq; this format"
        in text_of(path)
    )


# ---- adapters


def test_adapter_text(monkeypatch):
    """The whole text for the adapter of the fixtures."""
    monkeypatch.chdir(ROOT)
    assert text_of("fixtures/llama-adapter") == (
        "adapter: fixtures/llama-adapter\n"
        "  type          LORA of PEFT for CAUSAL_LM\n"
        "  trained on    llama-nf4\n"
        "  size          28 tensors, 8,960 parameters, 35.8 KB float32\n"
        "  rank, scale   4, 2 (14 updates)\n"
        "  targets       q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj\n"
        "  config        bias none, init_lora_weights true, lora_alpha 8, r 4\n"
    )


def test_adapter_scales(adapter):
    """Rank and scale are those of the tensors and patterns, alpha / sqrt(r) with rsLoRA; DoRA is in the
    config."""
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 32}}
    path = adapter(
        "fp32",
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        use_rslora=True,
        use_dora=True,
        **patterns,
    )
    facts = lorafuse.inspect(path)
    assert facts["scales"] == [
        {"rank": 2, "scale": pytest.approx(32 / 2**0.5), "n_updates": 2},
        {"rank": 4, "scale": 4.0, "n_updates": 2},
    ]
    assert facts["replaced"] == ["lm_head.weight"]
    assert (facts["config"]["use_dora"], facts["config"]["use_rslora"], facts["type"]) == (True, True, "LORA")
    tensors = load_file(path / "adapter_model.safetensors")
    assert (facts["n_tensors"], facts["n_parameters"]) == (
        len(tensors),
        sum(t.numel() for t in tensors.values()),
    )
    out = text_of(path)
    assert "  saves whole   lm_head\n  replaces      lm_head.weight\n" in out
    assert "use_dora true" in out


def test_adapter_of_mlx(tmp_path):
    """MLX-LM's adapters have other words for the same things."""
    path = tmp_path / "mlx"
    path.mkdir()
    config = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "model": "org/base",
        "lora_parameters": {"rank": 4, "scale": 10.0},
    }
    build.write_json(path / "adapter_config.json", config)
    name = "model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_a": torch.ones(16, 4), f"{name}.lora_b": torch.ones(4, 16)},
        path / "adapters.safetensors",
    )
    facts = lorafuse.inspect(path)
    assert (facts["format"], facts["type"], facts["base_model"]) == ("MLX-LM", "lora", "org/base")
    assert facts["scales"] == [{"rank": 4, "scale": 10.0, "n_updates": 1}]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"peft_type": "PROMPT_TUNING"},
            "peft_type PROMPT_TUNING cannot be merged: it trains inputs of the model, not weights.",
        ),
        ({"peft_type": ["\x1b"]}, "peft_type ['\\x1b'] is not supported; known are "),
        (
            {"use_qalora": True},
            "use_qalora is set, which is not supported: QALoRA groups the inputs of lora_A.",
        ),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights is corda, which changes the base weight: the covariance",
        ),
    ],
)
def test_adapter_that_cannot_be_merged(tmp_path, config, problem):
    """It is shown, and what is wrong with it."""
    path = build.write_adapter(tmp_path / "adapter", **config)
    facts = lorafuse.inspect(path)
    assert facts["problems"][0].startswith(f"{path}/adapter_config.json: {problem}")
    assert facts["n_tensors"] == 8
    assert f"  problem       {path}/adapter_config.json: {problem}" in text_of(path)


def test_several_adapters(tmp_path):
    """Each adapter in a sub-folder is shown, and what keeps one from being read."""
    build.write_adapter(tmp_path / "all" / "a")
    build.write_adapter(tmp_path / "all" / "b", r=8)
    facts = lorafuse.inspect(tmp_path / "all" / "a")
    assert facts["sub_folders"] == []
    both = lorafuse.inspect(tmp_path / "all")
    assert both["adapters"][0] == facts | {"path": f"{tmp_path}/all/a"}
    assert "says rank 8 where the tensors have rank 4" in both["adapters"][1]["warnings"][0]
    (tmp_path / "all" / "a" / "adapter_model.safetensors").unlink()
    lines = text_of(tmp_path / "all").splitlines()
    assert lines[:4] == [
        f"adapters: {tmp_path}/all",
        f"  problem       {tmp_path}/all/a: holds neither adapter_model.safetensors nor adapter_model.bin: "
        "the adapter's weights are missing. Was its upload or download cut off?",
        "",
        f"adapter: {tmp_path}/all/b",
    ]
    shutil.copy(tmp_path / "all" / "b" / "adapter_config.json", tmp_path / "all")
    shutil.copy(tmp_path / "all" / "b" / "adapter_model.safetensors", tmp_path / "all")
    assert "  sub-folders   a, b\n" in text_of(tmp_path / "all")


# ---- merged directories


def test_merged_text(merged):
    """The whole text but for versions, with the weights worst first."""
    lines = text_of(merged()).splitlines()
    receipt = json.loads((Path("merged") / "lorafuse_receipt.json").read_bytes())
    assert lines.pop(2).startswith("  made by       lorafuse ")
    assert lines[:8] == [
        "merged: merged",
        "  model         llama (LlamaForCausalLM)",
        "  checkpoint    ckpt (stored in full precision)",
        "  adapter       merged-adapter",
        "  settings      dtype auto, max_shard_size 5000000000, adapter_scale 1.0",
        "  size          5,456 parameters, 13.0 KB bfloat16 in 1 file",
        "  weights       17 copied, 4 merged",
        lines[7],
    ]
    assert lines[7].startswith("  update        99.")
    assert lines[8:10] == ["", "     kept      noise  delta_rel    changed  weight"]
    found = [line.split() for line in lines[10:]]
    entries = {name: entry for name, entry in receipt["tensors"].items() if entry["action"] == "merged"}
    assert [row[-1] for row in found] == sorted(entries, key=lambda name: entries[name]["kept"])
    assert [row[0] for row in found] == [f"{entries[row[-1]]['kept']:.4g}" for row in found]


@pytest.mark.parametrize(("top", "last"), [(0, None), (1, "and 3 more"), (4, None), (100, None)])
def test_top(merged, top, last):
    """--top limits the list, and says how many are left; JSON has all."""
    path = merged()
    lines = text_of(path, "--top", top).splitlines()
    assert len([line for line in lines if line.endswith("_proj.weight")]) == min(top, 4)
    assert [line for line in lines if line.startswith("and ")] == ([last] if last else [])
    assert len(json.loads(text_of(path, "--top", top, "--json"))["weights"]) == 4


def test_merged_of_several(merged, tmp_path):
    """Each adapter with its weight."""
    build.write_adapter(tmp_path / "other")
    path = merged(adapters=[("other", -0.5)], adapter_scale=2.0)
    assert lorafuse.inspect(path)["adapters"] == [
        {"path": "merged-adapter", "weight": 2.0},
        {"path": "other", "weight": -0.5},
    ]
    assert "  adapter       merged-adapter, weight 2.0\n  adapter       other, weight -0.5\n" in text_of(path)


def test_merged_needs_no_torch(merged, tmp_path):
    """A receipt is shown at once: importing torch fails here."""
    path = merged().resolve()
    stub = tmp_path / "stub"
    stub.mkdir()
    for module in ("torch", "numpy", "safetensors", "huggingface_hub"):
        (stub / f"{module}.py").write_text("raise ImportError('not for a receipt')")
    env = os.environ | {"PYTHONPATH": f"{stub}{os.pathsep}{Path(lorafuse.__file__).parents[1]}"}
    command = [sys.executable, "-m", "lorafuse.cli", "inspect", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"merged: {path}\n")


NAMES = st.text(min_size=1, max_size=30)


@CAN_REUSE
@given(weight=NAMES, path=NAMES, semantics=NAMES, model_type=NAMES)
def test_hostile_names(tmp_path_factory, weight, path, semantics, model_type):
    """Nothing that comes out of a file reaches the terminal unescaped."""
    folder = tmp_path_factory.mktemp("hostile")
    entry = {"action": "merged", "dtype": weight, "shape": [1], "kept": 0.5, "delta_norm": 1.0}
    inputs = [
        {"role": "checkpoint", "path": f"{path}/config.json"},
        {"role": "adapter", "path": f"{path}/adapter_config.json"},
    ]
    receipt = {
        "schema": 1,
        "tool": {"name": path},
        "settings": {path: semantics},
        "inputs": inputs,
        "outputs": [],
    }
    receipt |= {
        "tensors": {weight: entry},
        "adapter_tensors": {"used": [], "ignored": {weight: path}},
        "base_semantics": semantics,
    }
    build.write_json(folder / "lorafuse_receipt.json", receipt)
    build.write_json(folder / "config.json", {"model_type": model_type, "architectures": [weight]})
    out = text_of(folder)
    assert all(line.isprintable() for line in out.split("\n"))
    assert json.loads(text_of(folder, "--json"))["weights"][0]["name"] == weight


# ---- what ends otherwise


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_to_inspect(tmp_path, as_json):
    """An empty directory, a missing one and a file end with 3, in one line."""
    flags = ["--json"] if as_json else []
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    expected = {
        "empty": "holds no checkpoint (config.json, model.safetensors), no adapter (adapter_config.json) and "
        "no result of a merge "
        "(lorafuse_receipt.json).",
        "nowhere": "no such directory.",
        "file": "is not a directory.",
    }
    for name, message in expected.items():
        assert inspect(tmp_path / name, *flags) == (3, "", f"Error: {tmp_path}/{name}: {message}\n")


def test_broken_inputs(tmp_path):
    """Where not even headers can be read, a checkpoint ends with 3 and an adapter with 4."""
    ckpt, adapter = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "adapter")
    (ckpt / "model.safetensors").write_bytes(b"")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    too_few = "0 bytes are too few for a safetensors file.\n"
    assert inspect(ckpt) == (3, "", f"Error: {ckpt}/model.safetensors: {too_few}")
    assert inspect(adapter) == (4, "", f"Error: {adapter}/adapter_model.safetensors: {too_few}")
    (ckpt / "model.safetensors").unlink()
    assert inspect(ckpt) == (
        3,
        "",
        f"Error: {ckpt}: holds neither model.safetensors nor model.safetensors.index.json.\n",
    )
    (adapter / "adapter_config.json").unlink()
    assert inspect(adapter)[0] == 4


def test_broken_receipt(merged):
    """A receipt that is damaged ends with 8 and names the field."""
    path = merged()
    receipt = path / "lorafuse_receipt.json"
    whole = json.loads(receipt.read_bytes())
    edit_json(receipt, schema=2)
    newer = "is no receipt of schema 1; a newer lorafuse may have written it."
    assert inspect(path) == (8, "", f"Error: {receipt}: {newer}\n")
    edit_json(receipt, schema=1, outputs=None)
    message = "is damaged: outputs is missing or of another kind."
    assert inspect(path) == (8, "", f"Error: {receipt}: {message}\n")
    edit_json(
        receipt,
        outputs=[],
        tensors=whole["tensors"]
        | {"a\x1b": {"action": "merged", "dtype": "float32", "shape": [1], "kept": "1"}},
    )
    assert inspect(path)[2] == f"Error: {receipt}: " + message.replace("outputs", "a\\x1b") + "\n"
    for figure in (float("nan"), float("inf"), 1e200, 10**400):
        edit_json(
            receipt,
            tensors={
                "w": {"action": "merged", "dtype": "float32", "shape": [1], "delta_norm": figure, "kept": 1}
            },
        )
        assert inspect(path)[2] == f"Error: {receipt}: " + message.replace("outputs", "w") + "\n"
    receipt.write_text("{")
    assert inspect(path)[0] == 8
    receipt.unlink()
    receipt.mkdir()
    assert inspect(path) == (8, "", f"Error: {receipt}: is not a regular file.\n")


@pytest.mark.parametrize("what", ["missing", "a directory", "no JSON"])
def test_without_a_config(merged, what):
    """A merged directory and the shards of a checkpoint are shown without a config too, as far as they go."""
    for path in (merged(), Path("ckpt")):
        (path / "config.json").unlink()
        if what == "a directory":
            (path / "config.json").mkdir()
        elif what == "no JSON":
            (path / "config.json").write_text("{")
        lines = text_of(path).splitlines()
        assert lines[1].startswith("  model         no model_type in config.json")
        assert lines[2 if path.name == "ckpt" else 6].startswith("  size          5,456 parameters")
    assert lines[-1].startswith("  problem       ckpt/config.json: ")


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@CAN_REUSE
@given(st.data())
def test_any_receipt(merged, tmp_path_factory, data):
    """Whatever a receipt holds in the place of one value, it is shown or refused; nothing crashes."""
    if not Path("merged").exists():
        merged()
    receipt = json.loads(Path("merged/lorafuse_receipt.json").read_bytes())
    at, odd = receipt, data.draw(ODD)
    while True:
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else list(range(len(at)))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = odd
    folder = tmp_path_factory.mktemp("odd")
    build.write_json(folder / "lorafuse_receipt.json", receipt)
    try:
        facts = lorafuse.inspect(folder)
    except ResultError:
        return
    assert all(line.isprintable() for line in text_of(folder).split("\n"))
    assert facts["kind"] == "merged"


def test_error_class():
    """In Python it is an exception, as of convert."""
    with pytest.raises(LorafuseError, match="no such directory"):
        lorafuse.inspect("/nowhere/at all")
