"""Which files beside the weights a result gets, and from which folder."""

import ast
import os
from pathlib import Path

import pytest
import torch
import transformers
from build import CONFIG, write_checkpoint
from safetensors.torch import save_file
from side_run import Run, fill

import lorafuse
from lorafuse.errors import CheckpointError
from lorafuse.side_files.sets import TOKENIZER

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 17209920\n"


# ---- what is copied


def test_everything_else_is_copied(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    kept = (
        "qwen.tiktoken", "tiktoken.model", "spm.model", "bpe.codes", "normalizer.json", "SimSun.ttf",
        "tokenization_own.py", "LICENSE", "NOTICE.txt", "generation_config.json", "of_a_new_library.json",
        "config_sentence_transformers.json", "sentence_bert_config.json", "custom_generate/generate.py",
        "additional_chat_templates/tools.jinja", "picture.png", "params.json",
    )  # fmt: skip
    left = (
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5", "rust_model.ot",
        "consolidated.safetensors", "original.PTH", "optimizer.pt", "trainer_state.json", "training_args.bin",
        "rng_state_0.pth", "events.out.tfevents.1.host.2", "all_results.json", "zero_to_fp32.py",
        "README.md", "readme.txt", ".gitattributes", ".DS_Store", "custom_generate/.hidden",
        "adapter_config.json", "quantize_config.json", "hf_quant_config.json", "quantization_config.json",
        "lorafuse_receipt.json", "original/tokenizer.model", "onnx/model.onnx", "examples/run.py",
        "checkpoint-5/config.json", "model.safetensors.index.fp32.json",
    )  # fmt: skip
    fill(ckpt, dict.fromkeys((*kept, *left), "{}"))
    assert Run(ckpt, lora, tmp_path / "out").files == set(kept)
    assert (tmp_path / "out/lorafuse_receipt.json").read_text() != "{}"


def test_weights_that_a_loader_needs_as_a_side_file(tmp_path: Path, lora: Path) -> None:
    """transformers' Qwen2.5-Omni reads the speakers from spk_dict.pt; elsewhere a .pt is weights."""
    for model_type, expected in (("qwen2_5_omni", {"spk_dict.pt"}), ("llama", set())):
        ckpt = write_checkpoint(tmp_path / model_type, config=CONFIG | {"model_type": model_type})
        fill(ckpt, {"spk_dict.pt": "speakers"})
        assert Run(ckpt, lora, tmp_path / f"out {model_type}").files == expected


def test_every_vocabulary_of_transformers_is_known() -> None:
    """The files by which its tokenizers are found are in the tokenizer's set, each vocabulary marks it."""
    found: dict[str, str] = {}
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                found |= {name: key for key, name in ast.literal_eval(node.value).items()}
    assert len(found) > 20
    assert found.keys() <= set(TOKENIZER.names)
    vocabularies = {name for name, key in found.items() if "vocab" in key or "spm" in key}
    assert vocabularies <= set(TOKENIZER.marks) and "tokenizer.json" in TOKENIZER.marks


def test_a_file_that_is_too_large(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """What no loader knows is left out and said; what a loader needs is refused."""
    for name in ("corpus.jsonl", "tokenizer.model"):
        (ckpt / name).touch()
        os.truncate(ckpt / name, 10**9 + 1)
        if name == "corpus.jsonl":
            run = Run(ckpt, lora, tmp_path / "out")
            assert run.files == set()
            assert run.warnings == [
                f"{ckpt}/corpus.jsonl: has 1000000001 bytes and is not copied; nothing that loads models "
                "knows it."
            ]
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: has 1000000001 bytes, too many for a file"):
        lorafuse.convert(ckpt, lora, tmp_path / "out 2")


# ---- sentence-transformers


PATHS = ("", "1_Pooling", "2_Dense", "3_Normalize")
ST = [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(PATHS)]


def test_the_folders_of_modules_json_are_copied_whole(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    fill(
        ckpt,
        {"modules.json": ST, "1_Pooling/config.json": {}, "2_Dense/deep/er/x.txt": "x", "other/x.json": {}},
    )
    save_file({"linear.weight": torch.ones(2, 2)}, ckpt / "2_Dense/model.safetensors")
    fill(ckpt, {"2_Dense/pytorch_model.bin": "weights", "2_Dense/.hidden": ""})
    assert Run(ckpt, lora, tmp_path / "out").files == {
        "modules.json", "1_Pooling/config.json", "2_Dense/deep/er/x.txt", "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
    }  # fmt: skip
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == (
        ckpt / "2_Dense/model.safetensors"
    ).read_bytes()
    lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])


def test_modules_of_the_adapters_folder(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """sentence-transformers saves them beside an adapter: pooling and dense layers as they were trained."""
    fill(
        ckpt,
        {
            "modules.json": ST[:2],
            "1_Pooling/config.json": "base",
            "config_sentence_transformers.json": "base",
        },
    )
    fill(lora, {"modules.json": ST, "2_Dense/config.json": "trained", "sentence_bert_config.json": "trained"})
    assert Run(ckpt, lora, tmp_path / "out").files == {
        "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json",
    }  # fmt: skip
    assert (tmp_path / "out/modules.json").read_text() == (lora / "modules.json").read_text()


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b"])
def test_modules_outside(path: str, ckpt: Path, lora: Path, tmp_path: Path) -> None:
    fill(ckpt, {"modules.json": [{"path": path}]})
    with pytest.raises(CheckpointError, match=r"modules\.json: names .*, which is no folder beside it"):
        lorafuse.convert(ckpt, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- remote code


def test_code_that_auto_map_needs(tmp_path: Path, lora: Path) -> None:
    """With what it imports from sub-folders, and no other code of these."""
    auto_map = {"AutoModel": "code/modeling_own.Own", "AutoConfig": "org/name--configuration_own.Config"}
    ckpt = write_checkpoint(tmp_path / "ckpt", config=CONFIG | {"auto_map": auto_map})
    fill(ckpt, {
        "code/modeling_own.py": "from .ops.norm import rms\nfrom . import helpers\nfrom ..top import x\n",
        "code/ops/__init__.py": "", "code/ops/norm.py": "import torch\nfrom .deep import y",
        "code/ops/deep.py": "def broken(", "code/helpers.py": "", "code/unused.py": "", "top.py": "",
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code/tokenization_own.T", None]}},
        "code/tokenization_own.py": "try:\n    from .missing import z\nexcept ImportError:\n    pass\n",
    })  # fmt: skip
    assert Run(ckpt, lora, tmp_path / "out").files == {
        "code/modeling_own.py", "code/ops/__init__.py", "code/ops/norm.py", "code/ops/deep.py",
        "code/helpers.py", "code/tokenization_own.py", "top.py", "tokenizer_config.json",
    }  # fmt: skip


def test_code_of_the_adapters_tokenizer(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """It comes with the tokenizer; code that the checkpoint has is never replaced."""
    fill(ckpt, {"shared.py": "checkpoint's"})
    fill(lora, {
        "qwen.tiktoken": "YQ== 0\n", "tokenization_own.py": "from .shared import x", "shared.py": "adapter's",
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}},
        "other.py": "",
    })  # fmt: skip
    run = Run(ckpt, lora, tmp_path / "out")
    assert run.files == {"qwen.tiktoken", "tokenization_own.py", "shared.py", "tokenizer_config.json"}
    assert (tmp_path / "out/shared.py").read_text() == "checkpoint's"


# ---- pointers and links


@pytest.mark.parametrize("whose", ["ckpt", "lora"])
@pytest.mark.parametrize(
    ("case", "error"),
    [
        (
            "pointer",
            r"tokenizer\.json: is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`\.",
        ),
        (
            "dangling",
            r"tokenizer\.json: is a link to a file that is not there; replace it by the file, or remove it",
        ),
        (
            "outside",
            r"tokenizer\.json: is a link to .*/secret, outside its directory; replace it by the file\.",
        ),
        ("fifo", r"tokenizer\.json: is not a regular file\."),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_no_file(
    case: str, error: str, whose: str, dry_run: bool, ckpt: Path, lora: Path, tmp_path: Path
) -> None:
    path = {"ckpt": ckpt, "lora": lora}[whose] / "tokenizer.json"
    (tmp_path / "secret").write_text("private")
    if case == "pointer":
        path.write_text(POINTER)
    elif case == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("missing" if case == "dangling" else tmp_path / "secret")
    with pytest.raises(CheckpointError, match=error):
        lorafuse.convert(ckpt, lora, tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_links_of_folders_and_of_the_config(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """A link inside the checkpoint is fine, config.json and folders from elsewhere are not published."""
    (ckpt / "vocab.txt").write_text("a\nb")
    (ckpt / "copy.txt").symlink_to("vocab.txt")
    assert Run(ckpt, lora, tmp_path / "out").files == {"vocab.txt", "copy.txt"}
    assert not (tmp_path / "out/copy.txt").is_symlink()
    fill(tmp_path, {"elsewhere/config.json": "private"})
    fill(ckpt, {"modules.json": ST})
    (ckpt / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json: is a link to .*, outside its"):
        lorafuse.convert(ckpt, lora, tmp_path / "out 2")
    (ckpt / "1_Pooling").unlink()
    (ckpt / "config.json").rename(tmp_path / "config.json")
    (ckpt / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"/config\.json: is a link to .*, outside its directory"):
        lorafuse.convert(ckpt, lora, tmp_path / "out 2")


def test_only_a_hub_cache_has_blobs(lora: Path, tmp_path: Path) -> None:
    """`blobs` beside `snapshots` is the cache's; a folder of that name above any other checkpoint is not."""
    fill(tmp_path, {"repo/blobs/1": "vocabulary"})
    for parent, fine in (("snapshots", True), ("models", False)):
        ckpt = write_checkpoint(tmp_path / "repo" / parent / "abc")
        (ckpt / "vocab.txt").symlink_to("../../blobs/1")
        if fine:
            assert Run(ckpt, lora, tmp_path / "out").files == {"vocab.txt"}
        else:
            with pytest.raises(CheckpointError, match="outside its directory"):
                lorafuse.convert(ckpt, lora, tmp_path / "out 2")
