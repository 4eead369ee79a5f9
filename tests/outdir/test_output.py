"""What OUT_DIR holds: config, index, the other files, modes; and how it comes to be under its name."""

import json
import os
import shutil
import stat

import pytest
from models import LINEARS
from oracle import config, read_tensors
from safetensors import safe_open

import lorafuse
from lorafuse.errors import CheckpointError, OutDirError, StorageError
from lorafuse.outdir import commit
from lorafuse.outdir.sidecars import output_config


@pytest.fixture
def ckpt(base, tmp_path):
    """A private copy of a double-quantized NF4 checkpoint with everything that may lie beside weights."""
    path = tmp_path / "ckpt"
    shutil.copytree(base("nf4_dq"), path)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "added_tokens.json",
    ):
        (path / name).write_text(f"ckpt {name}")
    for name in ("modeling_custom.py", "preprocessor_config.json", "LICENSE", "generation_config.json"):
        (path / name).write_text(f"ckpt {name}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("ckpt rag")
    for name in (
        "pytorch_model.bin",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
        "README.md",
    ):
        (path / name).write_text("does not belong into the output")
    return path


@pytest.fixture
def lora(adapter):
    return adapter("nf4_dq", target_modules=LINEARS)


def test_the_directory_holds_what_belongs_and_nothing_else(ckpt, lora, tmp_path):
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == [
        "LICENSE", "added_tokens.json", "additional_chat_templates/rag.jinja", "chat_template.jinja",
        "config.json",
        "generation_config.json", "lorafuse_receipt.json", "model.safetensors", "modeling_custom.py",
        "preprocessor_config.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (tmp_path / "out/modeling_custom.py").read_text() == "ckpt modeling_custom.py"


def test_the_tokenizer_is_one_set(ckpt, lora, tmp_path):
    """The adapter's when it has a vocabulary; no file of the checkpoint's is mixed in."""
    (lora / "tokenizer.json").write_text("adapter's")
    (lora / "tokenizer_config.json").write_text("adapter's")
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert (
        (tmp_path / "out/tokenizer.json").read_text()
        == (tmp_path / "out/tokenizer_config.json").read_text()
        == "adapter's"
    )
    assert (
        not (tmp_path / "out/added_tokens.json").exists()
        and not (tmp_path / "out/chat_template.jinja").exists()
    )
    assert (tmp_path / "out/preprocessor_config.json").exists()


def test_a_tokenizer_config_without_vocabulary_is_not_a_tokenizer(ckpt, lora, tmp_path):
    (lora / "tokenizer_config.json").write_text("adapter's")
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").read_text() == "ckpt tokenizer_config.json"


def test_a_link_to_a_private_file_is_not_published(ckpt, lora, tmp_path):
    """tokenizer.json of a stranger's adapter may point anywhere."""
    (tmp_path / "secret").write_text("private")
    (lora / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: is a link to .*/secret, outside its directory"
    ):
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_layout_of_a_hub_cache_works(base, lora, tmp_path):
    """snapshots/<commit>/file is a link to ../../blobs/<hash>; the output holds files."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(base("nf4_dq").iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    lorafuse.convert(snapshot, lora, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_config_loses_quantization_and_gets_the_dtype_in_place():
    """In sub-configs too; everything else is as it was."""
    before = {
        "model_type": "x", "torch_dtype": "float16", "quantization_config": {"quant_method": "bitsandbytes"},
        "_load_in_4bit": True,
        "text_config": {"dtype": "float16", "tie_word_embeddings": True, "vocab_size": 5,
        "quantization_config": {}},
        "vision_config": {"vocab_size": 7, "torch_dtype": None}, "own": {"a": [1, "ü"]},
    }  # fmt: skip
    changes = {"dtype": "bfloat16", "tie_word_embeddings": False, "vocab_size": 9}
    assert output_config(before, changes, {}) == {
        "model_type": "x", "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
            "vocab_size": 9},
        "vision_config": {"vocab_size": 7, "torch_dtype": None}, "own": {"a": [1, "ü"]},
    }  # fmt: skip
    assert output_config({"a": 1}, {"dtype": "float32", "tie_word_embeddings": False}, {}) == {
        "a": 1, "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "expected"), [
    ("nf4_dq", "auto", "bfloat16"), ("nf4_fp16", "auto", "float16"), ("int8", "auto", "bfloat16"),
    ("nf4_dq", "float16", "float16"),
])  # fmt: skip
def test_config_says_the_dtype_of_the_weights(kind, dtype, expected, base, adapter, tmp_path):
    lorafuse.convert(base(kind), adapter(kind, target_modules=["q_proj"]), tmp_path / "out", dtype=dtype)
    conf = config(tmp_path / "out")
    assert conf["dtype"] == expected and "quantization_config" not in conf
    assert {str(t.dtype) for t in read_tensors(tmp_path / "out").values()} == {f"torch.{expected}"}


@pytest.mark.parametrize("limit", ["5GB", "60KB", "1KB"])
def test_the_index_describes_the_shards(limit, base, lora, tmp_path):
    out = tmp_path / "out"
    lorafuse.convert(base("nf4_dq"), lora, out, max_shard_size=limit)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    held = {}
    for file in files:
        with safe_open(out / file, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}
            held |= dict.fromkeys(f.keys(), file)
    if limit == "5GB":
        assert files == ["model.safetensors"] and not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        tensors = read_tensors(out).values()
        assert index["weight_map"] == held and list(held) != []
        assert index["metadata"] == {
            "total_parameters": sum(t.numel() for t in tensors),
            "total_size": sum(t.numel() * t.element_size() for t in tensors),
        }


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(mask, ckpt, lora, tmp_path):
    for path in ckpt.rglob("*.json"):
        path.chmod(0o600)
    old = os.umask(mask)
    try:
        lorafuse.convert(ckpt, lora, tmp_path / "out", max_shard_size="60KB")
    finally:
        os.umask(old)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


@pytest.mark.parametrize("exchange", ["kernel", "by renames"])
def test_overwrite_replaces_everything_at_the_end(exchange, base, lora, tmp_path, monkeypatch):
    if exchange == "by renames":
        monkeypatch.setattr(commit.ctypes, "CDLL", lambda *args, **kw: object())
    out = tmp_path / "out"
    lorafuse.convert(base("nf4_dq"), lora, out, max_shard_size="60KB")
    (out / "stale.txt").write_text("x")
    with pytest.raises(OutDirError, match=r"exists and is not empty; overwrite=True replaces it"):
        lorafuse.convert(base("nf4_dq"), lora, out)
    lorafuse.convert(base("nf4_dq"), lora, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "lorafuse_receipt.json",
        "model.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_failed_overwrite_leaves_the_old_directory(base, lora, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    monkeypatch.setattr(
        "lorafuse.batching.one_pass.verify_shards",
        lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")),
    )
    with pytest.raises(StorageError, match="No space left"):
        lorafuse.convert(base("nf4_dq"), lora, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_an_empty_directory_is_filled_and_missing_parents_are_made(base, lora, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        lorafuse.convert(base("nf4_dq"), lora, out)
        assert (out / "config.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "where",
    ["ckpt", "ckpt/", "ckpt/../ckpt", "ckpt/merged", "adapter/merged", ".", "link", "link/x", "adapter"],
)
def test_an_output_that_touches_an_input_is_refused(where, overwrite, base, lora, tmp_path):
    shutil.copytree(base("nf4_dq"), tmp_path / "ckpt")
    (tmp_path / "link").symlink_to("ckpt")
    with pytest.raises(OutDirError, match="choose another directory"):
        lorafuse.convert(tmp_path / "ckpt", lora, f"{tmp_path}/{where}", overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "ckpt", "link"]


def test_a_file_in_the_way_is_refused(base, lora, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutDirError, match="exists and is not a directory"):
        lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_receipt_names_inputs_and_outputs(base, lora, tmp_path):
    """Sizes and hashes are those of the files; paths are the inputs as they were named."""
    import hashlib

    receipt = lorafuse.convert(base("nf4_dq"), lora, tmp_path / "out", max_shard_size="60KB")
    assert receipt == json.loads((tmp_path / "out/lorafuse_receipt.json").read_text())
    files = [tmp_path / "out" / o["file"] for o in receipt["outputs"]]
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[: len(shards)] == shards
    assert sorted(files) == sorted(
        set((tmp_path / "out").iterdir()) - {tmp_path / "out/lorafuse_receipt.json"}
    )
    entries = [
        *receipt["inputs"],
        *({**o, "path": f} for o, f in zip(receipt["outputs"], files, strict=True)),
    ]
    for entry in entries:
        content = open(entry["path"], "rb").read()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    roles = {(e["role"], os.path.basename(e["path"])) for e in receipt["inputs"]}
    shards = {("checkpoint", p.name) for p in base("nf4_dq").glob("*.safetensors")}
    adapter_files = {("adapter", "adapter_config.json"), ("adapter", "adapter_model.safetensors")}
    assert roles == {("checkpoint", "config.json"), *shards, *adapter_files}
