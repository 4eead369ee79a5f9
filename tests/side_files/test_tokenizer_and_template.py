"""From which folder the tokenizer and the chat template come, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import checkpoint_tensors, write_adapter
from side_run import Run, fill


def tokenizer(n: int, added: int = 0, kind: str = "dict") -> dict[str, Any]:
    """A tokenizer.json with n tokens, of which the last are added ones."""
    words = [f'w"{i}]}}' for i in range(n - added)]
    vocab = {word: i for i, word in enumerate(words)} if kind == "dict" else [[word, -1.5] for word in words]
    return {
        "truncation": {"max_length": 10**6, "id": 10**6},
        "added_tokens": [{"id": i, "content": f"<{i}>"} for i in range(n - added, n)],
        "model": {"type": "x", "vocab": vocab, "merges": [["a", "b"]]},
    }


@pytest.mark.parametrize("kind", ["dict", "list"])
@pytest.mark.parametrize("added", [0, 2])
def test_a_tokenizer_that_is_too_large_is_not_taken(
    kind: str, added: int, ckpt: Path, lora: Path, tmp_path: Path
) -> None:
    """The embedding has 32 rows: 32 tokens fit, 33 do not."""
    fill(ckpt, {"tokenizer.json": tokenizer(30), "chat_template.jinja": "base"})
    fill(lora, {"tokenizer.json": tokenizer(32, added, kind), "chat_template.jinja": "adapter"})
    run = Run(ckpt, lora, tmp_path / "out")
    assert run.warnings == [] and run.plan["tokenizer"] == run.plan["chat_template"] == str(lora)
    fill(lora, {"tokenizer.json": tokenizer(33, added, kind)})
    run = Run(ckpt, lora, tmp_path / "out 2")
    assert run.warnings == [
        f"{lora}: the tokenizer has 33 tokens, but model.embed_tokens.weight of the result has 32 rows. The "
        f"tokenizer of {ckpt} is taken instead; if training added tokens, their embeddings are not in the "
        "adapter."
    ]
    assert run.plan["tokenizer"] == run.plan["chat_template"] == str(ckpt)
    assert json.loads((tmp_path / "out 2/tokenizer.json").read_text()) == tokenizer(30)
    assert (tmp_path / "out 2/chat_template.jinja").read_text() == "base"


def test_a_resized_embedding_has_room(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """The rows are those of the result."""
    tensors = checkpoint_tensors()
    lora = write_adapter(tmp_path / "bigger", {
        f"base_model.model.{name}": torch.zeros(40, 16)
        for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors
    }, modules_to_save=["embed_tokens", "lm_head"])  # fmt: skip
    fill(lora, {"tokenizer.json": tokenizer(40)})
    run = Run(ckpt, lora, tmp_path / "out")
    assert run.plan["tokenizer"] == str(lora)


def test_a_tokenizer_as_large_as_the_checkpoints_own(ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """Some models know tokens that have no row, of images: then it is no sign of added ones."""
    for folder in (ckpt, lora):
        fill(folder, {"tokenizer.json": tokenizer(35)})
    run = Run(ckpt, lora, tmp_path / "out")
    assert run.warnings == [] and run.plan["tokenizer"] == str(lora)


@pytest.mark.parametrize(
    ("base", "adapter", "tokenizer_of", "template", "said"),
    [
        # A template alone, or with a config that is no tokenizer, goes with the checkpoint's tokenizer.
        ({"jinja": "B"}, {"jinja": "A"}, "ckpt", "A", "lora: the chat template in it is taken, with"),
        ({}, {"config": {"x": 1}, "jinja": "A"}, "ckpt", "A", "lora: the chat template in it is"),
        ({"jinja": "B"}, {"config": {"chat_template": "A"}}, "ckpt", "A", "lora: the chat template in it is"),
        # The same template is no mixture.
        ({"jinja": "B"}, {"jinja": "B"}, "ckpt", "B", None),
        ({"config": {"chat_template": "B"}}, {"jinja": "B"}, "ckpt", None, None),
        # A tokenizer without a template gets the checkpoint's, wherever it stands.
        ({"jinja": "B"}, {"vocab": 1, "config": {}}, "lora", "B", "lora: the tokenizer has no chat"),
        ({"config": {"chat_template": "B"}}, {"vocab": 1}, "lora", "B", "lora: the tokenizer has no chat"),
        # Its own is not mixed with the checkpoint's, which would be read first.
        ({"jinja": "B"}, {"vocab": 1, "config": {"chat_template": "A"}}, "lora", None, None),
        ({"jinja": "B"}, {"vocab": 1, "jinja": "A"}, "lora", "A", None),
        ({}, {"vocab": 1}, "lora", None, None),
    ],
)  # fmt: skip
def test_tokenizer_and_chat_template(
    base: dict[str, Any],
    adapter: dict[str, Any],
    tokenizer_of: str,
    template: str | None,
    said: str | None,
    ckpt: Path,
    lora: Path,
    tmp_path: Path,
) -> None:
    names = {"jinja": "chat_template.jinja", "config": "tokenizer_config.json", "vocab": "vocab.txt"}
    fill(ckpt, {names[kind]: content for kind, content in ({"vocab": "base"} | base).items()})
    fill(lora, {names[kind]: content for kind, content in adapter.items()})
    run = Run(ckpt, lora, tmp_path / "out")
    jinja = tmp_path / "out/chat_template.jinja"
    assert (jinja.read_text() if jinja.exists() else None) == template
    assert run.plan["tokenizer"] == str({"ckpt": ckpt, "lora": lora}[tokenizer_of])
    assert len(run.warnings) == (said is not None) and (said or "") in "".join(run.warnings)
    config = tmp_path / "out/tokenizer_config.json"
    own = {"ckpt": base, "lora": adapter}[tokenizer_of].get("config")
    assert (json.loads(config.read_text()) if config.exists() else None) == own
